"""GGUF blocks to values, in PyTorch on the device that holds them: formats of scales, offsets and plain codes.

Source: ggml's block formats (ggml-common.h, ggml-quants.c); the gguf package's NumPy form is the tests' oracle. Every
function takes n blocks as bytes, uint8 [n, bytes of a block], and returns float32 [n, values of a block]. Constants are
Python numbers or cached on the device: a table made from a list at every use would make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

Expand = Callable[[Tensor], Tensor]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 doubled, so that all are whole; the scales of both formats that use it are halved for that.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
E4M3_NAN = 0x7F
# Digits that the last four bytes of TQ1_0 hold, of five that there is room for.
LAST_DIGITS = 4


@cache
def table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as float32 on the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 value at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def parts(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., m] -> their codes of `bits` bits, the lowest first: uint8 [..., 8 / bits, m]."""
    return torch.stack([codes >> shift for shift in range(0, 8, bits)], dim=-2) & (2**bits - 1)


def nibbles(codes: Tensor) -> Tensor:
    """Bytes [n, m] -> the lower halves of all, then the upper ones: uint8 [n, 2 m]."""
    return parts(codes, 4).flatten(1)


def bits_of(codes: Tensor) -> Tensor:
    """Bytes [n, m] -> bits, byte after byte: uint8 [n, 8 m]."""
    return parts(codes, 1).transpose(-1, -2).flatten(1)


def grouped(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """values [n, count] times a scale [n, groups] of each group, less an offset of each."""
    out = values.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
    if offset is not None:
        out -= offset.unsqueeze(-1)
    return out.flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return half(b, 0) * (nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return half(b, 0) * nibbles(b[:, 4:]).float() + half(b, 2)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    return (nibbles(low) | bits_of(high) << 4).float()


def _q5_0(b: Tensor) -> Tensor:
    return half(b, 0) * (_five_bits(b[:, 6:], b[:, 2:6]) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return half(b, 0) * _five_bits(b[:, 8:], b[:, 4:8]) + half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return half(b, 0) * b[:, 2:].view(torch.int8).float()


def _two_bits(codes: Tensor) -> Tensor:
    """64 bytes of 256 codes: 32 bytes hold the four times 32 codes of a half."""
    return parts(codes.unflatten(1, (2, 32)), 2).flatten(1)


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    return grouped(_two_bits(b[:, 16:80]), half(b, 80) * (scales & 15), half(b, 82) * (scales >> 4))


def _q3_k(b: Tensor) -> Tensor:
    missing = 1 - parts(b[:, :32], 1).flatten(1).to(torch.int8)
    codes = _two_bits(b[:, 32:96]).to(torch.int8) - 4 * missing
    low, high = nibbles(b[:, 96:104]), parts(b[:, 104:108], 2).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    return grouped(codes, half(b, 108) * scales)


def _six_bit_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 offsets of 6 bits: four of each whole, then halves beside their upper bits."""
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    offsets = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales, offsets


def _with_offsets(b: Tensor, codes: Tensor) -> Tensor:
    scales, offsets = _six_bit_scales(b[:, 4:16])
    return grouped(codes, half(b, 0) * scales, half(b, 2) * offsets)


def _q4_k(b: Tensor) -> Tensor:
    return _with_offsets(b, parts(b[:, 16:].unflatten(1, (4, 32)), 4).flatten(1))


def _q5_k(b: Tensor) -> Tensor:
    low = parts(b[:, 48:].unflatten(1, (4, 32)), 4).flatten(1)
    return _with_offsets(b, low | parts(b[:, 16:48], 1).flatten(1) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = parts(b[:, :128].unflatten(1, (2, 64)), 4).flatten(1)
    high = parts(b[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1)
    codes = (low | high << 4).to(torch.int8) - 32
    return grouped(codes, half(b, 208) * b[:, 192:208].view(torch.int8))


def _iq4_nl(b: Tensor) -> Tensor:
    return half(b, 0) * table(IQ4_VALUES, b.device)[nibbles(b[:, 2:]).int()]


def _iq4_xs(b: Tensor) -> Tensor:
    low = parts(b[:, 4:8], 4).transpose(-1, -2).flatten(1)
    high = parts(b[:, 2:4], 2).transpose(-1, -2).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    codes = parts(b[:, 8:].unflatten(1, (8, 16)), 4).flatten(1)
    return grouped(table(IQ4_VALUES, b.device)[codes.int()], half(b, 0) * scales)


def _thirds(codes: Tensor, count: int) -> Tensor:
    """Bytes [n, m] of `count` base-3 digits each, as fractions of 256 -> digits less 1, digit after digit."""
    # The product wraps at 256, which drops the digits in front.
    digits = torch.stack([codes * 3**place for place in range(count)], dim=-2)
    return ((digits.short() * 3 >> 8) - 1).flatten(1)


def _tq1_0(b: Tensor) -> Tensor:
    digits = (_thirds(b[:, :32], 5), _thirds(b[:, 32:48], 5), _thirds(b[:, 48:52], LAST_DIGITS))
    return half(b, 52) * torch.cat(digits, dim=1).float()


def _tq2_0(b: Tensor) -> Tensor:
    return half(b, 64) * (_two_bits(b[:, :64]).float() - 1)


def _mxfp4(b: Tensor) -> Tensor:
    # E8M0 halved: 2 ** (e - 128), of which the two smallest are denormal and so not made of exponent bits alone.
    exponent = b[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23)
    return bits.view(torch.float32) * table(E2M1_DOUBLED, b.device)[nibbles(b[:, 1:]).int()]


def _nvfp4(b: Tensor) -> Tensor:
    # ggml's scales have no sign; what E4M3 calls NaN is 0.
    bits = b[:, :4] & E4M3_NAN
    scale = torch.where(bits == E4M3_NAN, 0, bits).view(torch.float8_e4m3fn).float() / 2
    codes = parts(b[:, 4:].unflatten(1, (4, 8)), 4).flatten(1)
    return grouped(table(E2M1_DOUBLED, b.device)[codes.int()], scale)


def _bf16(b: Tensor) -> Tensor:
    return b.view(torch.bfloat16).float()


PLAIN: Mapping[str, Expand] = {
    "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k,
    "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip
