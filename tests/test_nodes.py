"""Nodes on tiny models: what users connect, what they get, and what they are told."""

import logging
from types import SimpleNamespace

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.image_to_video.pictures import GivenFrames, encode_given, fold_mask
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.images import resize_images, to_images, to_video
from wanvideo_wrapper.wanvideo.modules.vae import WanVAE
from wanvideo_wrapper.wanvideo.request import TextEmbeds


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    before = get_host()
    models = tmp_path_factory.mktemp("models")
    tiny.image_to_video().save(models / "diffusion_models/i2v.safetensors")
    tiny.transformer(in_dim=16).save(models / "diffusion_models/t2v.safetensors")
    tiny.vae(base_dim=4).save(models / "vae/vae.safetensors")
    tiny.text_encoder().save(models / "text_encoders/t5.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip.safetensors")
    tiny.wav2vec().save(models / "wav2vec2/w.safetensors")
    host = StandaloneHost(models=models, device="cpu")
    set_host(host)
    yield host
    set_host(before)


@pytest.fixture(scope="module")
def vae(host):
    return N["WanVideoVAELoader"]().loadmodel("vae.safetensors", "fp32")[0]


def model(name="t2v.safetensors", **options):
    return N["WanVideoModelLoader"]().loadmodel(name, "fp32", "disabled", "offload_device", **options)[0]


def text():
    encode = N["WanVideoTextEncodeCached"]().process
    return encode("t5.safetensors", "fp32", "a person | a song", "bad", use_disk_cache=False)


def sample(given, embeds, **options):
    settings = dict(steps=2, cfg=1.0, shift=5.0, seed=1, force_offload=True, scheduler="euler", riflex_freq_index=0)
    settings |= {"text_embeds": text()[0], **options}
    return N["WanVideoSampler"]().process(given, embeds, **settings)


def naive_mask(frame_mask, extra_end):
    """[4, F, h, w] one entry at a time: latent 0 holds pixel 0 four times, latent i the pixels 4i-3..4i."""
    frames = len(frame_mask)
    latents = (frames - 1 - extra_end) // 4 + 1 + extra_end
    out = torch.empty(4, latents, *frame_mask.shape[1:])
    for slot in range(4):
        for latent in range(latents):
            index = 0 if latent == 0 else 4 * latent - 3 + slot
            out[slot, latent] = frame_mask[frames - 1 if extra_end and latent == latents - 1 else index]
    return out


@pytest.mark.parametrize("extra_end", [False, True])
def test_masks_fold_to_latent_frames(extra_end):
    frame_mask = (torch.rand(13 + extra_end, 2, 3) > 0.5).float()
    assert torch.equal(fold_mask(frame_mask, extra_end=extra_end), naive_mask(frame_mask, extra_end))


def pictures(count, seed=0):
    return torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("end_in_video", [True, False])
@pytest.mark.parametrize(("start", "end"), [(1, 0), (0, 1), (1, 1), (5, 0), (0, 0)])
def test_given_frames_are_where_they_belong(start, end, end_in_video, vae, monkeypatch):
    seen = []
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda video, **o: seen.append(video) or real(video, **o))
    given = GivenFrames(
        width=32, height=32, num_frames=9, start=pictures(start) if start else None,
        end=pictures(end, 1) if end else None, end_in_video=end_in_video,
    )  # fmt: skip
    cond, mask = encode_given(given, vae)
    extra = bool(start and end and not end_in_video)
    assert cond.shape == (16, 3 + extra, 4, 4) and mask.shape == (4, 3 + extra, 4, 4)
    video = torch.cat(seen, 1)
    assert video.shape[1] == 9 + extra
    if start:
        torch.testing.assert_close(video[:, :start], to_video(pictures(start)))
    if end:
        torch.testing.assert_close(video[:, -end:], to_video(pictures(end, 1)))
    assert video[:, start : video.shape[1] - end].abs().max() == 0
    frame_mask = torch.zeros(9 + extra, 4, 4)
    frame_mask[:start] = 1
    frame_mask[len(frame_mask) - end :] = 1
    assert torch.equal(mask, naive_mask(frame_mask, extra))


