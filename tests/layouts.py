"""Generated tensors whose values are plain and whose memory is not: every layout that reaches a kernel in practice."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

KINDS = ("offset", "permuted", "sliced", "stepped", "expanded", "narrowed", "packed")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How many layouts are generated for each entry point.
EXAMPLES = int(os.environ.get("WAN_LAYOUT_EXAMPLES", "2000" if torch.cuda.is_available() else "25"))
SETTINGS = settings(max_examples=EXAMPLES, derandomize=False)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies: kind, elements before its first one, seed of its values."""

    kind: str
    offset: int
    seed: int

    def build(self, shape, dtype, device="cpu"):
        """A tensor of this shape; activations have a few outlier channels."""
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(shape, generator=generator)
        if shape and shape[-1] > 4:
            values[..., :: max(shape[-1] // 4, 1)] *= 20
        return self.place(values.to(dtype).to(device))

    def place(self, values):
        """The same values in this layout."""
        shape, dtype = values.shape, values.dtype
        if not shape:
            return self._shifted(values)
        if self.kind == "permuted" and len(shape) > 1:
            turned = self._shifted(values.transpose(0, -1).contiguous())
            return turned.transpose(0, -1)
        if self.kind in ("sliced", "stepped", "narrowed"):
            extra = {"sliced": self.offset + shape[-1] + 3, "stepped": 2 * shape[-1], "narrowed": 3 * shape[-1]}
            wide = self._shifted(torch.zeros(*shape[:-1], extra[self.kind], dtype=dtype, device=values.device))
            start = {"sliced": self.offset, "stepped": 0, "narrowed": shape[-1]}[self.kind]
            view = wide[..., ::2] if self.kind == "stepped" else wide.narrow(-1, start, shape[-1])
            return view.copy_(values)
        if self.kind == "expanded" and len(shape) > 1:
            return self._shifted(values[:1].contiguous()).expand(shape)
        if self.kind == "packed":
            # One tensor of several in a buffer of bytes, behind one of odd length.
            size = dtype.itemsize
            buffer = torch.zeros((values.numel() + self.offset + 1) * size, dtype=torch.uint8, device=values.device)
            part = buffer[self.offset * size : (self.offset + values.numel()) * size].view(dtype).view(shape)
            return part.copy_(values)
        return self._shifted(values)

    def _shifted(self, values):
        count = math.prod(values.shape)
        storage = torch.empty(count + self.offset, dtype=values.dtype, device=values.device)
        return storage[self.offset :].view(values.shape).copy_(values)


def layouts():
    """Strategy of layouts."""
    return st.builds(Layout, st.sampled_from(KINDS), st.integers(0, 15), st.integers(0, 2**16))


def fresh(t):
    """The same values in memory of their own."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def bits(t):
    """For exact comparison, NaN and signs of zero included."""
    return fresh(t).view(-1).view(torch.uint8)


def relative(got, want):
    """Error norm over norm, in float64; 0 for two zeros."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def sqnr(got, want):
    """Signal to quantization noise in dB."""
    return -20 * math.log10(relative(got, want))


def save_in_order(path, tensors, metadata=None):
    """A safetensors file of uint8, FP8 and float32 tensors, one behind the other as they are given.

    The package's own `save_file` puts wide types first, behind which nothing is odd.
    """
    names = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    header, data = {"__metadata__": metadata or {}}, b""
    for name, t in tensors.items():
        part = bits(t).numpy().tobytes()
        span = [len(data), len(data) + len(part)]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": span}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
