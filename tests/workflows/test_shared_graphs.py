"""Saved graphs of real users, run headless to a video with tiny models under the very file names that they use.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import os
from pathlib import Path

import av
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from PIL import Image
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.fp8_optimization import keeps_precision, quantise_rows
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = Path(os.environ.get("WANVIDEO_GRAPHS", ROOT.parent / "shared" / "workflows"))
LIGHTX = "WanVideo/Lightx2v/lightx2v_{}_14B{}_cfg_step_distill_{}rank64_bf16{}.safetensors"

pytestmark = pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")


def save_gguf(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "wan")
    for name, value in model.tensors.items():
        array = value.float().numpy()
        writer.add_tensor(f"{name}", array, raw_dtype=None) if array.ndim != 2 or array.shape[1] % 32 else (
            writer.add_tensor(
                name, quants.quantize(array, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
            )
        )
    for name, value in model.tensors.items():
        if value.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_fp8(model, path, *, scaled):
    tensors = {}
    for name, value in model.tensors.items():
        layer = name.removesuffix(".weight")
        if name.startswith("blocks.") and value.dim() == 2 and not keeps_precision(layer):
            quantised, scale = quantise_rows(value, torch.float8_e4m3fn)
            if scaled:
                # One scale a tensor, as the published files have it.
                largest = scale.max()
                tensors[name] = (value / largest).to(torch.float8_e4m3fn)
                tensors[f"{layer}.scale_weight"] = largest.reshape(1)
            else:
                tensors[name] = value.to(torch.float8_e4m3fn)
        else:
            tensors[name] = value.float() if "norm" in name or "modulation" in name else value.half()
    if scaled:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=model.metadata)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model and input folders with everything that the graphs name."""
    models, inputs = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("input")
    diffusion = models / "diffusion_models" / "WanVideo"
    i2v = tiny.image_to_video()
    save_gguf(i2v, diffusion / "wan2.1-i2v-14b-480p-Q8_0.gguf")
    for folder in ("InfiniteTalk", "InfiniteTalk/InfiniteTalk"):
        save_gguf(tiny.speech_module(), diffusion / folder / "Wan2_1-InfiniteTalk_Single_Q8.gguf")
    save_fp8(i2v, diffusion / "Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors", scaled=False)
    t2v = tiny.transformer(in_dim=16)
    save_fp8(t2v, diffusion / "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    for noise in ("HIGH", "LOW"):
        model = tiny.transformer(in_dim=36, seed=len(noise))
        save_fp8(model, diffusion / f"2_2/Wan2_2-I2V-A14B-{noise}_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    tiny.vae().save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    tiny.wav2vec().save(models / "wav2vec2/wav2vec2-chinese-base_fp16.safetensors", torch.float16)
    tiny.wav2vec().save(
        models / "transformers/TencentGameMate/chinese-wav2vec2-base/model.safetensors", torch.float16
    )
    tiny.lora(i2v).save(models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    tiny.lora(t2v).save(models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))

    with Image.open(INPUT / "portrait.png") as portrait:
        for name in ("woman.png", "oldman_upscaled.png"):
            portrait.save(inputs / name)
    sound = (INPUT / "speech.wav").read_bytes()
    for name in ("hush.mp3",):
        (inputs / name).write_bytes(sound)
    return models, inputs


def run(graph, folders, out, *options):
    before = get_host()
    models, inputs = folders
    found = sorted(GRAPHS.glob(graph))
    if not found:
        pytest.skip(f"no graph {graph} in {GRAPHS}")
    arguments = ["run", str(found[0]), "--models", str(models), "--input", str(inputs), "--out", str(out)]
    try:
        return main([*arguments, "--device", "cpu", *options])
    finally:
        set_host(before)


def video(out, frames, *, sound):
    (path,) = out.rglob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert sum(1 for _ in container.decode(stream)) == frames
        assert bool(container.streams.audio) == sound
        assert {"prompt", "workflow"} <= set(container.metadata)
    return path


SMALL = ("--set", "ImageResizeKJv2.width=64", "--set", "ImageResizeKJv2.height=64")


@pytest.mark.slow
def test_infinitetalk(folders, tmp_path):
    status = run(
        "*I2V_InfiniteTalk*03*.json", folders, tmp_path, "--bypass", "MelBandRoFormerSampler",
        "--set", "245.value=64", "--set", "246.value=64", "--set", "270.value=40",
        "--set", "WanVideoModelLoader.attention_mode=sdpa", "--set", "WanVideoSampler.steps=2",
        "--set", "WanVideoImageToVideoMultiTalk.frame_window_size=25",
    )  # fmt: skip
    assert status == 0
    video(tmp_path, 40, sound=True)


@pytest.mark.slow
def test_image_to_video(folders, tmp_path):
    sizes = (*SMALL, "--set", "WanVideoImageToVideoEncode.num_frames=9", "--set", "WanVideoSampler.steps=2")
    assert run("*I2V_example_03*.json", folders, tmp_path, *sizes) == 0
    video(tmp_path, 9, sound=False)


@pytest.mark.slow
def test_text_to_video(folders, tmp_path):
    sizes = [f"WanVideoEmptyEmbeds.{name}" for name in ("width=64", "height=64", "num_frames=9")]
    edits = [part for size in (*sizes, "WanVideoSampler.steps=2") for part in ("--set", size)]
    assert run("*T2V_example_03*.json", folders, tmp_path, *edits) == 0
    video(tmp_path, 9, sound=False)


@pytest.mark.slow
def test_two_models_of_wan_2_2(folders, tmp_path):
    edits = [
        "22.attention_mode=sdpa", "71.attention_mode=sdpa", "68.width=64", "68.height=64",
        "WanVideoImageToVideoEncode.num_frames=9", "94.value=2", "91.value=1",
    ]  # fmt: skip
    options = [part for edit in edits for part in ("--set", edit)]
    assert run("*2_2_I2V_A14B*.json", folders, tmp_path, *options) == 0
    video(tmp_path, 9, sound=False)