def test_temporal_mask_pad_picture_and_strengths(vae):
    mask = torch.zeros(9, 16, 16)
    mask[4:] = 1
    given = GivenFrames(width=32, height=32, num_frames=9, start=pictures(1), pad=pictures(1, 2), mask=mask)
    cond, folded = encode_given(given, vae)
    assert torch.equal(folded, naive_mask(mask[:, :4, :4], False))
    half = GivenFrames(**{**given.__dict__, "start_strength": 0.5, "end_strength": 2.0})
    scaled, _ = encode_given(half, vae)
    torch.testing.assert_close(scaled[:, 0], cond[:, 0] * 0.5)
    torch.testing.assert_close(scaled[:, -1], cond[:, -1] * 2)
    with pytest.raises(ValueError, match="12 pictures are given for a video of 9"):
        encode_given(GivenFrames(width=32, height=32, num_frames=9, start=pictures(12)), vae)


def test_picture_with_alpha_and_odd_sizes(vae, caplog):
    rgba = torch.rand(1, 50, 70, 4)
    with caplog.at_level(logging.INFO):
        (embeds,) = N["WanVideoImageToVideoEncode"]().process(70, 50, 11, 0.0, 1.0, 1.0, True, vae, start_image=rgba)
    assert embeds.latent_shape == (16, 3, 6, 8) and embeds.num_frames == 9
    assert "70x50 is rounded to 64x48" in caplog.text and "11 frames are rounded to 9" in caplog.text
    (encoded,) = N["WanVideoEncode"]().encode(vae, torch.rand(6, 50, 70, 4), False, 272, 272, 144, 128)
    assert encoded["samples"].shape == (1, 16, 2, 6, 8)


def test_noise_on_pictures_is_measured_in_their_range():
    """Pictures of 0..1 are encoded in -1..1, where the noise is twice as strong."""
    seen = []
    vae = SimpleNamespace(
        spatial_factor=8, managed=SimpleNamespace(release=lambda: None),
        encode=lambda video, tile: seen.append(video) or torch.zeros(16, 3, 4, 4),
    )  # fmt: skip
    pictures = torch.rand(9, 32, 32, 3)
    N["WanVideoEncode"]().encode(vae, pictures, False, 272, 272, 144, 128, noise_aug_strength=0.3)
    noise = (seen[0] + 1) / 2 - pictures.movedim(-1, 0)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)


def test_text_to_video_and_what_decoding_gives(vae):
    embeds = N["WanVideoEmptyEmbeds"]().process(32, 32, 9)[0]
    samples, denoised = sample(model(), embeds)
    assert samples["samples"].shape == denoised["samples"].shape == (1, 16, 3, 4, 4)
    decode = N["WanVideoDecode"]().decode
    (images,) = decode(vae, samples, False, 272, 272, 144, 128)
    assert images.shape == (9, 32, 32, 3) and images.min() >= 0 and images.max() <= 1
    (tiled,) = decode(vae, samples, True, 272, 272, 144, 128)
    torch.testing.assert_close(tiled, images)
    (stretched,) = decode(vae, samples, False, 272, 272, 144, 128, "minmax")
    assert stretched.min() == 0 and stretched.max() == 1
    (cut,) = decode(vae, {**samples, "extra_end_frame": True}, False, 272, 272, 144, 128)
    torch.testing.assert_close(cut, images[:5])
    (without,) = decode(vae, {**samples, "has_ref": 1}, False, 272, 272, 144, 128)
    assert without.shape[0] == 5
    video = torch.rand(3, 8, 8, 3) * 2 - 1
    torch.testing.assert_close(decode(vae, {"video": video}, False, 272, 272, 144, 128)[0], (video + 1) / 2)
    with pytest.raises(ValueError, match="overlap"):
        N["WanVideoDecode"].VALIDATE_INPUTS(True, 128, 272, 128, 128)


