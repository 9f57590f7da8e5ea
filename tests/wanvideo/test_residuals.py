"""Where one kernel adds and norms, a block leaves its sums to the norms behind them, and gives the same."""

import weakref
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from contract import ALL_CASES, SIZES, build, inputs
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.modules import block as block_module
from wanvideo_wrapper.wanvideo.modules import layers


@pytest.fixture
def joined(monkeypatch):
    """The sums that norms make, as on a GPU."""
    sums, kernel = [], layers.residual_norm

    def noting(*arguments):
        sums.append(arguments[0].shape)
        return kernel(*arguments)

    monkeypatch.setattr(layers, "residual_norm", noting)
    monkeypatch.setattr(block_module, "added_by_norm", lambda x: True)
    return sums


@dataclass(frozen=True)
class Note(Payload):
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class Before(Extension):
    payload: ClassVar[type] = Note

    def before_cross_attn(self, block, x, cond):
        return x * 1.5, cond


@dataclass(frozen=True)
class After(Extension):
    payload: ClassVar[type] = Note

    def after_cross_attn(self, block, x, cond):
        return x * 1.5, cond


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_CASES)
def test_every_system_gives_the_same(name, joined, monkeypatch):
    case = ALL_CASES[name]
    _, model = build(case.extension, config=case.config)
    given = inputs(case.payload)
    got = model(given)
    with monkeypatch.context() as patch:
        patch.setattr(block_module, "added_by_norm", lambda x: False)
        want = model(given)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5) and want.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("extension", "sums"), [(None, 2), (Before(), 0), (After(), 1)])
def test_a_sum_is_left_to_the_norm_unless_somebody_looks_at_it(extension, sums, joined):
    _, model = build(*([] if extension is None else [extension]))
    model(inputs(*([] if extension is None else [Note()])))
    assert len(joined) == sums * len(model.blocks)
    if extension is not None:
        joined.clear()
        model(inputs())
        assert len(joined) == 2 * len(model.blocks), "idle without its payload"


@dataclass(frozen=True)
class Taking(Extension):
    """Sums at both places. What it adds differs by channel: a norm would not see what is the same in all."""

    payload: ClassVar[type] = Note
    takes_sums: ClassVar[tuple[str, ...]] = ("before_cross_attn", "after_cross_attn")

    def before_cross_attn(self, block, x, cond):
        x = x.added()
        return layers.Residual(x, ramp(x), torch.tensor(0.25)), cond

    def after_cross_attn(self, block, x, cond):
        return x.added() * 1.5, cond


def ramp(x):
    return torch.linspace(-2, 2, x.shape[-1]).expand_as(x).contiguous()


@torch.no_grad()
def test_a_system_that_takes_sums_gets_them_and_may_return_one(joined):
    class Plain(Taking):
        takes_sums = ()

        def before_cross_attn(self, block, x, cond):
            return x + 0.25 * ramp(x), cond

        def after_cross_attn(self, block, x, cond):
            return x * 1.5, cond

    _, model = build(Taking())
    given = inputs(Note())
    got, count = model(given), len(joined)
    assert count == len(model.blocks), "the sum before cross-attention alone is left to its norm"
    model.extensions = (Plain(),)
    for block in model.blocks:
        block.extensions = model.extensions
    joined.clear()
    assert torch.allclose(got, model(given), rtol=1e-5, atol=1e-5) and not joined


@torch.no_grad()
@pytest.mark.parametrize("name", ["multitalk", "multitalk_folded", "multitalk_two_speakers"])
def test_audio_attention_norms_the_sum_with_what_was_read(name, joined):
    """Without folding, what is heard is a sum that waits for the feed-forward's norm."""
    case = ALL_CASES[name]
    _, model = build(case.extension, config=case.config)
    model(inputs(case.payload))
    voiced = len(case.extension.voiced)
    assert len(joined) == 2 * len(model.blocks) + (0 if name == "multitalk_folded" else voiced)


@torch.no_grad()
@pytest.mark.parametrize("text", [8, 0])
def test_videos_of_a_batch_and_blocks_without_text(text, joined, monkeypatch):
    """Every video has modulation of its own; without text no norm follows self-attention, but hooks still do."""
    base, model = build(After(), config=WanConfig(**{**SIZES, "text_dim": text}))
    given = replace(inputs(batch=2), timestep=torch.tensor([900.0, 100.0]))
    for each, payloads in ((model, (Note(),)), (base, ())):
        got = each(replace(given, payloads=payloads))
        with monkeypatch.context() as patch:
            patch.setattr(block_module, "added_by_norm", lambda x: False)
            want = each(replace(given, payloads=payloads))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5) and want.isfinite().all()
    assert not torch.allclose(model(replace(given, payloads=(Note(),))), base(given)) and bool(joined) == (text > 0)


@torch.no_grad()
def test_in_pieces_every_sum_is_its_own(joined):
    _, model = build()
    with model.sparing(5):
        model(inputs())
    assert not joined


@torch.no_grad()
def test_terms_are_freed_when_they_are_added(joined):
    _, model = build()
    made, alive = [], []
    for block in model.blocks:
        block.self_attn.o.register_forward_hook(lambda layer, args, out: made.append(weakref.ref(out)))
        block.cross_attn.q.register_forward_pre_hook(lambda layer, args: alive.append(made[-1]() is not None))
        block.cross_attn.o.register_forward_hook(lambda layer, args, out: made.append(weakref.ref(out)))
        block.ffn[0].register_forward_pre_hook(lambda layer, args: alive.append(made[-1]() is not None))
    model(inputs())
    assert alive == [False, False] * len(model.blocks)
