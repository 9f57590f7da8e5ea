"""Tiny models in the storages that ComfyUI and LightX2V write, and what the layers of such a file are worth."""

import json
from dataclasses import replace

import torch
from comfy_kitchen import quantize_w4a8_int8_weight
from safetensors.torch import save_file
from saved_models import quantizable
from wanvideo_wrapper.quantized.int4 import Int4Linear, Int4MatmulLinear
from wanvideo_wrapper.quantized.int8 import Int8Linear, Int8MatmulLinear
from wanvideo_wrapper.quantized.mxfp8 import Mxfp8Linear
from wanvideo_wrapper.quantized.w4a8 import W4a8, W4a8Linear, W4a8MatmulLinear


def mark(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def mxfp8(weight):
    layer = Mxfp8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.weight_scale, "comfy_quant": mark(format="mxfp8")}


def int8(weight):
    layer = Int8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.scale_weight, "comfy_quant": mark(format="int8_tensorwise")}


def int8_of_one_scale(weight):
    scale = weight.abs().max() / 127
    layer = Int8Linear((weight / scale).round().to(torch.int8), scale, None)
    return layer, {"weight_scale": scale, "comfy_quant": mark(format="int8_tensorwise")}


def int8_rotated(weight):
    layer = Int8Linear.quantize(weight, None, 64)
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    return layer, {"weight_scale": layer.scale_weight, "comfy_quant": mark(**settings)}


def int8_of_lightx2v(weight):
    layer = Int8Linear.quantize(weight, None)
    return layer, {"weight_scale": layer.scale_weight}


def int4(weight, activations="int4"):
    layer = Int4Linear.quantize(weight, None, 64)
    settings = {"format": "convrot_w4a4", "convrot_groupsize": 64, "quant_group_size": 64}
    if activations == "int8":
        settings = {"format": "convrot_w4a4", "params": {"convrot_groupsize": 64, "linear_dtype": "int8"}}
    return layer, {"weight_scale": layer.scale_weight.flatten(), "comfy_quant": mark(**settings)}


def int4_of_int8_products(weight):
    return int4(weight, "int8")


def w4a8(weight, **options):
    codes, rel, row, correction, book = quantize_w4a8_int8_weight(weight, 16, 64, **options)
    layer = W4a8Linear(W4a8(codes, rel, row, book, correction, 16, 64), None)
    found = {"weight_s_rel": rel, "weight_s_channel": row, "weight_codebook": book, "weight_correction": correction}
    settings = {"format": "asym_w4a8_int8", "convrot": True, "convrot_groupsize": 64, "group_size": 16}
    return layer, {name: t for name, t in found.items() if t is not None} | {"comfy_quant": mark(**settings)}


def w4a8_of_bytes(weight):
    layer, beside = w4a8(weight)
    return layer, beside | {"weight_s_rel": beside["weight_s_rel"].view(torch.uint8)}


def w4a8_with_correction(weight):
    return w4a8(weight, symmetric=False)


def w6a8(weight):
    return w4a8(weight, bits=6)


# What a file holds -> how it is made, what `inspect` calls it, its layer under a fast option on a CPU.
STORAGES = {
    "mxfp8": (mxfp8, "MXFP8", Mxfp8Linear),
    "int8": (int8, "INT8", Int8MatmulLinear),
    "int8 of one scale": (int8_of_one_scale, "INT8", Int8MatmulLinear),
    "int8 rotated": (int8_rotated, "INT8 rotated", Int8MatmulLinear),
    "int8 of LightX2V": (int8_of_lightx2v, "INT8", Int8MatmulLinear),
    "int4": (int4, "INT4 rotated", Int4MatmulLinear),
    "int4 of int8 products": (int4_of_int8_products, "INT4 rotated", Int4MatmulLinear),
    "w4a8": (w4a8, "W4A8", W4a8MatmulLinear),
    "w4a8 of bytes": (w4a8_of_bytes, "W4A8", W4a8MatmulLinear),
    "w4a8 with correction": (w4a8_with_correction, "W4A8", W4a8MatmulLinear),
    "w6a8": (w6a8, "W6A8", W4a8MatmulLinear),
}


def save(model, path, make, *, chosen=quantizable):
    """Saves the file; returns the model with the values that it holds. chosen: whether a tensor is stored so."""
    tensors, exact = {}, {}
    for name, value in model.tensors.items():
        tensors[name] = exact[name] = value.float() if value.is_floating_point() else value
        if chosen(name, value):
            if (made := make(value.float())) is None:
                continue
            layer, beside = made
            tensors |= {name: layer.weight.detach()}
            tensors |= {f"{name.removesuffix('.weight')}.{leaf}": t.detach() for leaf, t in beside.items()}
            exact[name] = layer.expanded(torch.float32)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=model.metadata)
    return replace(model, tensors=exact)