class WithoutModel(WanVAE):
    def __init__(self):
        self.managed = SimpleNamespace(release=lambda: None)


def test_a_vae_may_read_more_of_samples_than_latents():
    class Shaded(WithoutModel):
        def latents_of(self, samples):
            return torch.cat((samples["shade"][0], samples["samples"][0]))

        def decode(self, latents, *, tile=None, ranks=None):
            return latents[:3]

    samples = {"samples": torch.rand(1, 16, 3, 4, 4), "shade": torch.rand(1, 3, 3, 4, 4), "has_ref": 1}
    (images,) = N["WanVideoDecode"]().decode(Shaded(), samples, False, 272, 272, 144, 128)
    torch.testing.assert_close(images, (samples["shade"][0, :, 1:].movedim(0, -1) + 1) / 2)


@pytest.mark.parametrize("shade", [-1.0, 0.25])
def test_a_video_of_one_colour_has_no_range_to_stretch(shade):
    class OneColour(WithoutModel):
        def decode(self, latents, *, tile=None, ranks=None):
            return torch.full((3, 5, 8, 8), shade)

    samples = {"samples": torch.randn(1, 16, 2, 1, 1)}
    (images,) = N["WanVideoDecode"]().decode(OneColour(), samples, False, 272, 272, 144, 128, "minmax")
    torch.testing.assert_close(images, torch.full((5, 8, 8, 3), (shade + 1) / 2))


def test_image_to_video_needs_its_inputs(vae):
    i2v, t2v = model("i2v.safetensors"), model()
    (embeds,) = N["WanVideoImageToVideoEncode"]().process(32, 32, 9, 0.0, 1.0, 1.0, True, vae, start_image=pictures(1))
    empty = N["WanVideoEmptyEmbeds"]().process(32, 32, 9)[0]
    assert sample(i2v, embeds)[0]["samples"].isfinite().all()
    with pytest.raises(ValueError, match="text-to-video model, but encoded images"):
        sample(t2v, embeds)
    with pytest.raises(ValueError, match="encoded images besides the noise, but none"):
        sample(i2v, empty)
    with pytest.raises(ValueError, match="connect WanVideoVAELoader"):
        N["WanVideoImageToVideoEncode"]().process(32, 32, 9, 0.0, 1.0, 1.0, True)
    apart = {"samples": torch.rand(1, 16, 1, 4, 6)}
    with pytest.raises(ValueError, match=r"extra_latents are \(16, 1, 4, 6\).*16 channels of 4x4: encode them at 32"):
        N["WanVideoImageToVideoEncode"]().process(32, 32, 9, 0.0, 1.0, 1.0, True, vae, extra_latents=apart)
    with pytest.raises(ValueError, match="no negative prompt"):
        sample(t2v, empty, cfg=3.0, text_embeds=TextEmbeds(positive=text()[0].positive))


def test_settings_v2_and_scheduler_nodes_give_what_the_sampler_gives():
    given, embeds = model(), N["WanVideoEmptyEmbeds"]().process(32, 32, 9)[0]
    want = sample(given, embeds, cfg=[2.0, 1.5])[0]["samples"]
    settings = dict(steps=2, cfg=[2.0, 1.5], shift=5.0, seed=1, force_offload=True, riflex_freq_index=0)
    (collected,) = N["WanVideoSamplerSettings"]().process(
        model=given, image_embeds=embeds, scheduler="euler", text_embeds=text()[0], **settings
    )
    got = N["WanVideoSamplerFromSettings"]().process(collected)[0]["samples"]
    assert torch.equal(got, want)
    (schedule,) = N["WanVideoSchedulerv2"]().process("euler", 2, 5.0, 0, -1)
    (extra,) = N["WanVideoSamplerExtraArgs"]().process()
    got = N["WanVideoSamplerv2"]().process(
        given, embeds, [2.0, 1.5], 1, True, schedule, text_embeds=text()[0], extra_args=extra
    )[0]["samples"]
    assert torch.equal(got, want)
    sigmas, steps, shift, wired, start, end = N["WanVideoScheduler"]().process("euler", 2, 5.0, 0, -1)
    assert (len(sigmas), steps, shift, start, end) == (3, 2, 5.0, 0, -1)
    assert torch.equal(sample(given, embeds, cfg=[2.0, 1.5], scheduler=wired)[0]["samples"], want)


