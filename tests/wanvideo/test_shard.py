"""One process: what is asked for the sake of several gives back what it was given, and launches nothing."""

import pytest
import torch
from contract import ALL_CASES, build, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from wanvideo_wrapper.wanvideo.shard import ALONE, WHOLE
from wanvideo_wrapper.wanvideo.tokens import Text, Tokens


class Counting(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def test_everything_is_the_tensor_itself():
    t = torch.randn(1, 12, 4, 6)
    same = (
        WHOLE.take(t), WHOLE.frames(t), WHOLE.appended(t), WHOLE.mean(t), WHOLE.heads(t, in_order=False)(),
        WHOLE.tokens(t, heads=4, in_order=False), ALONE.same(t),
        *ALONE.each([[t]], lambda job: job[0]), *ALONE.each([[t]], lambda job: job[0], together=True),
    )  # fmt: skip
    assert all(each is t for each in same)
    assert WHOLE.first(5) is WHOLE.rest(5) is ALONE.shard((3, 2, 2), 12) is WHOLE
    assert WHOLE.grid((3, 2, 2)) == (3, 2, 2) and WHOLE.count(7) == 7
    assert ALONE.agreed(True) and not ALONE.agreed(False) and ALONE.writer(t) is t


def test_tokens_take_their_part_without_work():
    x, rows = torch.randn(1, 12, 24), torch.arange(12)
    tokens = Tokens(x, x, rows, x, (3, 2, 2), Text(x), x, x)
    with Counting() as counting:
        part = tokens.on(WHOLE)
    assert not counting.ran and part.x is x and part.rows is rows and part.rope is x


@pytest.mark.parametrize("name", ALL_CASES)
def test_systems_take_their_part_without_work(name, monkeypatch):
    case, asked = ALL_CASES[name], []
    on = type(case.extension).on

    def counted(extension, state, shard):
        with Counting() as counting:
            part = on(extension, state, shard)
        asked.append(counting.ran)
        return part

    monkeypatch.setattr(type(case.extension), "on", counted)
    with torch.no_grad():
        build(case.extension, config=case.config)[1](inputs(case.payload))
    assert not any(asked)
