"""LoRA files of every naming and kind, and what they are worth in float64, from the papers' formulas."""

import json

import torch
from safetensors.torch import save_file

# How files spell a layer of the model, as a function of its name.
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.o": "attn1.to_out.0", "cross_attn.k": "attn2.to_k", "ffn.0":
    "ffn.net.0.proj", "ffn.2": "ffn.net.2", "self_attn.norm_q": "attn1.norm_q", "norm3": "norm2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
}  # fmt: skip


def diffusers(layer):
    front, rest = ("", layer) if not layer.startswith("blocks.") else (layer[: layer.index(".", 7) + 1],
                                                                       layer[layer.index(".", 7) + 1 :])  # fmt: skip
    return front + DIFFUSERS[rest]


def flat(layer):
    return layer.replace(".", "_")


NAMINGS = {
    "kijai": lambda layer: f"diffusion_model.{layer}",
    "bare": lambda layer: layer,
    "comfyui checkpoint": lambda layer: f"model.diffusion_model.{layer}",
    "diffusers": lambda layer: f"transformer.{diffusers(layer)}",
    "diffusers without prefix": diffusers,
    "peft": lambda layer: f"base_model.model.{layer}",
    "peft of diffusers": lambda layer: f"base_model.model.{diffusers(layer)}",
    "diffsynth": lambda layer: f"pipe.dit.{layer}",
    "kohya": lambda layer: f"lora_unet__{flat(layer)}",
    "musubi": lambda layer: f"lora_unet_{flat(layer)}",
    "musubi of diffusers": lambda layer: f"lora_unet_{flat(diffusers(layer))}",
    "lycoris": lambda layer: f"lycoris_{flat(layer)}",
    "lycoris of diffusers": lambda layer: f"lycoris_{flat(diffusers(layer))}",
    "compiled": lambda layer: "diffusion_model._orig_mod." + layer,
}
PAIRS = {
    "A, B": (".lora_A.weight", ".lora_B.weight"),
    "down, up": (".lora_down.weight", ".lora_up.weight"),
    "adapter": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora.": (".lora.down.weight", ".lora.up.weight"),
    "linear layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "stand-in": ("_loras.down.weight", "_loras.up.weight"),
    "without weight": (".lora_A", ".lora_B"),
}


def randn(*shape, scale=0.3):
    return torch.randn(*shape) * scale


def pair(weight, rank):
    down, up = randn(rank, weight.shape[1]), randn(weight.shape[0], rank)
    return {".lora_A.weight": down, ".lora_B.weight": up}, up.double() @ down.double()


def pair_alpha(weight, rank):
    parts, delta = pair(weight, rank)
    return parts | {".alpha": torch.tensor(3.0)}, delta * 3 / rank


def convolution_pair(weight, rank):
    parts, delta = pair(weight, rank)
    return {key: value[..., None, None] for key, value in parts.items()}, delta


def mid(weight, rank):
    parts, core = pair(weight, rank)[0], randn(rank, rank)
    delta = parts[".lora_B.weight"].double() @ core.double() @ parts[".lora_A.weight"].double()
    return parts | {".lora_mid.weight": core, ".alpha": torch.tensor(2.0)}, delta * 2 / rank