@pytest.mark.parametrize("name", ["slg_args", "experimental_args", "uni3c_embeds",
                                  "loop_args", "freeinit_args", "flowedit_args"])  # fmt: skip
def test_options_that_are_not_there_are_named(name):
    embeds = N["WanVideoEmptyEmbeds"]().process(32, 32, 9)[0]
    with pytest.raises(ValueError, match=f"input '{name}' of the sampler got a dict, which this version cannot use"):
        sample(None, embeds, **{name: {"any": 1}})


def test_loader_options_that_are_not_there_are_named(host):
    with pytest.raises(ValueError, match="input 'extra_model' of the model loader got a object"):
        model(extra_model=object())
    with pytest.raises(ValueError, match="attention_mode 'sageattn' cannot run"):
        model(attention_mode="sageattn")
    with pytest.raises(FileNotFoundError, match=r"no model file 'gone\.safetensors'"):
        model("gone.safetensors")
    with pytest.raises(ValueError, match="scheduler 'ddim' is not available"):
        sample(model(), N["WanVideoEmptyEmbeds"]().process(32, 32, 9)[0], scheduler="ddim")


def test_text_nodes_and_the_disk_cache(host, monkeypatch):
    both, negative, prompt = text()
    assert len(both.positive) == 2 and len(both.negative) == 1 and prompt == "a person | a song"
    assert torch.equal(negative.positive[0], both.negative[0])
    (t5,) = N["LoadWanVideoT5TextEncoder"]().loadmodel("t5.safetensors", "fp32")
    (direct,) = N["WanVideoTextEncode"]().process("a person | a song", "bad", t5)
    assert all(torch.equal(a, b) for a, b in zip(direct.positive, both.positive, strict=True))
    (single,) = N["WanVideoTextEncodeSingle"]().process("a person", t5, use_disk_cache=True)
    # Alone or among other prompts: the same up to the order of sums, which depends on the threads.
    torch.testing.assert_close(single.positive[0], both.positive[0])
    assert single.negative == ()
    (direct_encoder,) = N["LoadWanVideoT5TextEncoder"]().loadmodel("t5.safetensors", "fp32")
    calls = []
    monkeypatch.setattr(t5, "encode", lambda prompts, **o: calls.append(prompts))
    (again,) = N["WanVideoTextEncodeSingle"]().process("a person", t5, use_disk_cache=True)
    assert torch.equal(again.positive[0], single.positive[0]) and calls == []
    N["WanVideoTextEncode"]().process("a person", "bad", direct_encoder, use_disk_cache=True)
    (offline,) = N["WanVideoTextEncode"]().process("a person", "bad", None, use_disk_cache=True)
    assert torch.equal(offline.positive[0], single.positive[0])
    assert torch.equal(offline.negative[0], both.negative[0])
    cached = N["WanVideoTextEncodeCached"]()
    monkeypatch.setattr("wanvideo_wrapper.nodes_text.load_text_encoder", lambda *a, **o: pytest.fail("loaded again"))
    again = cached.process("t5.safetensors", "fp32", "a person", "bad")[0]
    assert torch.equal(again.positive[0], single.positive[0])
    with pytest.raises(ValueError, match="connect a text encoder"):
        N["WanVideoTextEncode"]().process("never seen", "", None, use_disk_cache=True)


