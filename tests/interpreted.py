"""Triton kernels on CPU tensors: Triton's interpreter, with the roundings of a GPU.

The interpreter of Triton 3.6 truncates to bfloat16, loses the carry when it rounds to FP8, and multiplies the bits of
bfloat16 matrices as integers; here PyTorch does these three.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch

NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
STORED = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
RUNS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None

needed = pytest.mark.skipif(not RUNS, reason="needs Triton and TRITON_INTERPRET=1")


def as_torch(data, dtype):
    """The array that the interpreter keeps for a Triton type."""
    kind = NAMES[dtype.name]
    return torch.from_numpy(np.ascontiguousarray(data).view(np.dtype(f"u{kind.itemsize}")).copy()).view(kind)


def convert(data, source, target, rounding_mode):
    """Rounded to nearest even, saturating where the format has no infinity, as `cvt.rn.satfinite` does."""
    wide, kind = as_torch(data, source).float(), NAMES[target.name]
    if kind == torch.float8_e4m3fn:
        wide = wide.clamp(-448, 448)
    out = wide.to(kind)
    return out.view(STORED.get(kind, kind)).numpy().reshape(np.shape(data))


def exact(monkeypatch):
    """Let the interpreter round and multiply as a GPU does, for one test."""
    from triton.runtime import interpreter

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (as_torch(t.data, t.dtype.scalar).float().numpy() for t in (a, b))
        return interpreter.TensorHandle(left @ right + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
