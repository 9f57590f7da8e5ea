"""One forward of the transformer, as a step of a sampler runs it, beside diffusers and its own best primitives.

The time of a block is the difference of two models that differ in blocks, so that every size fits any card; a forward
is all its blocks. What a forward has once (embeddings, head) is below one percent at 480p.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import GridAttention
from ..host import Host
from ..quiet_imports import kernels_hidden
from ..wanvideo.compilation import CompileArgs, compiled
from ..wanvideo.loading import WanVideoModel
from ..wanvideo.quantization import QUANTIZATIONS
from .clock import Call, milliseconds, seconds
from .random_model import DTYPE, PROMPT_TOKENS, Case, inputs_of, load
from .report import Row

FEW, MORE = 1, 3
E4M3 = torch.float8_e4m3fn

Peer = Callable[[Case, int, bool, Host, ExitStack], Call]


def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """This project, diffusers where it has the model, and the floor. Raises ValueError for what cannot run here."""
    layers = case.config.num_layers
    peers = {"this project": _ours} | ({} if case.speakers else {"diffusers, bfloat16": _diffusers})
    blocks = {name: _seconds_a_block(peer, case, options.compile, host) for name, peer in peers.items()}
    blocks["sum of the best primitives"] = _floor(case, host)
    own = blocks["this project"]
    return [
        Row(name, {"s a forward": block * layers, "ms a block": block * 1000, "times as long": block / own})
        for name, block in blocks.items()
    ]


def _seconds_a_block(peer: Peer, case: Case, compile: bool, host: Host) -> float:
    with ExitStack() as stack, torch.no_grad():
        calls = {str(blocks): peer(case, blocks, compile, host, stack) for blocks in (FEW, MORE)}
        times = seconds(calls, host.device())
    return (times[str(MORE)] - times[str(FEW)]) / (MORE - FEW)


def _ours(case: Case, blocks: int, compile: bool, host: Host, stack: ExitStack) -> Call:
    loaded = load(case, blocks, host)
    inputs = inputs_of(case, host.device())
    transformer = stack.enter_context(loaded.active(loaded.work(case.latent_size, 1)))
    stack.enter_context(compiled(transformer.stacks().values(), CompileArgs(fullgraph=True) if compile else None))
    return lambda: transformer(inputs)


def _diffusers(case: Case, blocks: int, compile: bool, host: Host, stack: ExitStack) -> Call:
    with kernels_hidden("diffusers"):
        from diffusers import WanTransformer3DModel

    config, device = case.config, host.device()
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, in_channels=config.in_dim,
            out_channels=config.out_dim, text_dim=config.text_dim, ffn_dim=config.ffn_dim, num_layers=blocks,
        )  # fmt: skip
    model = model.to_empty(device=device).to(DTYPE).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.rope = type(model.rope)(config.head_dim, config.patch_size, 1024).to(device)
    if compile:
        for block in model.blocks:
            block.compile()
    inputs = inputs_of(case, device)
    text = F.pad(inputs.text[0], (0, 0, 0, config.text_len - PROMPT_TOKENS))[None]
    return lambda: model(inputs.latents.to(DTYPE), inputs.timestep, text, return_dict=False)


def _floor(case: Case, host: Host) -> float:
    """Seconds that the products and attentions of a block take alone, on operands that are there already."""
    config, device = case.config, host.device()
    wide, inner = config.dim, config.ffn_dim
    product = _fp8_product if QUANTIZATIONS[case.quantization].fast and device.type == "cuda" else _product
    tokens, words = case.tokens, config.text_len
    with torch.no_grad():
        calls: dict[str, tuple[int, Call]] = {
            "projection": (6, product(tokens, wide, wide, device)),
            "projection of the prompt": (2, product(words, wide, wide, device)),
            "up": (1, product(tokens, wide, inner, device)),
            "down": (1, product(tokens, inner, wide, device)),
            "self-attention": (1, _self_attention(load(case, 1, host), case, device)),
            "cross-attention": (1, _attention(config.num_heads, config.head_dim, tokens, words, device)),
        }
        times = milliseconds({name: call for name, (_, call) in calls.items()}, device)
    return sum(count * times[name] for name, (count, _) in calls.items()) / 1000


def _product(rows: int, columns: int, features: int, device: torch.device) -> Call:
    x, weight = (torch.randn(n, columns, device=device, dtype=DTYPE) for n in (rows, features))
    return lambda: F.linear(x, weight)


def _fp8_product(rows: int, columns: int, features: int, device: torch.device) -> Call:
    x, weight = (torch.randn(n, columns, device=device).to(E4M3) for n in (rows, features))
    of_rows, of_features = torch.ones(rows, 1, device=device), torch.ones(1, features, device=device)
    return lambda: torch._scaled_mm(
        x, weight.t(), scale_a=of_rows, scale_b=of_features, out_dtype=DTYPE, use_fast_accum=True
    )


def _heads(heads: int, size: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randn(1, tokens, heads, size, device=device, dtype=DTYPE)


def _self_attention(model: WanVideoModel, case: Case, device: torch.device) -> Call:
    heads, size = case.config.num_heads, case.config.head_dim
    q, k, v = (_heads(heads, size, case.tokens, device) for _ in range(3))
    backend = model.attention.main
    call = backend.on_grid(case.grid) if isinstance(backend, GridAttention) else backend
    return lambda: call(q, k, v)


def _attention(heads: int, size: int, tokens: int, words: int, device: torch.device) -> Call:
    q, k, v = (_heads(heads, size, count, device).transpose(1, 2) for count in (tokens, words, words))
    return lambda: F.scaled_dot_product_attention(q, k, v)
