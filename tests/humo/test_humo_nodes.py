"""HuMo's nodes on tiny models: what they make, that it is sampled and decoded, and what users are told."""

from dataclasses import replace

import numpy as np
import pyloudnorm
import pytest
import torch
from saved_models import HEARING, save_fp8, whisper
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.humo.conditions import HuMoConditions
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.request import TextEmbeds


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    before = get_host()
    folder = tmp_path_factory.mktemp("humo")
    big, small = (tiny.transformer(in_dim=n, layers=2, extensions=(HEARING,)) for n in (36, 16))
    big.save(folder / "diffusion_models/big.safetensors", torch.float32)
    small.save(folder / "diffusion_models/small.safetensors", torch.float32)
    save_fp8(big, folder / "diffusion_models/fp8.safetensors", scaled=True)
    tiny.vae(base_dim=4).save(folder / "vae/vae.safetensors", torch.float32)
    whisper().save(folder / "audio_encoders/whisper.safetensors", torch.float32)
    host = StandaloneHost(models=folder, device="cpu")
    set_host(host)
    yield host
    set_host(before)


@pytest.fixture(scope="module")
def vae(host):
    return N["WanVideoVAELoader"]().loadmodel("vae.safetensors", "fp32")[0]


@pytest.fixture(scope="module")
def hearing(host):
    return N["WhisperModelLoader"]().loadmodel("whisper.safetensors", "fp32", "main_device")[0]


def sound(seconds=1.0, rate=16000, channels=1, seed=0):
    samples = np.random.default_rng(seed).standard_normal((1, channels, round(seconds * rate))) * 0.1
    return {"waveform": torch.from_numpy(samples).float(), "sample_rate": rate}


def pictures(count, size=(32, 48)):
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(count))


def embeds(vae, frames=9, width=48, height=32, scale=1.0, cfg=1.0, **more):
    return N["HuMoEmbeds"]().process(frames, width, height, scale, cfg, 0.0, 1.0, vae=vae, **more)[0]


def conditions_of(made):
    (payload,) = made.payloads
    assert isinstance(payload, HuMoConditions)
    return payload


def sample(name, made, quantization="disabled", steps=2, **options):
    loaded = N["WanVideoModelLoader"]().loadmodel(name, "fp32", "offload_device", quantization)[0]
    generator = torch.Generator().manual_seed(3)
    text = TextEmbeds(
        positive=(torch.randn(4, tiny.TEXT_DIM, generator=generator),),
        negative=(torch.randn(3, tiny.TEXT_DIM, generator=generator),),
    )
    settings = dict(steps=steps, cfg=4.0, shift=5.0, seed=1, force_offload=True, scheduler="euler", riflex_freq_index=0)
    swap = options.pop("swap", None)
    if swap is not None:
        loaded = N["WanVideoSetBlockSwap"]().loadmodel(loaded, swap)[0]
    return N["WanVideoSampler"]().process(loaded, made, text_embeds=text, **{**settings, **options})[0]


@torch.no_grad()
def test_embeds(vae, hearing):
    refs, heard = pictures(2), sound(0.5)
    made = embeds(vae, reference_images=refs, audio=heard, whisper_model=hearing, cfg=3.0, scale=0.5)
    payload = conditions_of(made)
    assert made.latent_shape == (16, 3 + 2, 4, 6) and made.num_frames == 9 and made.trailing_latents == 2
    assert (payload.scale, payload.cfg_scale, payload.references) == (0.5, 3.0, 2)
    grey = vae.encode(torch.zeros(3, 9 + 8, 32, 48))
    each = [vae.encode(refs[i : i + 1].movedim(-1, 0) * 2 - 1) for i in range(2)]
    assert torch.equal(payload.cond[0, 4:], torch.cat((grey[:, :3], *each), dim=1))
    assert torch.equal(payload.empty[0, 4:], grey)
    assert torch.equal(payload.features, hearing.encode(heard["waveform"][0, 0].numpy()))


