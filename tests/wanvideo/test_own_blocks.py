"""What lets a system run blocks of its own inside the model's, and change runs of every model that has it."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from contract import build, inputs
from wanvideo_wrapper.wanvideo import sampling
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.families import Kind
from wanvideo_wrapper.wanvideo.load_plan import with_aliases
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.systems import Systems


@dataclass(frozen=True)
class Beside(Payload):
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class Companion(Extension):
    payload: ClassVar[type] = Beside
    file: ClassVar[Kind] = Kind("Toy module", "", ("^toy$",))
    seen: tuple = ()

    def build(self, model):
        model.own = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in model.blocks)

    def stacks(self, model):
        return {"own": model.own}

    def companions(self, model, index):
        return (model.own[index],)

    def prepare(self, model, payload, inputs, tokens):
        more = torch.randn(tokens.x.shape[0], 2, tokens.x.shape[2])
        return tokens.appended(more, model.rope((1, 1, 2))), self.seen

    def block_cond(self, state, index):
        return None

    def after_blocks(self, model, x, state):
        model.seen = x

    @classmethod
    def published(cls, key):
        return key.replace("old", "new")

    def modifiers(self):
        return (Outer("own"),)


@dataclass(frozen=True)
class Outer(Modifier):
    name: str

    def around_run(self, run):
        return lambda request, host: [self.name, *run(request, host)]


def test_companions_are_visited_with_their_block_and_all_tokens_are_seen_behind_the_last():
    _, model = build(Companion())
    inside, together = [], []

    class Visit:
        def __init__(self, module):
            self.module = module

        def __enter__(self):
            inside.append(self.module)

        def __exit__(self, *_):
            inside.remove(self.module)

    model.visit = Visit
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: together.append(list(inside)))
    model(inputs(Beside()))
    assert [[id(m) for m in row] for row in together] == [
        [id(block), id(own)] for block, own in zip(model.blocks, model.own, strict=True)
    ]
    assert model.seen.shape == (1, 3 * 2 * 2 + 2, WanConfig(dim=24, ffn_dim=1, num_heads=2, num_layers=1).dim)
    del model.seen
    model(inputs())
    assert not hasattr(model, "seen"), "idle without its payload"


def test_halves_of_a_block_are_the_block():
    _, model = build()
    block, seen = model.blocks[1], []
    block.register_forward_pre_hook(lambda block, args: seen.append(args))
    block.register_forward_hook(lambda block, args, out: seen.append(out))
    model(inputs())
    (x, given, _), want = seen
    rows = block.modulated(given)
    half, hooks = block.attend(x, given, (), rows[:3])
    assert torch.equal(block.read(half, given, hooks, rows[3:]), want) and not torch.equal(half, want)


def test_files_may_have_other_names():
    systems = Systems(extensions=(Companion,))
    renamed = []
    checkpoint = SimpleNamespace(renamed=lambda rename: renamed.extend(map(rename, ("an old key", "a key"))))
    with_aliases(checkpoint, systems)
    assert renamed == ["an new key", "a key"]


def test_modifiers_of_the_model_act_within_those_that_are_connected(monkeypatch):
    monkeypatch.setattr(sampling, "sample_once", lambda request, host: [len(request.modifiers)])
    monkeypatch.setattr(sampling, "warn_of_settings", lambda request: None)
    request = sampling.SampleRequest(
        model=SimpleNamespace(
            transformer=SimpleNamespace(extensions=(Companion(),)), elsewhere=None, config=SimpleNamespace(dim=64)
        ),
        schedule=SimpleNamespace(for_width=lambda width: None), text=None, cfg=1.0, seed=0,
        image=SimpleNamespace(loop=None, modifiers=(Outer("of the video"),)), modifiers=(Outer("connected"),),
    )  # fmt: skip
    assert sampling.sample(request, None) == ["connected", "of the video", "own", 3]
