"""The full talking-video case that this project began with, at tiny widths: one merged checkpoint named as its users'
file, 81 frames at 8 fps, 6 steps, CFG 1, through the public nodes."""

import sys
from pathlib import Path

import attention_stand_ins
import numpy as np
import pytest
import sage3_stand_in
import torch
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.multitalk.loop import talk_kind
from wanvideo_wrapper.wanvideo.request import TextEmbeds

CHECKPOINT = "eedy_Wan2_IceCannon2.1_InfiniteTalk.safetensors"
FRAMES, FPS, STEPS, LAYERS = 81, 8.0, 6, 3
BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base, speech = tiny.image_to_video(), tiny.speech_module()
    (folder / "diffusion_models").mkdir()
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in (base.tensors | speech.tensors).items()},
        folder / "diffusion_models" / CHECKPOINT,
        metadata=base.metadata,
    )
    tiny.vae(base_dim=4).save(folder / "vae/vae.safetensors")
    tiny.wav2vec().save(folder / "wav2vec2/w.safetensors")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def host(request, models, tmp_path):
    before = get_host()
    host = StandaloneHost(models=models, outputs=tmp_path, device=request.param)
    set_host(host)
    yield host
    set_host(before)


def talk(quantization, attention, size):
    """Frames [81, size, size, 3] in 0..1, the sampler's output, and the speech nodes' frame count."""
    precision = "fp32" if get_host().device().type == "cpu" else "bf16"
    (model,) = N["WanVideoModelLoader"]().loadmodel(
        CHECKPOINT, precision, "offload_device", quantization, attention_mode=attention
    )
    assert talk_kind(model) == "infinitetalk"
    (vae,) = N["WanVideoVAELoader"]().loadmodel("vae.safetensors", precision)
    (wav2vec,) = N["Wav2VecModelLoader"]().loadmodel("w.safetensors", "fp32", "main_device")
    rng = np.random.default_rng(7)
    sound = {"waveform": torch.from_numpy(rng.standard_normal((1, 2, 44100 * 11)) * 0.1).float(), "sample_rate": 44100}
    speech, heard, count = N["MultiTalkWav2VecEmbeds"]().process(wav2vec, True, FPS, FRAMES, sound, 1.0, 1.0, "para")
    assert heard["waveform"].shape[-1] == FRAMES * 16000 / FPS
    generator = torch.Generator().manual_seed(1)
    clip = ClipImage(positive=torch.randn(1, 257, tiny.CLIP_DIM, generator=generator))
    embeds, _ = N["WanVideoImageToVideoMultiTalk"]().process(
        vae, size, size, FRAMES, 25, False, "disabled", torch.rand(1, size, size, 3, generator=generator),
        clip_embeds=clip, mode="auto",
    )  # fmt: skip
    text = TextEmbeds(positive=(torch.randn(6, tiny.TEXT_DIM, generator=generator),))
    samples, _ = N["WanVideoSampler"]().process(
        model, embeds, 11.0, STEPS, 1.0, 42, "dpm++_sde", 0, text_embeds=text, multitalk_embeds=speech
    )
    (images,) = N["WanVideoDecode"]().decode(vae, samples, False, 272, 272, 144, 128)
    return images, count


@pytest.mark.parametrize(
    ("quantization", "attention"), [("disabled", "sdpa"), ("fp8_e4m3fn", "sdpa"), ("fp4_scaled", "sageattn_3_fp4")]
)
def test_full_case(host, quantization, attention, monkeypatch, tmp_path):
    widgets = N["WanVideoModelLoader"].INPUT_TYPES()
    assert quantization in widgets["required"]["quantization"][0]
    assert attention in widgets["optional"]["attention_mode"][0]
    size = 64 if host.device().type == "cpu" else 768
    stands_in = attention == "sageattn_3_fp4" and not BLACKWELL
    if stands_in:
        # Its scores are a whole matrix.
        size = min(size, 256)
        with pytest.raises(ValueError, match="'sageattn_3_fp4' cannot run because it needs"):
            talk(quantization, attention, size)
        attention_stand_ins.install(monkeypatch)
        attention_stand_ins.pretend(monkeypatch, (12, 0))
        (tmp_path / "sageattn3.py").write_text("from sage3_stand_in import sageattn3_blackwell\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), str(Path(sage3_stand_in.__file__).parent), *sys.path])
        sage3_stand_in.calls.clear()
    images, count = talk(quantization, attention, size)
    assert count == FRAMES and images.shape == (FRAMES, size, size, 3)
    assert images.isfinite().all() and images.flatten(1).std(dim=1).min() > 0.01
    if stands_in:
        tokens = ((FRAMES - 1) // 4 + 1) * (size // 16) ** 2
        assert set(sage3_stand_in.calls) == {(1, 2, tokens, 64)} and len(sage3_stand_in.calls) == STEPS * LAYERS
    if size == 64:
        assert torch.equal(images, talk(quantization, attention, size)[0])
