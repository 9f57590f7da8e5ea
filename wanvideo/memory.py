"""How much memory of the GPU a forward takes, by arithmetic: what stays, the slabs of what waits, and activations.

The same numbers choose `blocks_to_swap` -1, decide whether tokens run in pieces, and are what `wanvideo plan` and the
log say. Activations are those of the transformer itself: systems with blocks of their own, and models beside it, hold a
little more.
`tests/wanvideo/test_memory.py` holds them to a count of a forward's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ..attention import Attention, FusedAttention
from ..quantized.linear import QuantizedLinear, all_take_rows
from .config import WanConfig
from .host_slabs import padded_bytes
from .modules.model import WanModel

GIGABYTE = 1e9
# Tokens that layers which compute every token alone take at once where memory is short. Products of so many rows keep
# a large GPU busy, and at 14B their hidden layer is 0.2 GB.
AT_ONCE = 8192
# What kernels take beside tensors: the workspaces of cuBLAS and cuDNN, the tables of compiled graphs.
WORKSPACES = 2**27
# One block runs in a slab while another one arrives.
SLABS = 2


@dataclass(frozen=True)
class Work:
    """A forward: so many tokens a row, so many rows that share it."""

    tokens: int
    batch: int = 1


def usual_work(config: WanConfig) -> Work:
    """81 frames of 1280x720, where nothing says what runs."""
    return Work(21 * (720 // config.token_side) * (1280 // config.token_side))


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How blocks compute. itemsize: bytes of a residual stream's value; fp8_rows: linear layers read FP8 rows.

    expands: a stored weight becomes one in base precision for its product; fused: attention takes q and k as the linear
    layers give them, one after the other, in 8 bits. projections, hidden_layers: how many tensors of q's size there are
    at once otherwise, and of the feed-forward's hidden layer.
    """

    itemsize: int = 2
    fp8_rows: bool = False
    expands: bool = False
    fused: bool = False
    projections: int = 4
    hidden_layers: int = 1


class Beside(NamedTuple):
    """Bytes of models that run beside a transformer: with all of its blocks on the GPU, and with some swapped."""

    resident: int
    swapped: int

    def plus(self, other: Beside) -> Beside:
        """Both together."""
        return Beside(self.resident + other.resident, self.swapped + other.swapped)


