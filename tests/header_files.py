"""Small model files, and what a reader of them may do: everything that a loader asks, or one sentence."""

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.families import kind_of

NAMES = ("blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight_scale", "blocks.0.norm.bias", "scaled_fp8")


def tensors():
    return {
        NAMES[0]: torch.randn(6, 4).to(torch.float8_e4m3fn), NAMES[1]: torch.rand(6, 1),
        NAMES[2]: torch.randn(4).half(), NAMES[3]: torch.zeros(2).to(torch.float8_e4m3fn),
    }  # fmt: skip


def small_files(folder):
    """The bytes of one file of each format, by its name's ending."""
    save_file(tensors(), folder / "m.safetensors", metadata={"format": "pt", "_quantization_metadata": "{}"})
    writer = GGUFWriter(folder / "m.gguf", "wan")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cd"])
    writer.add_array("comfy.gguf.orig_shape.patch", [2, 4, 1, 2, 2])
    writer.add_uint32("general.alignment", 32)
    writer.add_tensor("patch", np.random.rand(2, 16).astype("float32"))
    writer.add_tensor("layer.weight", np.random.randint(0, 255, (4, 34), "uint8"), raw_dtype=8)
    writer.add_tensor("layer.bias", np.random.rand(4).astype("float16"))
    for call in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, call)()
    return {kind: (folder / f"m.{kind}").read_bytes() for kind in ("safetensors", "gguf")}


def opened(path):
    """Everything that any loader does with a header, and every tensor; or the sentence that came instead."""
    try:
        checkpoint = open_checkpoint(path)
        kind_of(checkpoint.shapes)
        return {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    except ValueError as error:
        message = str(error)
        assert path.name in message and "\n" not in message and message.endswith("."), message
        return None
