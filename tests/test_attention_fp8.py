"""FP8 attention by each of its kernels: its error by the roundings it makes, in a block, and on a GPU.

The kernels themselves run on a GPU only; elsewhere `fp8_attention_model.py` stands for them, behind the same operators.
"""

import subprocess
import sys
import types

import pytest
import torch
from fp8_attention_model import cudnn_reference, exact, flash_3_reference
from hypothesis import given
from layouts import SETTINGS, bits, fresh, layouts, relative
from wanvideo_wrapper.attention import AttentionSpec, reason, resolve, sdpa
from wanvideo_wrapper.attention_backends import auto_fp8, contract, flash_fp8
from wanvideo_wrapper.attention_backends import cudnn as attention_cudnn
from wanvideo_wrapper.attention_backends.auto_fp8 import AutoFp8
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8
from wanvideo_wrapper.attention_backends.flash_fp8 import Flash3Fp8
from wanvideo_wrapper.kernels.fp8_rows import Fp8Rows
from wanvideo_wrapper.kernels.norm_rope_fp8 import norm_rope_eager, tensor_fp8
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.block import WanAttentionBlock
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, Text

# What four roundings to E4M3 cost on normal random numbers is 0.054, and five, as cuDNN's result has one, 0.060.
FLOOR = {"cudnn_fp8": 0.055, "fa3_fp8": 0.049}
TARGET = {"cudnn_fp8": 0.062, "fa3_fp8": 0.056}
KERNELS = (CudnnFp8(), Flash3Fp8())
# So many heads that the error hardly depends on the draw.
SIZES = [(64, 24), (128, 12)]
CUDA = torch.device("cuda")


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def backend(request):
    return request.param


@pytest.fixture
def modelled(monkeypatch):
    """The references in place of the kernels."""
    monkeypatch.setattr(attention_cudnn, "_sdpa_fp8", cudnn_reference)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    interface = types.SimpleNamespace(flash_attn_func=flash_3_reference)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", interface)


def heads(tokens, size, count, batch=1):
    return torch.randn(3, batch, tokens, count, size).unbind()


def with_outliers(q, k):
    """4 channels of q and k 8 times larger, every head at a root mean square of 1."""
    channels = torch.randperm(q.shape[-1])[:4]
    for t in (q, k):
        t[..., channels] *= 8
        t /= t.square().mean(-1, keepdim=True).sqrt()
    return q, k


def unrotated(backend, q, k, v):
    """The same roundings of q, k as they are."""
    return backend.wide(backend.attend(tensor_fp8(q), tensor_fp8(k), tensor_fp8(v)), torch.float32)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_error_on_normal_numbers(size, count, backend, modelled):
    q, k, v = heads(1024, size, count)
    error = relative(backend(q, k, v), exact(q, k, v))
    assert FLOOR[backend.name] < error <= TARGET[backend.name]


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_error_with_outliers(size, count, backend, modelled):
    q, k, v = heads(1024, size, count)
    q, k = with_outliers(q, k)
    want, target = exact(q, k, v), 1.1 * TARGET[backend.name]
    assert relative(backend(q, k, v), want) <= target
    assert relative(unrotated(backend, q, k, v), want) > 1.5 * target


def test_error_with_keys_far_from_zero(backend, modelled):
    q, k, v = heads(1024, 128, 12)
    k += torch.randn(128) * 3
    want, target = exact(q, k, v), TARGET[backend.name]
    assert relative(backend(q, k, v), want) <= target
    assert relative(unrotated(backend, q, k, v), want) > 1.3 * target


@pytest.mark.parametrize("keys", [100, 700])
def test_keys_of_another_number_and_mean_in_each_video(keys, backend, modelled):
    q, (k, v) = heads(300, 128, 6, batch=2)[0], heads(keys, 128, 6, batch=2)[1:]
    k += torch.randn(2, 1, 6, 128) * 3
    assert relative(backend(q, k, v), exact(q, k, v)) <= 1.1 * TARGET[backend.name]


def test_magnitudes_do_not_matter(backend, modelled):
    q, k, v = heads(512, 128, 12)
    want = relative(backend(q, k, v), exact(q, k, v))
    for factor in (2.0**-40, 3e-3, 1.7, 1e4):
        got = relative(backend(q * factor, k / factor, v * factor), exact(q, k, v * factor))
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
def test_fused_equals_its_steps(backend, modelled):
    inputs = projections(batch=2)
    want = reference_of(*inputs)
    got = backend.fused(*asked(*inputs))
    assert got.shape == want.shape and got.dtype == torch.float32 and relative(got, want) < 0.08
    rows = backend.fused_rows(*asked(*inputs))
    assert isinstance(rows, Fp8Rows) and rows.dtype == inputs[0].dtype
    check_rows(backend, rows, got)


