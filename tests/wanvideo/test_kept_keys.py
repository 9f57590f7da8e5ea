"""Keys and values of prompts, pictures and speech are computed once a run or window, and change nothing."""

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import talking
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.standalone_host import StandaloneHost
from wanvideo_wrapper.wanvideo import windows
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.extensions.clip_image import ClipImageExtension
from wanvideo_wrapper.wanvideo.guidance import Denoiser
from wanvideo_wrapper.wanvideo.payloads import ClipEmbeds, ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

FRAMES, STEPS, BLOCKS = 12, 3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    clip = ClipImageExtension(clip_dim=tiny.CLIP_DIM)
    tiny.transformer(in_dim=36, layers=BLOCKS, extensions=(clip,)).save(path / "picture.safetensors", torch.float32)
    return path


def request(
    folder, *, base="text", prompts=1, cfg=1.0, audio_cfg=1.0, batched=False, lora=None, context=None, speech=True
):
    asked = talking.request(folder, base=base, total=60, scheduler="euler", lora=lora)
    size = asked.text.positive[0].shape[1]
    text = replace(
        asked.text,
        positive=tuple(torch.randn(4 + i, size) for i in range(prompts)),
        negative=(torch.randn(3, size),),
    )
    image = ImageEmbeds(latent_shape=(16, FRAMES, 4, 4), num_frames=45)
    if base == "picture":
        positive, negative = torch.randn(2, 1, 257, tiny.CLIP_DIM)
        clip = ClipEmbeds(positive=positive, negative=negative)
        image = replace(image, cond=torch.randn(16, FRAMES, 4, 4), mask=torch.rand(4, FRAMES, 4, 4), clip=clip)
    return replace(
        asked, text=text, cfg=cfg, batched_cfg=batched, context=context, image=image,
        schedule=scheduled(STEPS), multitalk=replace(asked.multitalk, cfg_scale=audio_cfg) if speech else None,
    )  # fmt: skip


def scheduled(steps):
    return make_schedule(ScheduleSpec(name="euler", steps=steps, shift=5.0))


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


MOVING = ContextOptions(size=17, overlap=8, stride=4)
STATIC = replace(MOVING, schedule="static_standard")
COUNT = len(STATIC.windows(0, FRAMES))
SPEECH, PICTURE = "audio_cross_attn.kv_linear", "cross_attn.k_img"
CASES = {
    "plain": {},
    "guided": {"cfg": 4.0},
    "guided in one batch": {"cfg": 4.0, "batched": True, "speech": False},
    "guided in some steps": {"cfg": [4.0, 1.0, 3.0]},
    "several prompts": {"prompts": 3, "cfg": 4.0},
    "a LoRA beside": {"lora": 0.6, "cfg": 4.0},
    "windows": {"context": MOVING, "prompts": 3, "cfg": 4.0},
    "static windows": {"context": STATIC, "prompts": 3, "cfg": 4.0},
    "static windows guided in some steps": {"context": STATIC, "cfg": [4.0, 1.0, 3.0], "audio_cfg": [1.0, 2.0]},
    "static windows of a picture": {"context": STATIC, "base": "picture", "cfg": 4.0},
    "static windows of a picture in one batch": {"context": STATIC, "base": "picture", "cfg": 4.0, "batched": True},
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
    [
        ("plain", 1, 1),
        ("guided", 2, 1),
        ("several prompts", 4, 1),
        ("static windows", 3, COUNT),
        ("static windows guided in some steps", 2, 2 * COUNT),
    ],
)
@pytest.mark.parametrize("steps", [STEPS, 6])
def test_once_a_run_or_window(folder, case, of_text, of_speech, steps):
    """A window takes the prompt of its last frame, so that the first of three prompts rules none."""
    asked = replace(request(folder, **CASES[case]), schedule=scheduled(steps))
    _, calls = count(asked, "cross_attn.k", "cross_attn.v", SPEECH)
    assert calls["cross_attn.k"] == calls["cross_attn.v"] == of_text * BLOCKS
    assert calls[SPEECH] == of_speech * BLOCKS


