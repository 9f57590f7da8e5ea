"""cuDNN's FP8 attention: its error by the roundings it makes, in a block, and on a GPU.

The kernel itself runs on a GPU only; elsewhere `cudnn_model.py` stands for it, behind the same operators.
"""

import subprocess
import sys

import pytest
import torch
from cudnn_model import cudnn_fp8_reference, exact
from hypothesis import given
from layouts import SETTINGS, bits, fresh, layouts, relative
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.attention_backends import cudnn as attention_cudnn
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8, why_not
from wanvideo_wrapper.kernels.fp8_rows import Fp8Rows
from wanvideo_wrapper.kernels.norm_rope_fp8 import norm_rope_eager, tensor_fp8
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.block import WanAttentionBlock
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, Text

# What five roundings to E4M3 cost on normal random numbers is 0.060.
FLOOR, TARGET = 0.055, 0.062
OUTLIER_TARGET = 1.1 * TARGET
# So many heads that the error hardly depends on the draw.
SIZES = [(64, 24), (128, 12)]
CUDA = torch.device("cuda")


@pytest.fixture
def modelled(monkeypatch):
    """The reference in place of cuDNN."""
    monkeypatch.setattr(attention_cudnn, "_sdpa_fp8", cudnn_fp8_reference)


def heads(tokens, size, count, batch=1):
    return torch.randn(3, batch, tokens, count, size).unbind()


def with_outliers(q, k):
    """4 channels of q and k 8 times larger, every head at a root mean square of 1."""
    channels = torch.randperm(q.shape[-1])[:4]
    for t in (q, k):
        t[..., channels] *= 8
        t /= t.square().mean(-1, keepdim=True).sqrt()
    return q, k


def unrotated(q, k, v):
    """The same roundings of q, k as they are."""
    (q, scale_q), (k, scale_k), (v, scale_v) = (tensor_fp8(t) for t in (q, k, v))
    return cudnn_fp8_reference(q, k, v, scale_q, scale_k, scale_v).float() * scale_v


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_error_on_normal_numbers(size, count, modelled):
    q, k, v = heads(1024, size, count)
    error = relative(CudnnFp8()(q, k, v), exact(q, k, v))
    assert FLOOR < error <= TARGET


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_error_with_outliers(size, count, modelled):
    q, k, v = heads(1024, size, count)
    q, k = with_outliers(q, k)
    want = exact(q, k, v)
    assert relative(CudnnFp8()(q, k, v), want) <= OUTLIER_TARGET
    assert relative(unrotated(q, k, v), want) > 1.5 * OUTLIER_TARGET


def test_error_with_keys_far_from_zero(modelled):
    q, k, v = heads(1024, 128, 12)
    k += torch.randn(128) * 3
    want = exact(q, k, v)
    assert relative(CudnnFp8()(q, k, v), want) <= TARGET
    assert relative(unrotated(q, k, v), want) > 1.3 * TARGET


def test_magnitudes_do_not_matter(modelled):
    q, k, v = heads(512, 128, 12)
    want = relative(CudnnFp8()(q, k, v), exact(q, k, v))
    for factor in (2.0**-40, 3e-3, 1.7, 1e4):
        got = relative(CudnnFp8()(q * factor, k / factor, v * factor), exact(q, k, v * factor))
        assert got < 1.1 * want