def check_rows(backend, rows, wide):
    """FP8 rows stand for the same heads: exactly where the kernel itself gives them, rounded by row elsewhere."""
    if isinstance(backend, CudnnFp8):
        assert torch.equal(rows.to(wide.dtype), wide.flatten(2))
    else:
        assert 0.02 < relative(rows.to(torch.float32), wide.flatten(2)) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("tokens", [256, 255])
def test_auto_runs_cudnn_where_keys_fill_its_tiles(tokens, modelled):
    auto = AutoFp8(tiled="cudnn_fp8", other="fa3_fp8")
    want = CudnnFp8() if tokens == 256 else Flash3Fp8()
    inputs = projections(grid=(1, 1, tokens), size=64)
    assert torch.equal(auto.fused(*asked(*inputs)), want.fused(*asked(*inputs)))
    rows, others = auto.fused_rows(*asked(*inputs)), want.fused_rows(*asked(*inputs))
    assert torch.equal(bits(rows.values), bits(others.values)) and torch.equal(rows.scale, others.scale)
    # Positions of each video's own.
    inputs = projections(batch=2, grid=(1, 1, tokens), size=64)
    inputs = *inputs[:-1], inputs[-1].expand(2, -1, -1, -1)
    assert torch.equal(auto.fused(*asked(*inputs)), want.fused(*asked(*inputs)))
    assert torch.equal(bits(auto.fused_rows(*asked(*inputs)).values), bits(want.fused_rows(*asked(*inputs)).values))
    q, k, v = heads(tokens, 64, 2)
    assert torch.equal(auto(q[:, :100], k, v), want(q[:, :100], k, v))
    with pytest.raises(ValueError, match="takes no mask"):
        auto(q, k, v, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("keys", "room"),
    [(32760, 32768), (75600, 75776), (48384, 48384), (65281, 65536), (65279, 65280), (40000, 40000), (255, 255)],
)
def test_cudnn_fills_its_last_tile_where_zeros_weigh_nothing(keys, room):
    assert CudnnFp8().room(keys) == room and Flash3Fp8().room(keys) == keys


@torch.no_grad()
def test_keys_of_zeros_change_nothing(modelled, monkeypatch):
    """One in 200, where the option itself allows one in 256."""
    monkeypatch.setattr(attention_cudnn, "LEAST_KEYS", 200)
    (q, k, v), reference, seen = heads(1019, 128, 12), attention_cudnn._sdpa_fp8, []
    k += torch.randn(128) * 3

    def noting(q, k, v, *scales):
        seen.append((k.shape[1], bool(k[:, 1019:].float().any() or v[:, 1019:].float().any())))
        return reference(q, k, v, *scales)

    monkeypatch.setattr(attention_cudnn, "_sdpa_fp8", noting)
    want = exact(q, k, v)
    filled = CudnnFp8()(q, k, v)
    assert relative(filled, want) <= TARGET["cudnn_fp8"]
    monkeypatch.setattr(attention_cudnn, "LEAST_KEYS", 10**9)
    assert 0 < relative(filled, CudnnFp8()(q, k, v)) < 0.02
    monkeypatch.setattr(attention_cudnn, "LEAST_KEYS", 200)
    inputs = projections(grid=(1, 1, 1019))
    assert relative(CudnnFp8().fused(*asked(*inputs)), reference_of(*inputs)) < 0.08
    assert seen == [(1024, False), (1019, False), (1024, False)]


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
def test_a_block_runs_it_fused(quantized, backend, modelled, monkeypatch):
    (block, called), kind = (block_of(quantized), []), type(backend)
    for name in ("fused", "fused_rows"):
        inner = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, inner=inner, name=name: (called.append(name), inner(*a))[1])
    rope = rope_table((2, 8, 8), 128)
    x = torch.randn(1, rope.shape[0], 256)
    text = Text(torch.randn(1, 8, 256))
    inputs = BlockInputs(torch.randn(1, 1, 6, 256), None, rope, text, (2, 8, 8))
    want = block(x, inputs)
    block.self_attn.attention = backend
    got = block(x, inputs)
    assert called == ["fused_rows" if quantized else "fused"]
    assert 0 < relative(got - x, want - x) < 0.06


