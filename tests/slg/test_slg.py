"""Skip layer guidance against models that lack the skipped blocks."""

import pytest
import torch
from contract import build, inputs
from tiny_runs import Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.slg.extension import SkipLayerGuidance, SkippedBlocks
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance


def lacking(model, *blocks):
    model.blocks = torch.nn.ModuleList(b for index, b in enumerate(model.blocks) if index not in blocks)
    return model


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_skipped_blocks_are_as_if_they_were_not_there(blocks):
    base, model = build(SkipLayerGuidance())
    got = model(inputs(SkippedBlocks(blocks, unprompted=True)))
    assert torch.equal(got, lacking(base, *blocks)(inputs()))


def test_only_passes_without_the_prompt_skip():
    args = SkippedBlocks((1,))
    assert not args.unprompted and not args.without(frozenset({"audio"})).unprompted
    assert args.without(frozenset({"text"})).unprompted and args.without(frozenset({"text", "audio"})).unprompted


@pytest.mark.parametrize(("index", "acts"), [(0, False), (1, False), (2, True), (4, True), (6, True), (7, False)])
def test_only_steps_within_the_range_skip(index, acts):
    base, model = build(SkipLayerGuidance())
    got = model(inputs(SkippedBlocks((1,), 0.25, 0.75, unprompted=True), step=index))
    assert torch.equal(got, (lacking(base, 1) if acts else base)(inputs(step=index)))


@pytest.mark.parametrize("batched", [False, True])
def test_guidance_leads_away_from_the_model_that_lacks_them(batched):
    base, model = build(SkipLayerGuidance())
    generator = torch.Generator().manual_seed(1)
    positive, negative, latents = (torch.randn(*s, generator=generator) for s in ((4, 8), (3, 8), (16, 3, 4, 4)))
    timestep = torch.tensor(700.0)

    def velocity(model, cfg, text, payloads=()):
        conditions = Conditions(positive=text, negative=negative, payloads=payloads)
        rule = Guidance(cfg=(cfg,), payloads=payloads, batched=batched)
        where = {"device": torch.device("cpu"), "dtype": torch.float32}
        return Denoiser(model, conditions, guidance=rule, **where)(latents, timestep, Step())

    got = velocity(model, 4.0, positive, (SkippedBlocks((1,)),))
    cond = velocity(base, 1.0, positive)
    uncond = velocity(lacking(base, 1), 1.0, negative)
    torch.testing.assert_close(got, uncond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_blocks_that_the_model_lacks_are_refused_at_once():
    _, model = build(SkipLayerGuidance())
    with pytest.raises(ValueError, match="skips block 3, but this model has blocks 0 to 2"):
        model(inputs(SkippedBlocks((1, 3), 0.9)))


def test_the_node():
    node = N["WanVideoSLG"]()
    assert node.process("9, 10", 0.1, 0.8) == (SkippedBlocks((9, 10), 0.1, 0.8),)
    assert node.process("", 0.1, 0.8)[0].blocks == ()
    for wrong in ("ten", "-1", "1,,2"):
        with pytest.raises(ValueError, match="blocks must be whole numbers"):
            node.process(wrong, 0.1, 1.0)


def test_a_run_of_the_sampler(tmp_path):
    with Runs(tmp_path) as runs:
        (args,) = N["WanVideoSLG"]().process("1", 0.0, 1.0)
        plain, skipping = runs.sample(), runs.sample(slg_args=args)
        assert skipping.isfinite().all() and (plain - skipping).abs().max() > 1e-3
        assert torch.equal(runs.sample(cfg=1.0), runs.sample(cfg=1.0, slg_args=args))
        torch.testing.assert_close(runs.sample(slg_args=args, batched_cfg=True), skipping, rtol=1e-4, atol=1e-4)
