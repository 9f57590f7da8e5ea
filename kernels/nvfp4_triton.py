"""The Triton kernel of nvfp4.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024


@triton.jit
def _value(code):
    exponent, mantissa = (code >> 1) & 3, (code & 1).to(tl.float32)
    normal = (2.0 + mantissa) * 0.25 * (1 << exponent).to(tl.float32)
    magnitude = tl.where(exponent == 0, 0.5 * mantissa, normal)
    return tl.where(code >= 8, -magnitude, magnitude)


@triton.jit
def _expand(codes, block_scale, factor, out, width, scale_columns, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = byte < width
    code = tl.load(codes + row * width + byte, mask=inside, other=0).to(tl.int32)
    # A scale for 8 bytes; tiles of 128 rows and 4 columns, in which 32 rows of 16 hold four groups of rows each.
    column = byte // 8
    tile = (row // 128) * (scale_columns // 4) + column // 4
    place = tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4
    scale = tl.load(block_scale + place, mask=inside, other=0.0).to(tl.float32) * tl.load(factor + row)
    values = tl.interleave(_value(code >> 4) * scale, _value(code & 15) * scale).to(tl.float8e4nv)
    place_out = tl.program_id(1) * BYTES * 2 + tl.arange(0, BYTES * 2)
    tl.store(out + row * width * 2 + place_out, values, mask=place_out < width * 2)


def expand(codes: Tensor, block_scale: Tensor, factor: Tensor) -> Tensor:
    """Codes [N, K / 2], block scales in cuBLAS' order, factor [N, 1] -> E4M3 [N, K]; all contiguous."""
    rows, width = codes.shape
    out = torch.empty((rows, width * 2), dtype=torch.float8_e4m3fn, device=codes.device)
    with torch.cuda.device_of(codes):
        _expand[(rows, triton.cdiv(width, BYTES))](
            codes, block_scale, factor, out, width, block_scale.shape[-1], BYTES=BYTES
        )
    return out
