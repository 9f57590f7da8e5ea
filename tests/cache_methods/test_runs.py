"""Step caches inside whole runs: plain, guided, windowed, talking, resumed."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import talking
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.cache_methods.easycache import EasyCache
from wanvideo_wrapper.cache_methods.magcache import MagCache
from wanvideo_wrapper.cache_methods.published import MODELS, variant_of
from wanvideo_wrapper.cache_methods.teacache import TeaCache
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo import footage as store
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

HOST = StandaloneHost(device="cpu")
LOOSE = [
    TeaCache(threshold=1.0, use_coefficients=False),
    EasyCache(threshold=1.0, start_step=2, cache_device="main_device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


def plain(folder, cache=None, *, frames=9, cfg=1.0, count=6, **changes):
    """A run of the text model without speech."""
    asked = talking.request(folder, base="text")
    negative = (torch.randn(3, asked.text.positive[0].shape[1], generator=torch.Generator().manual_seed(5)),)
    return replace(
        asked,
        text=replace(asked.text, negative=negative),
        image=ImageEmbeds(latent_shape=(16, (frames - 1) // 4 + 1, 4, 4), num_frames=frames),
        schedule=make_schedule(ScheduleSpec(name="euler", steps=count, shift=5.0)),
        payloads=(),
        cache=cache,
        cfg=cfg,
        **changes,
    )


def counted(asked):
    """The latents, and how often the first block ran."""
    calls = []
    block = asked.model.transformer.blocks[0]
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        return sample(asked, HOST)[0]["samples"], len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("cache", LOOSE, ids=lambda c: c.label)
def test_steps_are_left_out_and_told(cache, folder, caplog):
    want, all_steps = counted(plain(folder))
    with caplog.at_level(logging.INFO, "wanvideo"):
        got, some = counted(plain(folder, cache))
    assert all_steps == 6 and 1 <= some < 6
    assert got.isfinite().all() and not torch.equal(got, want)
    assert f"{cache.label} left out {6 - some} of 6 steps (with everything)" in caplog.text
    assert f"Steps may be left out by {cache.label}" in caplog.text


@pytest.mark.parametrize("cache", LOOSE, ids=lambda c: c.label)
def test_a_threshold_that_leaves_nothing_out_changes_nothing(cache, folder):
    want = sample(plain(folder, cfg=3.0), HOST)[0]["samples"]
    got = sample(plain(folder, replace(cache, threshold=0.0), cfg=3.0), HOST)[0]["samples"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("batched", [False, True])
def test_each_prediction_has_its_own_memory(batched, folder, caplog):
    cache = TeaCache(threshold=99.0, use_coefficients=False)
    with caplog.at_level(logging.INFO, "wanvideo"):
        _, runs = counted(plain(folder, cache, cfg=3.0, batched_cfg=batched))
    reports = [line for line in caplog.messages if "left out 5 of 6 steps" in line]
    names = ["(with everything and without text)"] if batched else ["(with everything)", "(without text)"]
    assert runs == len(names) and all(any(name in line for line in reports) for name in names)


def test_guidance_that_comes_back_starts_anew(folder):
    cache = TeaCache(threshold=99.0, use_coefficients=False)
    _, runs = counted(plain(folder, cache, cfg=[3.0, 3.0, 1.0, 1.0, 3.0, 3.0]))
    assert runs == 3


@pytest.mark.parametrize("schedule", ["static_standard", "uniform_standard"])
def test_context_windows_have_their_own(schedule, folder):
    context = ContextOptions(schedule=schedule, size=17, overlap=8, stride=4, freenoise=False)
    cache = TeaCache(threshold=99.0, use_coefficients=False)
    want, all_calls = counted(plain(folder, frames=49, context=context))
    same, _ = counted(plain(folder, replace(cache, threshold=0.0), frames=49, context=context))
    got, calls = counted(plain(folder, cache, frames=49, context=context))
    assert torch.equal(same, want) and got.isfinite().all()
    assert calls == all_calls / 6 if schedule == "static_standard" else calls <= all_calls


def test_a_talking_video_begins_anew_in_every_window(folder):
    cache = TeaCache(threshold=99.0, use_coefficients=False)
    asked = talking.request(folder)
    asked = replace(asked, schedule=make_schedule(ScheduleSpec(name="euler", steps=4, shift=5.0)), cache=cache)
    calls = []
    handle = asked.model.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    video = sample(asked, HOST)[0]["video"]
    handle.remove()
    assert len(calls) == 5 and video.isfinite().all()


def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    cache = EasyCache(threshold=0.5, start_step=1)

    def asked(out, **changes):
        spec = ScheduleSpec(name="euler", steps=4, shift=5.0)
        return replace(
            talking.request(folder, output_path=str(out)), schedule=make_schedule(spec), cache=cache, **changes
        )

    def files(path):
        return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.suffix == ".png"}

    talking.run(asked(tmp_path / "whole"))
    write = store.write_frame

    def stopping(where, index, picture):
        if index == 20:
            raise KeyboardInterrupt
        write(where, index, picture)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_frame", stopping)
        talking.run(asked(tmp_path / "parts"))
    talking.run(asked(tmp_path / "parts"))
    assert files(tmp_path / "parts") == files(tmp_path / "whole") != {}


@pytest.mark.parametrize(
    ("node", "widgets", "want"),
    [
        ("WanVideoTeaCache", {"rel_l1_thresh": 0.2, "use_coefficients": False, "mode": "e0"},
         TeaCache(threshold=0.2, start_step=1, end_step=9, use_coefficients=False, mode="e0")),
        ("WanVideoMagCache", {"magcache_thresh": 0.1, "magcache_K": 2},
         MagCache(threshold=0.1, longest=2, start_step=1, end_step=9)),
        ("WanVideoEasyCache", {"easycache_thresh": 0.03}, EasyCache(threshold=0.03, start_step=1, end_step=9)),
    ],
)  # fmt: skip
def test_nodes_emit_settings(node, widgets, want):
    made = N[node]()
    got = getattr(made, made.FUNCTION)(start_step=1, end_step=9, cache_device="offload_device", **widgets)
    assert got == (want,)


@pytest.mark.parametrize("cache", [TeaCache(), MagCache()], ids=lambda c: c.label)
def test_models_without_numbers_are_refused(cache, folder):
    with pytest.raises(
        ValueError, match=rf"{cache.label} has published numbers for the 1.3B and 14B .* WanVideo EasyCache"
    ):
        sample(plain(folder, cache), HOST)


@pytest.mark.parametrize(
    ("dim", "in_dim", "clip", "file", "want"),
    [
        (1536, 16, False, "wan2.1_t2v_1.3B.safetensors", "T2V 1.3B"),
        (5120, 16, False, "Wan2_1-T2V-14B.safetensors", "T2V 14B"),
        (5120, 16, False, "Wan2_2-T2V-A14B-LOW.safetensors", "T2V A14B"),
        (5120, 36, True, "Wan2_1-I2V-14B-480P.safetensors", "I2V 14B 480p"),
        (5120, 36, True, "Wan2_1-I2V-14B-720P.safetensors", "I2V 14B 720p"),
        (5120, 36, True, "mine.safetensors", "I2V 14B 480p"),
        (5120, 36, False, "wan2.2_i2v_high_noise.safetensors", "I2V A14B"),
    ],
)
def test_whose_numbers_are_taken(dim, in_dim, clip, file, want):
    config = WanConfig(dim=dim, ffn_dim=64, num_heads=dim // 128, num_layers=1, in_dim=in_dim, out_dim=16, text_dim=8)
    extensions = (ClipImageExtension(clip_dim=8),) if clip else ()
    model = SimpleNamespace(config=config, path=Path(file), transformer=SimpleNamespace(extensions=extensions))
    assert variant_of(model, "MagCache") == want and want in MODELS
