"""Tiny models saved in the file formats, and under the file names, that saved graphs use."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from PIL import Image
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperModel
from wanvideo_wrapper.demo import INPUT, tiny
from wanvideo_wrapper.fp8_optimization import keeps_precision
from wanvideo_wrapper.humo.extension import HuMo
from wanvideo_wrapper.quantized.fp8 import quantize_rows
from wanvideo_wrapper.quantized.nvfp4 import quantize_nvfp4

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = Path(os.environ.get("WANVIDEO_GRAPHS", ROOT.parent / "shared" / "workflows"))
LIGHTX = "WanVideo/Lightx2v/lightx2v_{}_14B{}_cfg_step_distill_{}rank64_bf16{}.safetensors"
MORDOR = "one-does-not-simply-walk-into-mordor-its-black-gates-are-guarded-by-more-than-just-orcs.mp3"
Q8_0 = GGMLQuantizationType.Q8_0
HEARING = HuMo(features=8 * 5 * tiny.SPEECH_DIM, hidden_dim=32, context_tokens=16, output_dim=48)

# The graph of each test, what makes it small, and the frames of the video it must make. Only attention_mode, size,
# frames and steps may be set; MelBandRoFormer is bypassed.
GRAPH_RUNS = {
    "infinitetalk": (
        "*I2V_InfiniteTalk*03*.json",
        (
            "245.value=64", "246.value=64", "270.value=40", "WanVideoModelLoader.attention_mode=sdpa",
            "WanVideoSampler.steps=2", "WanVideoImageToVideoMultiTalk.frame_window_size=25",
        ),
        ("MelBandRoFormerSampler",),
        40,
    ),
    "video_to_video": (
        "*V2V_InfiniteTalk*02*.json",
        (
            "245.value=64", "246.value=64", "270.value=40", "WanVideoModelLoader.attention_mode=sdpa",
            "WanVideoImageToVideoMultiTalk.frame_window_size=25",
        ),
        ("MelBandRoFormerSampler",),
        40,
    ),
    "humo": (
        "*14B_HuMo_example_01.json",
        (
            "61.value=64", "62.value=64", "HuMoEmbeds.num_frames=9", "WanVideoModelLoader.attention_mode=sdpa",
            "WanVideoSampler.steps=2",
        ),
        ("MelBandRoFormerSampler",),
        9,
    ),
    "image_to_video": (
        "*I2V_example_03*.json",
        (
            "ImageResizeKJv2.width=64", "ImageResizeKJv2.height=64", "WanVideoImageToVideoEncode.num_frames=9",
            "WanVideoSampler.steps=2",
        ),
        (),
        9,
    ),
    "text_to_video": (
        "*T2V_example_03*.json",
        (
            "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=9",
            "WanVideoSampler.steps=2",
        ),
        (),
        9,
    ),
    "two_models_of_wan_2_2": (
        "*2_2_I2V_A14B_example*.json",
        (
            "22.attention_mode=sdpa", "71.attention_mode=sdpa", "68.width=64", "68.height=64",
            "WanVideoImageToVideoEncode.num_frames=9", "94.value=2", "91.value=1",
        ),
        (),
        9,
    ),
}  # fmt: skip


def save_gguf(model, path, *, form="Q8_0"):
    """Blocks where rows fill them, else float32; tensors of five dimensions as city96's converter has them."""
    kind = GGMLQuantizationType[form]
    block = GGML_QUANT_SIZES[kind][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "wan")
    for name, value in model.tensors.items():
        array = value.float().numpy()
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
            array = array.reshape(array.shape[0], -1)
            writer.add_tensor(name, array)
        elif array.ndim == 2 and array.shape[1] % block == 0:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    for field, value in model.metadata.items():
        writer.add_string(field, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantizable(name, value):
    """Whether files hold this weight in few bits."""
    return name.startswith("blocks.") and value.dim() == 2 and name.endswith(".weight") and not keeps_precision(name)


def save_nvfp4(model, path, *, header=False, mark=None, input_scale=None):
    """As ComfyUI saves it: marks as tensors, or in the header."""
    tensors, layers = {}, {}
    for name, value in model.tensors.items():
        layer = name.removesuffix(".weight")
        if not quantizable(name, value):
            tensors[name] = value.bfloat16()
            continue
        q = quantize_nvfp4(value)
        tensors |= {name: q.codes, f"{layer}.weight_scale": q.block_scale, f"{layer}.weight_scale_2": q.scale}
        if input_scale is not None:
            tensors[f"{layer}.input_scale"] = torch.tensor(input_scale)
        layers[layer] = {"format": "nvfp4"} | (mark or {})
        if not header:
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    metadata = dict(model.metadata)
    if header:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=metadata)