def test_text_of_comfyui():
    positive, negative = torch.randn(1, 512, 8), torch.randn(1, 512, 8)
    (embeds,) = N["WanVideoTextEmbedBridge"]().process([[positive, {}]], [[negative, {}]])
    assert torch.equal(embeds.positive[0], positive[0]) and torch.equal(embeds.negative[0], negative[0])
    assert N["WanVideoTextEmbedBridge"]().process([[positive, {}]])[0].negative == ()


@pytest.mark.parametrize("how", ["average", "sum", "concat", "batch"])
def test_clip_features_combine(how):
    features = {3: torch.randn(1, 5, 8), 4: torch.randn(1, 5, 8)}
    clip = SimpleNamespace(
        encode_image=lambda images, crop: SimpleNamespace(penultimate_hidden_states=features[images.shape[1]])
    )
    got = N["WanVideoClipVisionEncode"]().process(
        clip, torch.rand(1, 3, 3, 3), 2.0, 0.5, "center", how, True, torch.rand(1, 4, 4, 4), torch.rand(1, 4, 4, 3)
    )[0]
    parts = (features[3] * 2, features[4] * 0.5)
    want = {"average": sum(parts) / 2, "sum": sum(parts), "concat": torch.cat(parts, 1), "batch": torch.cat(parts)}
    torch.testing.assert_close(got.positive, want[how])
    assert isinstance(got, ClipImage) and torch.equal(got.negative, features[4])


def test_speech_nodes(host):
    (wav2vec,) = N["Wav2VecModelLoader"]().loadmodel("w.safetensors", "fp32", "main_device")
    sound = {"waveform": torch.randn(1, 2, 44100) * 0.1, "sample_rate": 44100}
    embeds, mixed, frames = N["MultiTalkWav2VecEmbeds"]().process(wav2vec, sound, True, 100, 25.0, 0.8, 2.0, "para")
    assert frames == embeds.num_frames == 25 and (embeds.scale, embeds.cfg_scale) == (0.8, 2.0)
    assert mixed["sample_rate"] == 16000 and mixed["waveform"].shape == (1, 1, 16000)
    (silent,) = N["MultiTalkSilentEmbeds"]().process(30, wav2vec)
    assert silent.num_frames == 30 and silent.window(Window((), tuple(range(9)))).audio.isfinite().all()
    with pytest.raises(ValueError, match="connect Wav2VecModelLoader"):
        N["MultiTalkSilentEmbeds"]().process(30)
    with pytest.raises(ValueError, match="no samples"):
        empty = {"waveform": torch.zeros(1, 1, 0), "sample_rate": 16000}
        N["MultiTalkWav2VecEmbeds"]().process(wav2vec, empty, True, 100, 25.0, 1.0, 1.0, "para")


