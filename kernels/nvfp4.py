"""NVFP4 weights as FP8 ones, so that FP8 tensor cores can multiply them.

NVFP4: two E2M1 codes a byte, the even column in the high half; an E4M3 scale for every 16 columns, stored in cuBLAS'
order of 128 x 4 tiles. A row is divided by a power of two that fits its largest value into E4M3: exact but for the last
bits of products of code and block scale. Source of the layout: comfy-kitchen (`to_blocked`), cuBLAS block scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor_layout import check_entry, kernel_ready
from . import op_name, triton_kernels

BLOCK = 16
CODES_PER_BYTE = 2
LARGEST_CODE = 6.0
SCALE_ROWS, SCALE_COLUMNS = 128, 4
# E2M1's eight magnitudes; the fourth bit of a code is the sign.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unswizzled(block_scale: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales in cuBLAS' order -> float32 [rows, columns / 16]."""
    from comfy_kitchen import from_blocked

    return from_blocked(block_scale, num_rows=rows, num_cols=columns // BLOCK).float()


def codes_to_values(codes: Tensor) -> Tensor:
    """Bytes uint8 [N, K / 2] -> E2M1 values, float32 [N, K]."""
    magnitudes = torch.tensor(MAGNITUDES, device=codes.device)
    table = torch.cat((magnitudes, -magnitudes))
    return table[torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2).int()]


def expand_eager(codes: Tensor, block_scale: Tensor, factor: Tensor) -> Tensor:
    """Codes [N, K / 2], block scales, factor [N, 1] -> E4M3 [N, K] of code * block scale * factor."""
    values = codes_to_values(codes)
    scale = unswizzled(block_scale, *values.shape)
    blocks = values.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1) * factor.unsqueeze(-1)
    return blocks.flatten(-2).to(torch.float8_e4m3fn)


@torch.library.custom_op(op_name("nvfp4_to_fp8"), mutates_args=())
def expand(codes: Tensor, block_scale: Tensor, factor: Tensor) -> Tensor:
    """The operator: `expand_eager` on the CPU, a Triton kernel on a GPU."""
    if not codes.is_cuda:
        return expand_eager(codes, block_scale, factor)
    codes, block_scale, factor = (kernel_ready(t, strided=False) for t in (codes, block_scale, factor))
    check_entry("nvfp4_to_fp8", strided=False, codes=codes, block_scale=block_scale, factor=factor)
    return triton_kernels("nvfp4_triton").expand(codes, block_scale, factor)


@expand.register_fake
def _(codes: Tensor, block_scale: Tensor, factor: Tensor) -> Tensor:
    shape = (codes.shape[0], codes.shape[1] * CODES_PER_BYTE)
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=codes.device)