def test_a_mask_is_refused(backend):
    q, k, v = heads(8, 64, 1)
    with pytest.raises(ValueError, match=f"'{backend.name}' takes no mask: choose 'sdpa'"):
        backend(q, k, v, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


def runs_here(backend):
    why = reason(backend.name, AttentionSpec(device=CUDA, heads=2, head_dim=128))
    if why is not None:
        pytest.skip(why)


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [256, 1000, 4095, 32760])
@pytest.mark.parametrize(("size", "count"), SIZES)
def test_on_a_gpu(size, count, tokens, backend):
    runs_here(backend)
    floor, target = FLOOR[backend.name], TARGET[backend.name]
    q, k, v = (t.cuda().bfloat16() for t in heads(tokens, size, count))
    want = sdpa_float32(q, k, v)
    before = [bits(t) for t in (q, k, v)]
    got = backend(q, k, v)
    assert got.dtype == q.dtype and got.is_contiguous() and floor < relative(got, want) <= target + 0.003
    assert all(torch.equal(bits(t), b) for t, b in zip((q, k, v), before, strict=True))
    q, k = with_outliers(q.float(), k.float())
    q, k = q.bfloat16(), k.bfloat16()
    assert relative(backend(q, k, v), sdpa_float32(q, k, v)) <= 1.1 * target + 0.003