def test_downloads_happen_only_where_the_file_is_absent(host, monkeypatch):
    node, asked = N["DownloadAndLoadWav2VecModel"](), []

    def download(repository, name, *, revision, local_dir):
        asked.append((repository, name, revision))
        tiny.wav2vec().save(local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for _ in range(2):
        node.loadmodel("TencentGameMate/chinese-wav2vec2-base", "fp32", "main_device")
    assert asked == [("TencentGameMate/chinese-wav2vec2-base", "model.safetensors", "refs/pr/1")]


def test_cfg_schedules():
    process = N["CreateCFGScheduleFloatList"]().process
    assert process(5, 5.0, 1.0, "linear", 0.0, 1.0)[0] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert process(6, 2.0, 2.0, "linear", 0.0, 0.01)[0] == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert process(10, 4.0, 2.0, "ease_in", 0.2, 0.5)[0] == [1.0, 1.0, 4.0, 3.78, 3.11, 2.0, 1.0, 1.0, 1.0, 1.0]


def test_schedules_of_other_values():
    process = N["CreateScheduleFloatList"]().process
    assert process(5, 1.0, 0.0, 0.5, "linear", 0.0, 1.0)[0] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert process(8, 0.0, 1.0, 0.25, "ease_out", 0.25, 0.75)[0] == [0.25, 0.25, 0.0, 0.44, 0.75, 0.94, 1.0, 0.25]
    assert process(4, 3.0, 3.0, 9.0, "linear", 0.01, 0.5)[0] == [9.0, 3.0, 3.0, 9.0]


def test_a_batch_is_encoded_picture_by_picture(vae):
    images = torch.rand(3, 50, 70, 4)
    tiles = (False, 272, 272, 144, 128)
    (batch,) = N["WanVideoEncodeLatentBatch"]().encode(vae, images, *tiles)
    alone = [N["WanVideoEncode"]().encode(vae, image[None], *tiles)[0]["samples"] for image in images]
    assert batch["samples"].shape == (3, 16, 1, 6, 8)
    torch.testing.assert_close(batch["samples"], torch.cat(alone))
    (tiled,) = N["WanVideoEncodeLatentBatch"]().encode(vae, images, True, 64, 64, 32, 32)
    alone = N["WanVideoEncode"]().encode(vae, images[2:], True, 64, 64, 32, 32)[0]["samples"]
    torch.testing.assert_close(tiled["samples"][2:], alone)
    with pytest.raises(ValueError, match="overlap"):
        N["WanVideoEncodeLatentBatch"].VALIDATE_INPUTS(True, 128, 272, 128, 128)


def test_frames_of_the_talking_loop():
    video = torch.rand(3, 8, 8, 3) * 2 - 1
    images, path = N["WanVideoPassImagesFromSamples"]().decode({"video": video, "output_path": "here"})
    torch.testing.assert_close(images, (video + 1) / 2)
    assert path == "here"
    with pytest.raises(ValueError, match="hold no frames"):
        N["WanVideoPassImagesFromSamples"]().decode({"samples": video})


@pytest.mark.parametrize("method", ["lanczos", "bicubic", "bilinear", "nearest-exact", "area"])
def test_pictures_keep_flat_colours_when_resized(method):
    flat = torch.tensor([0.2, 0.6, 1.0]).expand(2, 20, 30, 3)
    got = resize_images(flat, 17, 11, method)
    assert got.shape == (2, 11, 17, 3) and (got - flat[:, :11, :17]).abs().max() < 1 / 255
    same = resize_images(flat, 30, 20, method)
    assert same is flat


def test_pictures_and_video_are_each_others_inverse():
    images = torch.rand(2, 4, 6, 4)
    torch.testing.assert_close(to_images(to_video(images)), images[..., :3])


class Causal(WithoutModel):
    """A VAE whose frames show their latent and a tenth of the one before; the first of a video has none before it."""

    def decode(self, latents, *, tile=None, ranks=None):
        colour = latents[0, :, 0, 0]
        seen = colour + 0.1 * torch.cat((torch.zeros(1), colour[:-1]))
        counts = torch.tensor([1] + [4] * (len(colour) - 1))
        return seen.repeat_interleave(counts)[None, :, None, None].expand(3, -1, 2, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_looped_video_is_decoded_as_a_ring(count):
    """Four frames of every latent, each with the one before it, the last one before the first."""
    colour = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 0.5 - 0.25
    samples = {"samples": colour[None, None, :, None, None].expand(1, 16, -1, 2, 2)}
    decode = N["WanVideoDecode"]().decode
    (ring,) = decode(Causal(), {**samples, "looped": True}, False, 272, 272, 144, 128)
    want = (colour + 0.1 * colour.roll(1) + 1) / 2
    torch.testing.assert_close(ring[:, 0, 0, 0], want.repeat_interleave(4))
    (line,) = decode(Causal(), {**samples, "looped": False}, False, 272, 272, 144, 128)
    assert len(line) == 4 * (count - 1) + 1