@pytest.mark.parametrize(
    ("case", "of_picture"),
    [("static windows of a picture", 2), ("static windows of a picture in one batch", 1), ("windows", 2)],
)
def test_windows_share_the_picture(folder, case, of_picture):
    """Its positive and its negative form, or both in one batch; also where the windows move."""
    _, calls = count(request(folder, **{**CASES[case], "base": "picture", "speech": False}), PICTURE)
    assert calls[PICTURE] == of_picture * BLOCKS


def test_windows_that_move_keep_what_comes_in_the_next_step(folder):
    seen = [set(MOVING.windows(step, FRAMES)) for step in range(6)]
    new = sum(len(windows - before) for before, windows in zip([set(), *seen], seen, strict=False))
    _, calls = count(replace(request(folder, **CASES["windows"]), schedule=scheduled(6)), SPEECH)
    assert COUNT < new == calls[SPEECH] / BLOCKS < sum(map(len, seen))


@pytest.mark.parametrize("room", [0, 2])
def test_windows_without_room_are_computed_anew(folder, room, monkeypatch):
    asked = request(folder, **CASES["static windows"])
    want, asks = latents(asked), []
    monkeypatch.setattr(windows, "has_room", lambda device, size: asks.append(device) or len(asks) <= room)
    got, calls = count(asked, "cross_attn.k", SPEECH)
    assert torch.equal(got, want) and calls["cross_attn.k"] == 3 * BLOCKS
    assert calls[SPEECH] == (room + (COUNT - room) * STEPS) * BLOCKS


def test_a_window_that_does_not_come_again_is_let_go(folder, monkeypatch):
    """No more windows are held than the one that runs, and those that this step shares with the one before or after."""
    asked = replace(request(folder, context=MOVING), schedule=scheduled(6))
    made, most, make, run = [], [], Denoiser.__init__, Denoiser.__call__
    seen = [set(MOVING.windows(step, FRAMES)) for step in range(6)] + [set()]

    def watched(self, latents, timestep, step, index):
        gc.collect()
        shared = seen[index] & (seen[index - 1] if index else set()) | seen[index] & seen[index + 1]
        most.append((sum(reference() is not None for reference in made), len(shared) + 1))
        return run(self, latents, timestep, step, index)

    monkeypatch.setattr(
        Denoiser, "__init__", lambda self, *a, **k: made.append(weakref.ref(self)) or make(self, *a, **k)
    )
    monkeypatch.setattr(Denoiser, "__call__", watched)
    latents(asked)
    assert most and all(held <= bound for held, bound in most)


def test_room_is_a_share_of_the_memory(monkeypatch):
    device = torch.device("cuda")
    for free, size, want in ((11, 0, False), (13, 0, True), (22, 10, False), (23, 10, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 100))
        assert windows.has_room(device, size) is want


def test_a_window_that_grows_asks_for_room_again(folder, monkeypatch):
    asked = request(folder, **CASES["static windows"])
    want, sizes, held = latents(asked), [], itertools.count(step=windows.LITTLE + 2**20)
    monkeypatch.setattr(windows, "_allocated", lambda device: next(held))
    monkeypatch.setattr(windows, "has_room", lambda device, size: sizes.append(size) or True)
    assert torch.equal(latents(asked), want)
    assert len(sizes) == COUNT * (STEPS - 1) and min(sizes) > windows.LITTLE


@pytest.mark.parametrize(("context", "number"), [(None, 1), (STATIC, COUNT)])
def test_every_step_where_a_lora_changes(folder, context, number):
    asked = request(folder, base="picture", lora=(0.2, 0.4, 0.6), context=context)
    _, calls = count(asked, "cross_attn.k", SPEECH, PICTURE)
    assert set(calls.values()) == {STEPS * BLOCKS * number}


def test_other_prompts_are_not_mixed_up(folder):
    asked = request(folder)
    other = replace(asked, text=replace(asked.text, positive=(torch.randn_like(asked.text.positive[0]),)))
    assert not torch.equal(latents(asked), latents(other))


@pytest.mark.parametrize("case", ["guided", "several prompts", "windows", "static windows"])
def test_memory_is_freed(folder, case):
    asked, kept = request(folder, **CASES[case]), []
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda *a: kept.append(weakref.ref(a[2].untyped_storage())))
        for block in asked.model.transformer.blocks
        for name in ("cross_attn.v", SPEECH)
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
