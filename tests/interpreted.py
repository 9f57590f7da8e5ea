"""Triton kernels on CPU tensors: Triton's interpreter, with the roundings of a GPU.

The interpreter of Triton 3.6 truncates to bfloat16, loses the carry when it rounds to FP8, keeps every NaN when it
clamps, multiplies the bits of bfloat16 matrices, counts no loop to an argument (with NumPy 2.4), and knows no inline
PTX; here PyTorch rounds and multiplies, and NumPy runs the instructions that the kernels use.
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


def halves(words):
    """The float16 numbers [..., 2] of 32-bit words."""
    return np.ascontiguousarray(words).view(np.float16).reshape(*words.shape, 2)


def to_words(low, high):
    return torch.stack([torch.from_numpy(t) for t in (low, high)], dim=-1).half().numpy()


def to_fp8(words):
    wide = torch.from_numpy(halves(words).copy()).float().clamp(-448, 448)
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


PTX = {
    "cvt.rn.f16x2.f32": lambda high, low: to_words(low, high),
    "add.rn.f16x2": lambda a, b: halves(a) + halves(b),
    "sub.rn.f16x2": lambda a, b: halves(a) - halves(b),
    "fma.rn.f16x2": lambda a, b, c: halves(a) * halves(b) + halves(c),
    "cvt.rn.satfinite.e4m3x2.f16x2": to_fp8,
}


def run_ptx(text, arguments, kind):
    """One instruction on arrays of registers, of which the last two or more halves make one of type `kind`."""
    name, _, *operands = text.removesuffix(";").replace(",", "").split()
    found = PTX[name](*(arguments[int(operand[1:]) - 1] for operand in operands))
    return np.ascontiguousarray(found).view(kind).squeeze(-1)


def clamp_numbers(x, low, high):
    """A clamp that does not ask for NaN: a GPU's makes a limit of it."""
    return np.fmin(np.fmax(x, low), high)


def exact(monkeypatch):
    """Let the interpreter round and clamp as a GPU does and run inline PTX, for one test."""
    from triton.language import PropagateNan
    from triton.runtime import interpreter

    class Results(list):
        get_result = list.__getitem__

    def inline(self, text, constraints, arguments, types, is_pure, pack):
        kind = types[0].scalar
        data = run_ptx(text, [t.data for t in arguments], np.dtype(f"i{kind.primitive_bitwidth // 8}"))
        return Results([interpreter.TensorHandle(data, kind)])

    def clamp(self, x, low, high, propagate_nan):
        return self.ternary_op(x, low, high, np.clip if propagate_nan == PropagateNan.ALL else clamp_numbers)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(self, a, b, added, input_precision, most_imprecise):
        product = as_torch(a.data, a.dtype.scalar).float() @ as_torch(b.data, b.dtype.scalar).float()
        return interpreter.TensorHandle(product.numpy() + added.data, added.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_clampf", clamp)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline, raising=False)