def test_sound_is_averaged_and_resampled(vae, hearing):
    two = sound(0.5, channels=2)
    mean = {**two, "waveform": two["waveform"].mean(dim=1, keepdim=True)}
    got, want = (conditions_of(embeds(vae, audio=one, whisper_model=hearing)).features for one in (two, mean))
    assert torch.equal(got, want)
    # A tone, which resampling by any method keeps.
    tones = [
        {"waveform": torch.sin(torch.arange(rate // 2) * 2 * np.pi * 440 / rate)[None, None] * 0.5, "sample_rate": rate}
        for rate in (16000, 48000)
    ]
    low, high = (conditions_of(embeds(vae, audio=one, whisper_model=hearing)).features for one in tones)
    assert low.shape == high.shape and (low - high).norm() < 0.05 * low.norm()


@pytest.mark.parametrize(("frames", "want"), [(-1, 21), (12, 9), (1, 1), (13, 13)])
def test_lengths(vae, hearing, frames, want):
    made = embeds(vae, frames, audio=sound(0.9), whisper_model=hearing)
    assert made.num_frames == want and made.latent_shape[1] == (want - 1) // 4 + 1


def test_a_cut_of_the_sound_is_named(vae, hearing, caplog):
    for frames in (25, -1):
        embeds(vae, frames, whisper_model=hearing, audio=sound(1.0))
    assert not caplog.records
    embeds(vae, 9, whisper_model=hearing, audio=sound(1.0))
    assert "audio lasts 1.00 s, of which num_frames leaves the first 0.36 s" in caplog.text


def test_without_sound_or_pictures(vae, hearing):
    payload = conditions_of(embeds(vae))
    assert payload.features.shape == (9, 5, 1280) and not payload.features.any()
    assert torch.equal(payload.cond, payload.empty) and payload.references == 0
    assert conditions_of(embeds(vae, whisper_model=hearing)).features.shape[-1] == tiny.SPEECH_DIM


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vae": None}, "WanVideoVAELoader to 'vae'"),
        ({"audio": sound()}, "WhisperModelLoader to 'whisper_model'"),
        ({"frames": -1}, "-1 takes the length of the sound, but none"),
        ({"frames": 0}, "num_frames is 0"),
    ],
)
def test_what_is_missing_is_named(vae, change, says):
    with pytest.raises(ValueError, match=says):
        embeds(**{"vae": vae, **change})


@pytest.mark.parametrize("frames", [1, 9, 13])
@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("name", ["big.safetensors", "small.safetensors"])
def test_sampled_and_decoded(vae, hearing, name, references, frames):
    """References take part and do not come out."""
    refs = pictures(references) if references else None
    made = embeds(vae, frames, cfg=3.0, reference_images=refs, audio=sound(), whisper_model=hearing)
    latent = sample(name, made)
    assert latent["samples"].shape[2] == (frames - 1) // 4 + 1 + references and latent["samples"].isfinite().all()
    images = N["WanVideoDecode"]().decode(vae, latent, False, 272, 272, 144, 128)[0]
    assert images.shape == (frames, 32, 48, 3)


def test_everything_counts(vae, hearing):
    """Sound, its strength and guidance, pictures: each changes the result of either model."""
    plain = dict(cfg=3.0, audio=sound(), whisper_model=hearing, reference_images=pictures(1))
    changes = (
        {"audio": sound(seed=1)}, {"scale": 0.3}, {"cfg": 1.0}, {"cfg": [3.0, 5.0]},
        {"reference_images": pictures(1) / 2},
    )  # fmt: skip
    for name in ("big.safetensors", "small.safetensors"):
        base = sample(name, embeds(vae, **plain))["samples"]
        for change in changes:
            other = sample(name, embeds(vae, **{**plain, **change}))["samples"]
            assert not torch.allclose(base[:, :, :3], other[:, :, :3], atol=1e-5), change


@pytest.mark.parametrize("name", ["big.safetensors", "small.safetensors"])
def test_batched_passes_and_swapped_blocks_change_nothing(vae, hearing, name):
    made = embeds(vae, cfg=3.0, audio=sound(), whisper_model=hearing, reference_images=pictures(1))
    want = sample(name, made)["samples"]
    for options in ({"batched_cfg": True}, {"swap": BlockSwapArgs(blocks_to_swap=2)}):
        torch.testing.assert_close(sample(name, made, **options)["samples"], want, rtol=1e-3, atol=1e-4)


def test_quantized(vae, hearing):
    made = embeds(vae, cfg=3.0, audio=sound(), whisper_model=hearing, reference_images=pictures(1))
    want = sample("big.safetensors", made)["samples"]
    got = sample("fp8.safetensors", made, "fp8_e4m3fn_scaled")["samples"]
    assert 0 < (got - want).norm() < 0.2 * want.norm()
    loaded = N["WanVideoModelLoader"]().loadmodel("fp8.safetensors", "fp32", "offload_device", "fp8_e4m3fn_scaled")[0]
    block, projection = loaded.transformer.blocks[0].audio_cross_attn_wrapper, loaded.transformer.audio_proj
    assert all("Fp8" in type(getattr(block.audio_cross_attn, part)).__name__ for part in "qkvo")
    assert {type(m).__name__ for m in projection.modules() if "Linear" in type(m).__name__} == {"Linear"}


@pytest.mark.parametrize("name", ["big.safetensors", "small.safetensors"])
def test_context_windows_keep_the_references(vae, hearing, name, monkeypatch):
    context = N["WanVideoContextOptions"]().process("static_standard", 9, 4, 4, False, False, fuse_method="linear")[0]
    made = embeds(vae, 21, cfg=3.0, audio=sound(), whisper_model=hearing, reference_images=pictures(2))
    seen, window = [], HuMoConditions.window
    monkeypatch.setattr(HuMoConditions, "window", lambda self, w: seen.append(w) or window(self, w))
    latent = sample(name, made, steps=1, context_options=context)
    assert latent["samples"].shape[2] == 6 + 2 and latent["samples"].isfinite().all()
    # All of them are cut before the first one runs, and one by one in the step.
    windows = [(0, 1, 2, 6, 7), (2, 3, 4, 6, 7), (3, 4, 5, 6, 7)]
    assert [w.latents for w in seen] == windows * 2 and seen[0].trailing == 2


def test_another_model_is_refused(vae, host):
    tiny.transformer(in_dim=36, layers=1).save(host.models_dir("diffusion_models") / "i2v.safetensors", torch.float32)
    with pytest.raises(ValueError, match=r"needs a model with audio_proj\.audio_proj_glob_1"):
        sample("i2v.safetensors", embeds(vae))


def image_embeds(vae, frames=9, **more):
    node = N["WanVideoImageToVideoEncode"]()
    return node.process(48, 32, frames, True, 0.0, 1.0, 1.0, vae=vae, start_image=pictures(1), **more)[0]


def combine(first, second):
    return N["WanVideoCombineEmbeds"]().add(first, second)[0]


@pytest.mark.parametrize("turned", [False, True])
def test_combined_with_a_start_picture(vae, hearing, turned):
    """The references follow the start picture's frames."""
    humo = embeds(vae, cfg=3.0, audio=sound(), whisper_model=hearing, reference_images=pictures(2))
    start = image_embeds(vae)
    both = combine(start, humo) if turned else combine(humo, start)
    assert both.latent_shape == (16, 5, 4, 6) and both.trailing_latents == 2 and both.num_frames == 9
    (condition,) = (p for p in both.payloads if isinstance(p, ImageCondition))
    given = start.payloads[0]
    assert torch.equal(condition.cond[:, :, :3], given.cond) and torch.equal(condition.mask[:, :, :3], given.mask)
    got, alone = sample("big.safetensors", both), sample("big.safetensors", humo)
    assert got["samples"].shape == alone["samples"].shape and not torch.equal(got["samples"], alone["samples"])


def test_the_second_counts_where_both_bring_the_same(vae):
    one, two = embeds(vae, scale=1.0, reference_images=pictures(1)), embeds(vae, scale=2.0)
    both = combine(one, two)
    assert conditions_of(both).scale == 2.0
    given = ((0, torch.zeros(16, 1, 4, 6)),)
    marked = replace(two, given_latents=given, extra_end_frame=True)
    for pair in ((one, marked), (marked, replace(one, trailing_latents=0, latent_shape=(16, 3, 4, 6)))):
        joined = combine(*pair)
        assert joined.given_latents is given and joined.extra_end_frame


def test_embeds_that_do_not_go_together_are_named(vae, hearing):
    humo = embeds(vae, reference_images=pictures(1))
    with pytest.raises(ValueError, match=r"different videos.*\(16, 3, 4, 6\) and \(16, 4, 4, 6\)"):
        combine(humo, image_embeds(vae, 13))
    other = replace(image_embeds(vae), trailing_latents=1, latent_shape=(16, 4, 4, 6))
    with pytest.raises(ValueError, match="reference pictures at the same end"):
        combine(humo, other)
    talk = N["WanVideoImageToVideoMultiTalk"]().process(vae, 48, 32, 9, 1, False, "disabled")[0]
    for pair in ((humo, talk), (talk, humo)):
        with pytest.raises(ValueError, match="not in a loop"):
            combine(*pair)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("lufs", [-23.0, -14.5])
def test_loudness(channels, lufs):
    given = sound(1.0, 44100, channels)
    (louder,) = N["NormalizeAudioLoudness"]().normalize(given, lufs)
    assert louder["waveform"].shape == given["waveform"].shape and louder["sample_rate"] == 44100
    measured = pyloudnorm.Meter(44100).integrated_loudness(louder["waveform"][0].T.double().numpy())
    assert measured == pytest.approx(lufs, abs=1e-3)
    gain = louder["waveform"] / given["waveform"]
    assert (gain - gain.mean()).abs().max() < 1e-4 * gain.mean()


def test_silence_stays_and_short_sound_is_named():
    silence = {"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}
    assert torch.equal(N["NormalizeAudioLoudness"]().normalize(silence, -23.0)[0]["waveform"], silence["waveform"])
    with pytest.raises(ValueError, match=r"0\.20 s of sound in 1 channels cannot be measured .*at least 0\.4 s"):
        N["NormalizeAudioLoudness"]().normalize(sound(0.2), -23.0)