def projections(batch=1, count=2, size=128, grid=(3, 16, 20), dtype=torch.float32, device="cpu"):
    """Raw q, k, v, two norms and the positions; the norms' weights have outliers."""
    channels, rope = count * size, rope_table(grid, size, device=torch.device(device))
    q, k, v = torch.randn(3, batch, rope.shape[0], channels, device=device).to(dtype)
    norms = [WanRMSNorm(channels, 1e-6).to(device) for _ in range(2)]
    for norm in norms:
        norm.weight.data.uniform_(0.3, 1.2)
        norm.weight.data[:: size // 4] *= 5
    return q, k, v.unflatten(-1, (count, size)), *norms, rope


def asked(q, k, v, *others):
    """The arguments of the fused forms, which ask for q, k and v."""
    return (lambda: q), (lambda: k), (lambda: v), *others


def reference_of(q, k, v, norm_q, norm_k, rope):
    placed = (norm_rope_eager(x, n.weight, rope, n.eps, v.shape[2]) for x, n in ((q, norm_q), (k, norm_k)))
    return exact(*placed, v)


@torch.no_grad()
def test_fused_equals_its_steps(modelled):
    inputs = projections(batch=2)
    want = reference_of(*inputs)
    got = CudnnFp8().fused(*asked(*inputs))
    assert got.shape == want.shape and relative(got, want) < 0.08
    rows = CudnnFp8().fused_rows(*asked(*inputs))
    assert isinstance(rows, Fp8Rows) and rows.dtype == inputs[0].dtype
    assert torch.equal(rows.to(torch.float32), got.flatten(2))


def block_of(quantized):
    config = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=1, in_dim=16, text_dim=32, text_len=8)
    block = WanAttentionBlock(config, sdpa())
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    if quantized:
        for name in "qkvo":
            layer = getattr(block.self_attn, name)
            fast = Fp8MatmulLinear.quantize(layer.weight.detach(), layer.bias.detach(), torch.float8_e4m3fn)
            setattr(block.self_attn, name, fast)
    return block.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_a_block_runs_it_fused(quantized, modelled, monkeypatch):
    block, called = block_of(quantized), []
    for name in ("fused", "fused_rows"):
        inner = getattr(CudnnFp8, name)
        monkeypatch.setattr(CudnnFp8, name, lambda *a, inner=inner, name=name: (called.append(name), inner(*a))[1])
    rope = rope_table((2, 8, 8), 128)
    x = torch.randn(1, rope.shape[0], 256)
    text = Text(torch.randn(1, 8, 256))
    inputs = BlockInputs(torch.randn(1, 1, 6, 256), None, rope, text, (2, 8, 8))
    want = block(x, inputs)
    block.self_attn.attention = CudnnFp8()
    got = block(x, inputs)
    assert called == ["fused_rows" if quantized else "fused"]
    assert 0 < relative(got - x, want - x) < 0.06


def test_a_mask_is_refused():
    q, k, v = heads(8, 64, 1)
    with pytest.raises(ValueError, match="'cudnn_fp8' takes no mask; choose sdpa"):
        CudnnFp8()(q, k, v, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


def runs_here():
    reason = why_not(CUDA, 128) if torch.cuda.is_available() else "needs a CUDA device"
    if reason is not None:
        pytest.skip(reason)


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [256, 1000, 4095, 32760])
@pytest.mark.parametrize(("size", "count"), SIZES)
def test_on_a_gpu(size, count, tokens):
    runs_here()
    q, k, v = (t.cuda().bfloat16() for t in heads(tokens, size, count))
    want = sdpa_float32(q, k, v)
    before = [bits(t) for t in (q, k, v)]
    got = CudnnFp8()(q, k, v)
    assert got.dtype == q.dtype and got.is_contiguous() and FLOOR < relative(got, want) <= TARGET + 0.003
    assert all(torch.equal(bits(t), b) for t, b in zip((q, k, v), before, strict=True))
    q, k = with_outliers(q.float(), k.float())
    q, k = q.bfloat16(), k.bfloat16()
    assert relative(CudnnFp8()(q, k, v), sdpa_float32(q, k, v)) <= OUTLIER_TARGET + 0.003


