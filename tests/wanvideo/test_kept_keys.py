"""Keys and values of prompts, pictures and speech are computed once a run or window, and change nothing."""

import gc
import weakref
from dataclasses import replace

import pytest
import talking
import torch
from wanvideo_wrapper.standalone_host import StandaloneHost
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.guidance import Denoiser
from wanvideo_wrapper.wanvideo.payloads import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

FRAMES, STEPS, BLOCKS = 12, 3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


def request(folder, *, prompts=1, cfg=1.0, batched=False, lora=None, context=None, speech=True):
    asked = talking.request(folder, base="text", total=60, scheduler="euler", lora=lora)
    size = asked.text.positive[0].shape[1]
    text = replace(
        asked.text,
        positive=tuple(torch.randn(4 + i, size) for i in range(prompts)),
        negative=(torch.randn(3, size),),
    )
    return replace(
        asked, text=text, cfg=cfg, batched_cfg=batched, context=context,
        image=ImageEmbeds(latent_shape=(16, FRAMES, 4, 4), num_frames=45),
        schedule=make_schedule(ScheduleSpec(name="euler", steps=STEPS, shift=5.0)),
        multitalk=asked.multitalk if speech else None,
    )  # fmt: skip


def latents(asked, device="cpu"):
    return sample(asked, StandaloneHost(device=device))[0]["samples"]


def count(asked, *names):
    """How often each of the layers of all blocks runs in the run of `asked`."""
    calls = dict.fromkeys(names, 0)

    def counted(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [
        block.get_submodule(name).register_forward_hook(counted(name))
        for block in asked.model.transformer.blocks
        for name in names
    ]
    try:
        return latents(asked), calls
    finally:
        for hook in hooks:
            hook.remove()


WINDOWS = ContextOptions(size=17, overlap=8, stride=4)
CASES = {
    "plain": {},
    "guided": {"cfg": 4.0},
    "guided in one batch": {"cfg": 4.0, "batched": True, "speech": False},
    "guided in some steps": {"cfg": [4.0, 1.0, 3.0]},
    "several prompts": {"prompts": 3, "cfg": 4.0},
    "a LoRA beside": {"lora": 0.6, "cfg": 4.0},
    "windows": {"context": WINDOWS, "prompts": 3, "cfg": 4.0},
}


@pytest.mark.parametrize("case", CASES)
def test_keeping_changes_nothing(folder, case, monkeypatch):
    torch.manual_seed(5)
    asked = request(folder, **CASES[case])
    kept = latents(asked)
    make = Denoiser.__init__
    monkeypatch.setattr(Denoiser, "__init__", lambda self, *a, **k: make(self, *a, **{**k, "keeps": False}))
    assert torch.equal(kept, latents(asked))


@pytest.mark.parametrize(
    ("case", "of_text", "of_speech"),
    [("plain", 1, 1), ("guided", 2, 1), ("several prompts", 4, 1), ("windows", 3, None)],
)
def test_once_a_run(folder, case, of_text, of_speech):
    """A window takes the prompt of its last frame, so that the first of three prompts rules none."""
    _, calls = count(request(folder, **CASES[case]), "cross_attn.k", "cross_attn.v", "audio_cross_attn.kv_linear")
    assert calls["cross_attn.k"] == calls["cross_attn.v"] == of_text * BLOCKS
    if of_speech is not None:
        assert calls["audio_cross_attn.kv_linear"] == of_speech * BLOCKS


def test_every_step_where_a_lora_changes(folder):
    _, calls = count(request(folder, lora=(0.2, 0.4, 0.6)), "cross_attn.k")
    assert calls["cross_attn.k"] == STEPS * BLOCKS


def test_other_prompts_are_not_mixed_up(folder):
    asked = request(folder)
    other = replace(asked, text=replace(asked.text, positive=(torch.randn_like(asked.text.positive[0]),)))
    assert not torch.equal(latents(asked), latents(other))


@pytest.mark.parametrize("case", ["guided", "several prompts", "windows"])
def test_memory_is_freed(folder, case):
    asked, kept = request(folder, **CASES[case]), []
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda *a: kept.append(weakref.ref(a[2].untyped_storage())))
        for block in asked.model.transformer.blocks
        for name in ("cross_attn.v", "audio_cross_attn.kv_linear")
    ]
    latents(asked)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert kept and not any(reference() is not None for reference in kept)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_block_swap_changes_nothing(folder, case):
    host = StandaloneHost(device="cuda")
    from wanvideo_wrapper.wanvideo.loading import load_wan_model

    torch.manual_seed(5)
    asked = request(folder, **CASES[case])
    swap = BlockSwapArgs(blocks_to_swap=2, offload_txt_emb=True, prefetch_blocks=1)
    model = load_wan_model(asked.model.path, asked.model.options, host)
    resident = latents(replace(asked, model=model), "cuda")
    assert torch.equal(resident, latents(replace(asked, model=replace(model, block_swap=swap)), "cuda"))
