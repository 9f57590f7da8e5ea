"""GGUF blocks to values: formats whose codes are places in a grid of points (IQ1, IQ2, IQ3).

Source: ggml's block formats; the grids are those of the gguf package. A point is 8 (IQ3: 4) values, a block 256: eight
groups of 32, which are four points of 8 (IQ3: eight of 4). Shapes as in gguf_blocks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from .gguf_blocks import Expand, bits_of, half, parts

GROUPS = 8
IQ1_SHIFT = 0.125


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """The points of a format, float32 [points, 8 or 4]."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid).flatten(0, 2).to(device)


def words(b: Tensor, dtype: torch.dtype = torch.int16) -> Tensor:
    """Bytes [n, 2 m] -> little-endian numbers, int32 [n, m] without sign (int16), or with all bits (int32)."""
    numbers = b.contiguous().view(dtype).int()
    return numbers & 0xFFFF if dtype == torch.int16 else numbers


def signs(codes: Tensor) -> Tensor:
    """Bytes [n, m], a bit a value that is negative -> 1 or -1, float32 [n, 8 m]."""
    return 1 - 2 * bits_of(codes).float()


def even_signs(codes: Tensor) -> Tensor:
    """The same for 7 bits each [n, m]: the eighth makes the number of negative values even."""
    folded = codes ^ codes >> 4
    folded = folded ^ folded >> 2
    return signs((codes | (folded ^ folded >> 1 & 0x7F) << 7 & 0x80).to(torch.uint8))


def scaled(points: Tensor, scale: Tensor, signed: Tensor) -> Tensor:
    """Points [n, count, size] times a scale [n, groups] and signs [n, 256]."""
    values = points.flatten(1) * signed
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def _signs_and_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """32-bit numbers, one a group -> signs [n, 256] of four times 7 bits, and a scale of 4 bits [n, 8]."""
    numbers = words(b, torch.int32)
    codes = torch.stack([numbers >> shift & 0x7F for shift in (0, 7, 14, 21)], dim=-1)
    return even_signs(codes.flatten(1)), (numbers >> 28 & 15).float()


def _iq2_xxs(b: Tensor) -> Tensor:
    groups = b[:, 2:].unflatten(1, (GROUPS, 8))
    points = grid("IQ2_XXS", b.device)[groups[..., :4].flatten(1).int()]
    signed, scale = _signs_and_scales(groups[..., 4:].flatten(1))
    return scaled(points, half(b, 0) * (0.5 + scale) * 0.25, signed)


def _pair_scales(b: Tensor) -> Tensor:
    """Bytes [n, m] -> the halves of each, the lower first, float32 [n, 2 m]."""
    return parts(b, 4).transpose(-1, -2).flatten(1).float()


def _iq2_xs(b: Tensor) -> Tensor:
    codes = words(b[:, 2:66])
    points = grid("IQ2_XS", b.device)[codes & 511]
    return scaled(points, half(b, 0) * (0.5 + _pair_scales(b[:, 66:])) * 0.25, even_signs(codes >> 9))


def _iq2_s(b: Tensor) -> Tensor:
    high = parts(b[:, 66:74], 2).transpose(-1, -2).flatten(1).int()
    points = grid("IQ2_S", b.device)[b[:, 2:34].int() | high << 8]
    return scaled(points, half(b, 0) * (0.5 + _pair_scales(b[:, 74:])) * 0.25, signs(b[:, 34:66]))


def _iq3_xxs(b: Tensor) -> Tensor:
    points = grid("IQ3_XXS", b.device)[b[:, 2:66].int()]
    signed, scale = _signs_and_scales(b[:, 66:])
    return scaled(points, half(b, 0) * (0.5 + scale) * 0.5, signed)


def _iq3_s(b: Tensor) -> Tensor:
    points = grid("IQ3_S", b.device)[b[:, 2:66].int() | bits_of(b[:, 66:74]).int() << 8]
    return scaled(points, half(b, 0) * (1 + 2 * _pair_scales(b[:, 106:])), signs(b[:, 74:106]))


def _shifted(points: Tensor, scale: Tensor, negative: Tensor) -> Tensor:
    """Points [n, 32, 8] plus or minus a shift [n, shifts], times a scale [n, groups]."""
    shift = IQ1_SHIFT - 2 * IQ1_SHIFT * negative.float()
    values = points.flatten(1).unflatten(1, (shift.shape[1], -1)) + shift.unsqueeze(-1)
    return (values.flatten(1).unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def _iq1_s(b: Tensor) -> Tensor:
    numbers = words(b[:, 34:])
    high = torch.stack([numbers >> shift & 7 for shift in (0, 3, 6, 9)], dim=-1).flatten(1)
    points = grid("IQ1_S", b.device)[b[:, 2:34].int() | high << 8]
    return _shifted(points, half(b, 0) * (2 * (numbers >> 12 & 7) + 1), numbers >> 15)


def _iq1_m(b: Tensor) -> Tensor:
    numbers = words(b[:, 48:])
    # The upper four bits of each number are a quarter of the block's float16 scale.
    quarters = (numbers >> 12) << _quarter_places(b.device)
    bits = quarters.sum(dim=1, keepdim=True)
    whole = torch.where(bits > 0x7FFF, bits - 0x10000, bits).short().view(torch.float16).float()
    scale = torch.stack([numbers >> shift & 7 for shift in (0, 3, 6, 9)], dim=-1).flatten(1)
    high = parts(b[:, 32:48], 4).transpose(-1, -2).flatten(1).int()
    points = grid("IQ1_M", b.device)[b[:, :32].int() | (high & 7) << 8]
    return _shifted(points, whole * (2 * scale + 1), high >> 3)


@cache
def _quarter_places(device: torch.device) -> Tensor:
    return torch.tensor((0, 4, 8, 12), dtype=torch.int32, device=device)


GRIDS: Mapping[str, Expand] = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}  # fmt: skip