NOTHING_BESIDE = Beside(0, 0)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model takes. outside: bytes of all that is in no block; blocks: of each block; all_at_once, in_pieces: of
    activations when all tokens run at once, and when they run in pieces; beside: of models that run beside it."""

    outside: int
    blocks: tuple[int, ...]
    all_at_once: int
    in_pieces: int
    beside: Beside = NOTHING_BESIDE

    def peak(self, waiting: int, slabs: int = SLABS) -> int:
        """Bytes with so many blocks in main memory; with any, tokens run in pieces."""
        blocks = sorted(self.blocks)
        staying = sum(blocks[: len(blocks) - waiting])
        moving = min(slabs, waiting) * blocks[-1] if waiting else 0
        more = self.in_pieces + self.beside.swapped if waiting else self.all_at_once + self.beside.resident
        return self.outside + staying + moving + more + WORKSPACES

    @property
    def resident_in_pieces(self) -> int:
        """Bytes with nothing waiting, and tokens in pieces all the same."""
        return self.peak(0) - self.all_at_once + self.in_pieces

    def least_waiting(self, room: int, slabs: int = SLABS) -> int | None:
        """The fewest blocks that must wait to fit into `room` bytes; None where all of them are not enough."""
        if self.resident_in_pieces <= room:
            return 0
        # A block that waits frees nothing as long as there are no more of them than slabs.
        return next((n for n in range(1, len(self.blocks) + 1) if self.peak(n, slabs) <= room), None)


def activations(config: WanConfig, work: Work, precision: Precision, at_once: int = 0) -> int:
    """Bytes that a forward holds at its peak. at_once: tokens that run in one piece, 0 for all.

    The largest of three moments. Self-attention: the residual stream, its normalized form, and q, k, v with the result
    or, in 8 bits, the last of them in 16. GELU and second product of the feed-forward, for all tokens or for a piece:
    the stream before and behind self-attention, what goes in, and the hidden layer before and behind its GELU (once
    where the first product applies it, both where one gates the other), or the hidden layer and what comes out.
    """
    values, size = work.tokens * work.batch * config.dim, precision.itemsize
    read = 1 if precision.fp8_rows else size
    attention = values * (size + read + (2.5 + size if precision.fused else precision.projections * size))
    piece = min(at_once or math.inf, work.tokens * work.batch)
    within = size == 2 and not (precision.fp8_rows or precision.expands)
    hidden = size if within else size + read
    hidden = hidden if precision.hidden_layers == 1 else precision.hidden_layers * size
    gelu = config.dim * read + config.ffn_dim * hidden
    out = config.dim * (read + size) + config.ffn_dim * read
    # In pieces: the result of all, and that of the piece before.
    stream, before = (3, config.dim * size) if at_once else (2, 0)
    forward = values * stream * size + piece * (max(gelu, out) + before)
    # Rotations and the clean and noisy latents are small, but float32 and there all the time.
    tables = work.tokens * (config.head_dim * 4 + 8 * (config.in_dim + 2 * config.out_dim) * 4)
    wide = config.dim * config.ffn_dim * size * 2 if precision.expands else 0
    return int(max(attention, forward)) + tables + wide


def footprint(config: WanConfig, blocks: Sequence[int], outside: int, *, work: Work, precision: Precision) -> Footprint:
    """The arithmetic of a model whose blocks have so many bytes each, and all else `outside`."""
    return Footprint(
        outside=outside,
        blocks=tuple(blocks),
        all_at_once=activations(config, work, precision),
        in_pieces=activations(config, work, precision, AT_ONCE),
    )


def footprint_of(model: WanModel, work: Work, attention: Attention | None = None) -> Footprint:
    """The same of a model that is there, on any device. attention: what its self-attention runs."""
    blocks = [slab_bytes(block.parameters()) for stack in model.stacks().values() for block in stack]
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    outside = total - sum(p.nbytes for stack in model.stacks().values() for p in stack.parameters())
    return footprint(model.config, blocks, outside, work=work, precision=precision_of(model, attention))


def precision_of(model: WanModel, attention: Attention | None = None) -> Precision:
    """How the blocks of this model compute."""
    block = model.blocks[0]
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    rows = all_take_rows((*block.self_attn.readers(), *(m for m in block.ffn.modules() if isinstance(m, nn.Linear))))
    return Precision(
        itemsize=model.compute_dtype.itemsize,
        fp8_rows=rows,
        expands=not rows and any(isinstance(layer, QuantizedLinear) for layer in layers),
        **held(model, fused=isinstance(attention, FusedAttention)),
    )


def held(model: WanModel, *, fused: bool) -> dict[str, int | bool]:
    """What layers of a block hold at once, as fields of Precision. fused: attention would take q and k as they come."""
    attention, ffn = model.blocks[0].self_attn, model.blocks[0].ffn
    return {
        "fused": fused and attention.fusible,
        "projections": attention.projections,
        "hidden_layers": getattr(ffn, "hidden_layers", Precision.hidden_layers),
    }


def slab_bytes(tensors: Iterable[Tensor]) -> int:
    """What these tensors take in a slab."""
    return sum(padded_bytes(tensor.nbytes) for tensor in tensors)


def gigabytes(size: float) -> str:
    """1.5e9 -> "1.5 GB"."""
    return f"{size / GIGABYTE:.1f} GB"


def described(footprint: Footprint, video: str) -> str:
    """Weights, and the peaks of such a video with all of them on the GPU and with all blocks in main memory."""
    count, total = len(footprint.blocks), footprint.outside + sum(footprint.blocks)
    return (
        f"Weights: {gigabytes(total)}. {video} need {gigabytes(footprint.peak(0))} of GPU memory, or "
        f"{gigabytes(footprint.peak(count))} with all {count} blocks swapped."
    )