def loha(weight, rank):
    shapes = {"w1_a": (weight.shape[0], rank), "w1_b": (rank, weight.shape[1])}
    shapes |= {"w2_a": shapes["w1_a"], "w2_b": shapes["w1_b"]}
    parts = {f".hada_{name}": randn(*shape) for name, shape in shapes.items()}
    a, b, c, d = (parts[f".hada_{name}"].double() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return parts | {".alpha": torch.tensor(2.0)}, (a @ b) * (c @ d) * 2 / rank


def loha_core(weight, rank):
    parts = {}
    for n in (1, 2):
        parts[f".hada_t{n}"] = randn(rank, rank, 1, 1)
        parts[f".hada_w{n}_a"], parts[f".hada_w{n}_b"] = randn(rank, weight.shape[0]), randn(rank, weight.shape[1])
    one, two = (
        parts[f".hada_w{n}_a"].double().T @ parts[f".hada_t{n}"].double()[..., 0, 0] @ parts[f".hada_w{n}_b"].double()
        for n in (1, 2)
    )
    return parts, one * two


def lokr_full(weight, rank):
    w1, w2 = randn(8, 4), randn(weight.shape[0] // 8, weight.shape[1] // 4)
    return {".lokr_w1": w1, ".lokr_w2": w2, ".alpha": torch.tensor(7.0)}, torch.kron(w1.double(), w2.double())


def lokr_factored(weight, rank):
    w1, a, b = randn(4, 8), randn(weight.shape[0] // 4, rank), randn(rank, weight.shape[1] // 8)
    delta = torch.kron(w1.double(), a.double() @ b.double()) * 2 / rank
    return {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(2.0)}, delta


def lokr_both(weight, rank):
    a, b = randn(8, 2), randn(2, 8)
    c, d = randn(weight.shape[0] // 8, rank), randn(rank, weight.shape[1] // 8)
    delta = torch.kron(a.double() @ b.double(), c.double() @ d.double()) * 2 / rank
    return {".lokr_w1_a": a, ".lokr_w1_b": b, ".lokr_w2_a": c, ".lokr_w2_b": d, ".alpha": torch.tensor(2.0)}, delta


def lokr_core(weight, rank):
    w1, core = randn(4, 4), randn(rank, rank, 1, 1)
    a, b = randn(rank, weight.shape[0] // 4), randn(rank, weight.shape[1] // 4)
    w2 = a.double().T @ core.double()[..., 0, 0] @ b.double()
    return {".lokr_w1": w1, ".lokr_t2": core, ".lokr_w2_a": a, ".lokr_w2_b": b}, torch.kron(w1.double(), w2)


def diff(weight, rank):
    value = randn(*weight.shape)
    return {".diff": value}, value.double()


def pair_and_diff(weight, rank):
    (parts, delta), (more, other) = pair_alpha(weight, rank), diff(weight, rank)
    return parts | more, delta + other


def dora_comfyui(weight, rank):
    parts, delta = pair_alpha(weight, rank)
    lengths = randn(weight.shape[0], 1).abs() + 0.5
    gain = lengths.double() / weight.double().norm(dim=1, keepdim=True)
    return parts | {".dora_scale": lengths}, gain * (weight.double() + delta) - weight.double()


def dora_columns(weight, rank):
    parts, delta = pair_alpha(weight, rank)
    lengths, total = randn(1, weight.shape[1]).abs() + 0.5, weight.double() + delta
    return parts | {".dora_scale": lengths}, lengths.double() / total.norm(dim=0, keepdim=True) * total - weight


def dora_peft(weight, rank):
    parts, delta = pair(weight, rank)
    lengths, total = randn(weight.shape[0]).abs() + 0.5, weight.double() + delta
    gain = lengths.double()[:, None] / total.norm(dim=1, keepdim=True)
    return parts | {".lora_magnitude_vector": lengths}, gain * total - weight


def dora_loha(weight, rank):
    parts, delta = loha(weight, rank)
    lengths = randn(weight.shape[0], 1).abs() + 0.5
    gain = lengths.double() / weight.double().norm(dim=1, keepdim=True)
    return parts | {".dora_scale": lengths}, gain * (weight.double() + delta) - weight.double()


KINDS = {
    make.__name__: make
    for make in (
        pair, pair_alpha, convolution_pair, mid, loha, loha_core, lokr_full, lokr_factored, lokr_both, lokr_core, diff,
        pair_and_diff, dora_comfyui, dora_columns, dora_peft, dora_loha,
    )
}  # fmt: skip


def peft_header(alpha, rank, **others):
    """What PEFT writes into the header of an adapter."""
    return {"lora_adapter_metadata": json.dumps({"r": rank, "lora_alpha": alpha, **others})}


def spelled(naming, layer, parts):
    return {NAMINGS[naming](layer) + suffix: value for suffix, value in parts.items()}


def save(path, tensors, metadata=None):
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata)
    return path