def sdpa_float32(q, k, v):
    """In parts of the queries, so that the scores fit."""
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    parts = [(part @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v for part in q.split(512, dim=2)]
    return torch.cat(parts, dim=2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.cuda
def test_equals_its_model_on_a_gpu():
    runs_here()
    for keys in (700, 1024):
        q, k, v = (t.cuda() for t in heads(1024, 128, 4))
        (q, sq), (k, sk), (v, sv) = (tensor_fp8(t) for t in (q, k[:, :keys], v[:, :keys]))
        got = attention_cudnn._sdpa_fp8(q, k, v, sq, sk, sv).float()
        # The kernel rounds probabilities against a running maximum, so that they and the result fall on other steps.
        want = cudnn_fp8_reference(q, k, v, sq, sk, sv).float()
        assert relative(got, want) < 0.06


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_on_a_gpu(dtype):
    runs_here()
    inputs = projections(batch=2, count=12, dtype=dtype, device="cuda")
    got = CudnnFp8().fused(*asked(*inputs))
    assert got.dtype == dtype and relative(got, reference_of(*inputs)) < 0.08
    rows = CudnnFp8().fused_rows(*asked(*inputs))
    assert torch.equal(rows.to(dtype), got.flatten(2))
    streamed = torch.cuda.Stream()
    streamed.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(streamed):
        again = CudnnFp8().fused(*asked(*inputs))
    torch.cuda.current_stream().wait_stream(streamed)
    assert torch.equal(again, got)


@torch.no_grad()
@pytest.mark.cuda
def test_no_host_synchronisation():
    runs_here()
    inputs = projections(dtype=torch.bfloat16, device="cuda")
    backend = CudnnFp8()
    backend.fused(*asked(*inputs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.fused(*asked(*inputs))
        backend.fused_rows(*asked(*inputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.cuda
def test_a_process_ends_without_a_word():
    """nanobind, which binds cuDNN's functions to Python, lists what is still held of them at the end."""
    runs_here()
    script = (
        "import torch\n"
        "from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8\n"
        "CudnnFp8()(*torch.randn(3, 1, 256, 2, 64, device='cuda', dtype=torch.bfloat16))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "nanobind" not in done.stdout + done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["call", "fused"])
def test_any_layout_on_a_gpu(form):
    runs_here()
    tokens, count, size = 77, 2, 64
    norm, rope = WanRMSNorm(count * size, 1e-6).cuda(), rope_table((1, 7, 11), size, device=CUDA)

    def run(q, k, v):
        if form == "call":
            return CudnnFp8()(*(t.unflatten(-1, (count, size)) for t in (q, k, v)))
        return CudnnFp8().fused(*asked(q, k, v.unflatten(-1, (count, size)), norm, norm, rope))

    @SETTINGS
    @given(for_q=layouts(), for_k=layouts(), for_v=layouts())
    def check(for_q, for_k, for_v):
        shape = (2, tokens, count * size)
        q, k, v = (layout.build(shape, torch.bfloat16, "cuda") for layout in (for_q, for_k, for_v))
        before = [bits(t) for t in (q, k, v)]
        got, want = run(q, k, v), run(fresh(q), fresh(k), fresh(v))
        assert all(torch.equal(bits(t), b) for t, b in zip((q, k, v), before, strict=True))
        assert got.isfinite().all() and relative(got, want) < 1e-3

    check()


def compiled_forms(device):
    inputs = projections(grid=(2, 8, 8), dtype=torch.bfloat16, device=device)
    backend = CudnnFp8()

    def both(q, k, v, norm_q, norm_k, rope):
        given = asked(q, k, v, norm_q, norm_k, rope)
        rows = backend.fused_rows(*given)
        return backend.fused(*given) * 2, backend(v, v, v), rows.values, rows.scale

    return both, inputs


@torch.no_grad()
@pytest.mark.cuda
def test_compiles_without_graph_break_on_a_gpu():
    runs_here()
    both, inputs = compiled_forms("cuda")
    got, want = torch.compile(both, fullgraph=True)(*inputs), both(*inputs)
    assert all(relative(a.float(), b.float()) < 1e-2 for a, b in zip(got, want, strict=True))


@torch.no_grad()
def test_traces_without_graph_break():
    # The kernel cannot run here, so the traced graph is looked at and not run.
    names, (both, inputs) = set(), compiled_forms("cpu")

    def look(graph, _):
        names.update(name for node in graph.graph.nodes for name in str(node.target).split("."))
        (results,) = graph.graph.output_node().args
        shapes = [(r.meta["example_value"].shape, r.meta["example_value"].dtype) for r in results]
        return lambda *_: [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]

    results = torch.compile(both, fullgraph=True, backend=look)(*inputs)
    assert {"norm_rope_mean", "norm_rope_fp8", "rotate_fp8", "tensor_fp8", "sdpa_fp8", "expand_fp8"} <= names
    assert results[0].shape == inputs[2].shape and results[2].shape == inputs[0].shape


@torch.no_grad()
@pytest.mark.cuda
def test_operator_is_well_formed():
    runs_here()
    (q, sq), (k, sk), (v, sv) = (tensor_fp8(t.cuda()) for t in heads(256, 64, 2))
    torch.library.opcheck(attention_cudnn._sdpa_fp8, (q, k, v, sq, sk, sv), test_utils=("test_faketensor",))


RUN = """
import torch
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8
q, k, v = (torch.randn(1, 256, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
assert CudnnFp8()(q, k, v).isfinite().all()
"""


@pytest.mark.cuda
def test_the_end_of_a_process_is_quiet():
    runs_here()
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert "leaked" not in done.stdout + done.stderr, done.stderr[:500]