def sdpa_float32(q, k, v):
    """In parts of the queries, so that the scores fit."""
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    parts = [(part @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v for part in q.split(512, dim=2)]
    return torch.cat(parts, dim=2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.cuda
def test_equals_its_model_on_a_gpu(backend):
    runs_here(backend)
    for keys in (700, 1024):
        q, k, v = (t.cuda() for t in heads(1024, 128, 4))
        (q, sq), (k, sk), (v, sv) = (tensor_fp8(t) for t in (q, k[:, :keys], v[:, :keys]))
        got = backend.wide(backend.attend((q, sq), (k, sk), (v, sv)), torch.float32)
        # Kernels round probabilities against a running maximum, so that they and the result fall on other steps.
        if isinstance(backend, CudnnFp8):
            want = cudnn_reference(q, k, v, sq, sk, sv).float() * sv
        else:
            want = flash_3_reference(q, k, v, *(scale.expand(1, 4) for scale in (sq, sk, sv))).float()
        assert relative(got, want) < 0.06


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_on_a_gpu(dtype, backend):
    runs_here(backend)
    inputs = projections(batch=2, count=12, dtype=dtype, device="cuda")
    got = backend.fused(*asked(*inputs))
    assert got.dtype == dtype and relative(got, reference_of(*inputs)) < 0.08
    check_rows(backend, backend.fused_rows(*asked(*inputs)), got)
    streamed = torch.cuda.Stream()
    streamed.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(streamed):
        again = backend.fused(*asked(*inputs))
    torch.cuda.current_stream().wait_stream(streamed)
    assert torch.equal(again, got)


@torch.no_grad()
@pytest.mark.cuda
def test_no_host_synchronization(backend):
    runs_here(backend)
    inputs = projections(dtype=torch.bfloat16, device="cuda")
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
    runs_here(CudnnFp8())
    script = (
        "import torch\n"
        "from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8\n"
        "CudnnFp8()(*torch.randn(3, 1, 256, 2, 64, device='cuda', dtype=torch.bfloat16))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"nanobind", "leaked"} & set((done.stdout + done.stderr).replace(":", " ").split())


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["call", "fused"])
def test_any_layout_on_a_gpu(form, backend):
    runs_here(backend)
    tokens, count, size = 77, 2, 64
    norm, rope = WanRMSNorm(count * size, 1e-6).cuda(), rope_table((1, 7, 11), size, device=CUDA)

    def run(q, k, v):
        if form == "call":
            return backend(*(t.unflatten(-1, (count, size)) for t in (q, k, v)))
        return backend.fused(*asked(q, k, v.unflatten(-1, (count, size)), norm, norm, rope))

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


def compiled_forms(backend, device):
    inputs = projections(grid=(2, 8, 8), dtype=torch.bfloat16, device=device)

    def both(q, k, v, norm_q, norm_k, rope):
        given = asked(q, k, v, norm_q, norm_k, rope)
        rows = backend.fused_rows(*given)
        return backend.fused(*given) * 2, backend(v, v, v), rows.values, rows.scale

    return both, inputs


@torch.no_grad()
@pytest.mark.cuda
def test_compiles_without_graph_break_on_a_gpu(backend):
    runs_here(backend)
    both, inputs = compiled_forms(backend, "cuda")
    got, want = torch.compile(both, fullgraph=True)(*inputs), both(*inputs)
    assert all(relative(a.float(), b.float()) < 1e-2 for a, b in zip(got, want, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "operators"),
    [
        (CudnnFp8(), {"sdpa_fp8", "expand_fp8"}),
        (Flash3Fp8(), {"flash_3_fp8", "fp8_quantize"}),
        (AutoFp8(tiled="cudnn_fp8", other="fa3_fp8"), {"flash_3_fp8", "fp8_quantize"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_traces_without_graph_break(backend, operators):
    # The kernel cannot run here, so the traced graph is looked at and not run.
    names, (both, inputs) = set(), compiled_forms(backend, "cpu")

    def look(graph, _):
        names.update(name for node in graph.graph.nodes for name in str(node.target).split("."))
        (results,) = graph.graph.output_node().args
        shapes = [(r.meta["example_value"].shape, r.meta["example_value"].dtype) for r in results]
        return lambda *_: [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]

    results = torch.compile(both, fullgraph=True, backend=look)(*inputs)
    assert {"norm_rope_mean", "norm_rope_fp8", "rotate_fp8", "tensor_fp8"} | operators <= names
    assert results[0].shape == inputs[2].shape and results[2].shape == inputs[0].shape


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "operator"),
    [(CudnnFp8(), attention_cudnn._sdpa_fp8), (Flash3Fp8(), flash_fp8._flash_3_fp8)],
    ids=["cudnn_fp8", "fa3_fp8"],
)
def test_operator_is_well_formed(backend, operator):
    runs_here(backend)
    (q, sq), (k, sk), (v, sv) = (tensor_fp8(t.cuda()) for t in heads(256, 64, 2))
    torch.library.opcheck(operator, (q, k, v, sq, sk, sv), test_utils=("test_faketensor",))


@pytest.mark.parametrize(
    ("cudnn", "flash", "made"),
    [
        (None, None, AutoFp8(tiled="cudnn_fp8", other="fa3_fp8")),
        ("no cuDNN", None, AutoFp8(tiled="fa3_fp8", other="fa3_fp8")),
        (None, "no Hopper", AutoFp8(tiled="cudnn_fp8", other="cudnn_fp8")),
        ("no cuDNN", "no Hopper", "none of its kernels can: cudnn_fp8: no cuDNN; fa3_fp8: no Hopper"),
    ],
)
def test_auto_takes_what_there_is(cudnn, flash, made, monkeypatch):
    rows = {"cudnn_fp8": cudnn, "fa3_fp8": flash}
    monkeypatch.setattr(
        auto_fp8, "ROWS", {name: types.SimpleNamespace(reason=lambda spec, why=why: why) for name, why in rows.items()}
    )
    spec = AttentionSpec(device=torch.device("cpu"), heads=2, head_dim=64)
    if isinstance(made, str):
        with pytest.raises(ValueError, match="'auto_fp8' cannot run because " + made):
            resolve("auto_fp8", spec)
    else:
        assert resolve("auto_fp8", spec) == made


def test_flash_3_says_what_is_missing(monkeypatch):
    spec = AttentionSpec(device=torch.device("cpu"), heads=2, head_dim=64)
    monkeypatch.setattr(contract, "capability", lambda device: (12, 0))
    assert "needs compute capability 9.0" in reason("fa3_fp8", spec)
    monkeypatch.setattr(contract, "capability", lambda device: (9, 0))
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "'flash_attn_interface' or 'fa3_fwd_interface' is not installed" in reason("fa3_fp8", spec)
    interface = types.SimpleNamespace(flash_attn_func=flash_3_reference)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", interface)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0", jit=None))
    assert reason("fa3_fp8", spec) is None
    # A build without FP8.
    interface.flash_attn_func = lambda *tensors, **scales: 1 / 0
    assert "a first small run failed with ZeroDivisionError" in reason("fa3_fp8", spec)

    def wordless(*tensors, **scales):
        raise AssertionError

    interface.flash_attn_func = wordless
    assert reason("fa3_fp8", spec).endswith("failed with AssertionError: no message")
    interface.flash_attn_func = lambda q, k, v, **scales: torch.full(q.shape, float("nan"))
    assert reason("fa3_fp8", spec) == "a first small run gave numbers that are not finite"