def save_comfy_fp8(model, path, *, input_scale, mark=None, dtype=torch.float8_e4m3fn):
    """FP8 as ComfyUI saves it, with a mark, a scale a layer and one of its activations."""
    tensors = {}
    for name, value in model.tensors.items():
        layer = name.removesuffix(".weight")
        if not quantizable(name, value):
            tensors[name] = value.bfloat16()
            continue
        scale = value.abs().max() / torch.finfo(dtype).max
        tensors |= {name: (value / scale).to(dtype), f"{layer}.weight_scale": scale,
                    f"{layer}.input_scale": torch.tensor(input_scale)}  # fmt: skip
        text = json.dumps({"format": str(dtype).removeprefix("torch.")} | (mark or {}))
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, path, metadata=model.metadata)


def save_fp8(model, path, *, scaled):
    """FP8 linears as published: plain, or with one scale a layer."""
    tensors = {}
    for name, value in model.tensors.items():
        layer = name.removesuffix(".weight")
        if name.startswith("blocks.") and value.dim() == 2 and not keeps_precision(layer):
            largest = quantize_rows(value, torch.float8_e4m3fn)[1].max() if scaled else torch.ones(())
            tensors[name] = (value / largest).to(torch.float8_e4m3fn)
            if scaled:
                tensors[f"{layer}.scale_weight"] = largest.reshape(1)
        else:
            tensors[name] = value.float() if "norm" in name or "modulation" in name else value.half()
    if scaled:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=model.metadata)


def fill(models, inputs, *, clip_dim=tiny.CLIP_DIM):
    """Everything that the graphs name, but for the CLIP vision encoder."""
    diffusion = models / "diffusion_models" / "WanVideo"
    i2v, t2v = tiny.image_to_video(clip_dim=clip_dim), tiny.transformer(in_dim=16)
    save_gguf(i2v, diffusion / "wan2.1-i2v-14b-480p-Q8_0.gguf")
    for place in ("InfiniteTalk", "InfiniteTalk/InfiniteTalk"):
        save_gguf(tiny.speech_module(), diffusion / place / "Wan2_1-InfiniteTalk_Single_Q8.gguf")
    save_fp8(i2v, diffusion / "Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors", scaled=False)
    save_fp8(t2v, diffusion / "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    for seed, noise in enumerate(("HIGH", "LOW")):
        model = tiny.transformer(in_dim=36, seed=seed)
        save_fp8(model, diffusion / f"2_2/Wan2_2-I2V-A14B-{noise}_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    humo = tiny.transformer(in_dim=36, extensions=(HEARING,))
    save_fp8(humo, diffusion / "HuMo/Wan2_1-HuMo-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    whisper().save(models / "audio_encoders/whisper_large_v3_encoder_fp16.safetensors", torch.float16)
    for place in ("wanvideo/", ""):
        tiny.vae().save(models / f"vae/{place}Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    tiny.wav2vec().save(models / "wav2vec2/wav2vec2-chinese-base_fp16.safetensors", torch.float16)
    downloaded = models / "transformers/TencentGameMate/chinese-wav2vec2-base/model.safetensors"
    tiny.wav2vec().save(downloaded, torch.float16)
    for name in (LIGHTX, LIGHTX.replace("WanVideo", "WanVid")):
        tiny.lora(i2v).save(models / "loras" / name.format("I2V", "_480p", "", ""))
    tiny.lora(t2v).save(models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    inputs.mkdir(exist_ok=True)
    with Image.open(INPUT / "portrait.png") as portrait:
        for name in ("woman.png", "oldman_upscaled.png"):
            portrait.save(inputs / name)
    for name in ("hush.mp3", MORDOR):
        (inputs / name).write_bytes((INPUT / "speech.wav").read_bytes())
    save_clip(inputs / "10.mp4")


def whisper(seed=7):
    """A Whisper encoder of four layers with random weights that hears pieces of four seconds."""
    torch.manual_seed(seed)
    model = WhisperModel(WhisperConfig(
        d_model=tiny.SPEECH_DIM, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=128, num_mel_bins=128,
        max_source_positions=200, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8, vocab_size=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    ))  # fmt: skip
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if name.startswith("encoder.")}
    return tiny.Tiny(tensors=tensors, metadata={"wanvideo.num_heads": "2"})


def save_clip(path, frames=30):
    """A picture that slides, shorter than the speech."""
    import av

    with Image.open(INPUT / "portrait.png") as portrait, av.open(str(path), "w") as container:
        pixels = np.asarray(portrait.convert("RGB").resize((96, 64)))
        stream = container.add_stream("libx264", rate=25, width=96, height=64, pix_fmt="yuv420p")
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, index, axis=1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
