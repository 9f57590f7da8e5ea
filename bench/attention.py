"""Self-attention of every option that runs here: speed, and error against float32.

TFLOP/s count 4 * L * L * D operations a head, also for sparse options, whose figure is "dense-equivalent". A time is of
a whole call, with quantization and copies; a backend that takes raw projections is also timed as "NAME (fused)", less
the time of norm and position alone.

Errors are relative, over a sample of queries, for two kinds of input: normal, and outliers: 4 channels of q and k are 8
times larger and each head is scaled to unit RMS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import attention
from ..attention import ATTENTION_MODES, AttentionSpec, GridAttention
from ..host import Host
from ..wanvideo.modules.layers import WanRMSNorm
from ..wanvideo.rope import rope_table
from .clock import milliseconds, wait_for
from .random_model import DTYPE, Case
from .report import Row

OUTLIERS, FACTOR = 4, 8
SAMPLE = 512
PEERS = {
    "peer: torch's choice": None,
    "peer: cuDNN": SDPBackend.CUDNN_ATTENTION,
    "peer: flash, as torch has it": SDPBackend.FLASH_ATTENTION,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """A row an option; those that cannot run say why."""
    device, heads, size = host.device(), case.config.num_heads, case.config.head_dim
    spec = AttentionSpec(device=device, heads=heads, head_dim=size, dtype=DTYPE)
    normal = _inputs(case, device)
    calls, refused = _working(*_calls(spec, case.grid), normal, device)
    times = milliseconds({name: lambda call=call: call(*normal) for name, call in calls.items()}, device)
    times |= _fused(calls, case, device)
    near, far = _errors(calls, normal), _errors(calls, _with_outliers(normal))
    work, base = 4 * case.tokens**2 * size * heads, times["peer: torch's choice"]
    rows = [
        Row(name, {"ms": ms, "TFLOP/s": work / ms / 1e9, "times torch's speed": base / ms}
            | ({"error": near[name], "error, outliers": far[name]} if name in near else {}))
        for name, ms in times.items()
    ]  # fmt: skip
    return [*rows, *(Row(name, {}, why) for name, why in refused.items())]


def _inputs(case: Case, device: torch.device) -> Inputs:
    shape = 1, case.tokens, case.config.num_heads, case.config.head_dim
    q, k, v = (torch.randn(shape, device=device).to(DTYPE) for _ in range(3))
    return q, k, v


def _with_outliers(inputs: Inputs) -> Inputs:
    q, k, v = inputs
    turned = []
    for t in (q.float(), k.float()):
        t[..., :: t.shape[-1] // OUTLIERS] *= FACTOR
        turned.append((t / t.square().mean(-1, keepdim=True).sqrt()).to(DTYPE))
    return turned[0], turned[1], v


def _calls(spec: AttentionSpec, grid: tuple[int, int, int]) -> tuple[dict[str, Attend], dict[str, str]]:
    """What may run here, by name, and why the others do not."""
    calls = {name: _peer(kind) for name, kind in PEERS.items()}
    refused = {}
    for name in ATTENTION_MODES:
        why = attention.reason(name, spec)
        if why is not None:
            refused[name] = why
            continue
        backend = attention.resolve(name, spec)
        calls[name] = backend.on_grid(grid) if isinstance(backend, GridAttention) else backend
    return calls, refused


def _peer(kind: SDPBackend | None) -> Attend:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [t.transpose(1, 2) for t in (q, k, v)]
        if kind is None:
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)

    return call


def _working(
    calls: dict[str, Attend], refused: dict[str, str], inputs: Inputs, device: torch.device
) -> tuple[dict[str, Attend], dict[str, str]]:
    """The calls that run on these inputs, and the reasons of the others. A fault ends the run."""
    fine, refused = {}, dict(refused)
    for name, call in calls.items():
        try:
            call(*inputs)
            wait_for(device)
        except (RuntimeError, ValueError) as error:
            refused[name] = str(error).splitlines()[0]
            continue
        fine[name] = call
    return fine, refused


def _errors(calls: dict[str, Attend], inputs: Inputs) -> dict[str, float]:
    rows = torch.randperm(inputs[0].shape[1], device=inputs[0].device)[:SAMPLE]
    want = _exact(*inputs, rows)
    return {name: ((call(*inputs)[:, rows].float() - want).norm() / want.norm()).item() for name, call in calls.items()}


def _exact(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of the queries `rows` in float32, head by head: [1, n, H, D]."""
    parts = []
    for head in range(q.shape[2]):
        some, keys, values = q[0, rows, head].float(), k[0, :, head].float(), v[0, :, head].float()
        parts.append((some @ keys.T * q.shape[-1] ** -0.5).softmax(-1) @ values)
    return torch.stack(parts, dim=1)[None]


def _fused(calls: dict[str, Attend], case: Case, device: torch.device) -> dict[str, float]:
    """Milliseconds from raw projections to heads, less the fused norm and position that other options run before."""
    fused = {name: call for name, call in calls.items() if hasattr(call, "fused")}
    if not fused:
        return {}
    from ..kernels.norm_rope_fp8 import norm_rope

    heads, size = case.config.num_heads, case.config.head_dim
    raw_q, raw_k = (torch.randn(1, case.tokens, heads * size, device=device, dtype=DTYPE) for _ in range(2))
    v = torch.randn(1, case.tokens, heads, size, device=device, dtype=DTYPE)
    norms = [WanRMSNorm(heads * size, 1e-6).to(device, DTYPE) for _ in range(2)]
    rope = rope_table(case.grid, size, device=device)

    def placed() -> None:
        for norm, raw in zip(norms, (raw_q, raw_k), strict=True):
            norm_rope(raw, norm.weight, rope, norm.eps, heads)

    asked = (lambda: raw_q), (lambda: raw_k), (lambda: v)
    timed = {f"{name} (fused)": lambda call=call: call.fused(*asked, *norms, rope) for name, call in fused.items()}
    found = milliseconds({**timed, "norm and position": placed}, device)
    alone = found.pop("norm and position")
    return {name: time - alone for name, time in found.items()}
