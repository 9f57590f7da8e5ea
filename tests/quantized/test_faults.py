"""The disease: bare kernels fail on contiguous tensors at odd addresses. The cure: through our operators they do not.

An error of this kind kills the CUDA context, so every call runs in a process of its own. Where a newer version of a
package no longer fails, the test says so as an expected failure.
"""

import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch
from limits import PATIENCE

pytestmark = [pytest.mark.cuda, pytest.mark.sm89]
PREAMBLE = """
import torch
import torch.nn.functional as F
import comfy_kitchen
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear, _multiply
from wanvideo_wrapper.quantized.nvfp4 import quantize_nvfp4

def shifted(t, offset=1):
    storage = torch.empty(t.numel() + offset, dtype=t.dtype, device="cuda")
    return storage[offset:].view(t.shape).copy_(t)

torch.manual_seed(0)
bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
x = shifted(torch.randn(64, 256, device="cuda", dtype=bf16))
a, b = (torch.randn(64, 256, device="cuda").to(e4m3) for _ in range(2))
ones, row = torch.ones(64, 1, device="cuda"), torch.ones(1, 64, device="cuda")
q, k, v = (shifted(torch.randn(1, 256, 4, 64, device="cuda", dtype=bf16)) for _ in range(3))
mask = shifted(torch.rand(1, 4, 256, 256, device="cuda").to(bf16))
scale = torch.ones((), device="cuda")

def product(a=a, b=b, bias=None):
    return torch._scaled_mm(a, b.t(), scale_a=ones, scale_b=row, bias=bias, out_dtype=bf16, use_fast_accum=True)
"""
# Bare call, and the same through this project.
CALLS = {
    "sdpa": (
        "F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))",
        "sdpa()(q, k, v)",
    ),
    "sdpa with a mask": (
        "F.scaled_dot_product_attention(*(t.clone().transpose(1, 2) for t in (q, k, v)), attn_mask=mask)",
        "sdpa()(q.clone(), k.clone(), v.clone(), mask=mask)",
    ),
    "quantize_per_tensor_fp8": (
        "comfy_kitchen.quantize_per_tensor_fp8(x, scale)",
        "quantize(x)",
    ),
    "quantize_nvfp4": (
        "comfy_kitchen.quantize_nvfp4(x, scale)",
        "quantize_nvfp4(x, scale)",
    ),
    "_scaled_mm, activation": ("product(a=shifted(a))", "_multiply(shifted(a), ones, b, ones, None)"),
    "_scaled_mm, weight": ("product(b=shifted(b))", "_multiply(a, ones, shifted(b), ones, None)"),
    "_scaled_mm, bias": (
        "product(bias=shifted(torch.randn(64, device='cuda', dtype=bf16)))",
        "_multiply(a, ones, b, ones, shifted(torch.randn(64, device='cuda', dtype=bf16)))",
    ),
    "_scaled_mm, columns": (
        "product(a=a[:, :24].contiguous(), b=b[:, :24].contiguous())",
        "Fp8MatmulLinear.quantize(torch.randn(40, 24, device='cuda'), None, e4m3)(x[:, :24])",
    ),
}


def outcome(call):
    """Return code and last line of errors of the call in a fresh process."""
    program = PREAMBLE + textwrap.dedent(f"""
    {call}
    torch.cuda.synchronize()
    print("DONE")
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return "DONE" in done.stdout, done.stderr.strip()[-400:]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_ours_runs(name):
    ran, error = outcome(CALLS[name][1])
    assert ran, error


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_bare_call_fails(name):
    ran, _ = outcome(CALLS[name][0])
    if ran:
        pytest.xfail(f"it no longer does with torch {torch.__version__}, comfy-kitchen {version('comfy-kitchen')}")
