"""cuDNN's FP8 attention: its error by the roundings it makes, the calls it gets, and the reasons it gives.

The kernel itself runs on a GPU only; elsewhere `cudnn_model.py` stands for it, behind the same operators.
"""

import sys
import types

import pytest
import torch
from cudnn_model import cudnn_fp8_reference, exact
from hypothesis import HealthCheck, given, settings
from layouts import Layout, bits, fresh, layouts, relative
from wanvideo_wrapper import attention_cudnn
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.attention_backends import packages
from wanvideo_wrapper.attention_cudnn import CudnnFp8, compiled_graph, declared_graph, uid, why_not
from wanvideo_wrapper.kernels.fp8_rows import Fp8Rows
from wanvideo_wrapper.kernels.norm_rope_fp8 import norm_rope_eager, tensor_fp8
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.tensor_layout import is_kernel_ready
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import BlockInputs
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.modules.model import WanAttentionBlock
from wanvideo_wrapper.wanvideo.rope import rope_table

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


def reference_of(q, k, v, norm_q, norm_k, rope):
    placed = (norm_rope_eager(x, n.weight, rope, n.eps, v.shape[2]) for x, n in ((q, norm_q), (k, norm_k)))
    return exact(*placed, v)


@torch.no_grad()
def test_fused_equals_its_steps(modelled):
    inputs = projections(batch=2)
    want = reference_of(*inputs)
    got = CudnnFp8().fused(*inputs)
    assert got.shape == want.shape and relative(got, want) < 0.08
    rows = CudnnFp8().fused_rows(*inputs)
    assert isinstance(rows, Fp8Rows) and rows.dtype == inputs[0].dtype
    assert torch.equal(rows.to(torch.float32), got.flatten(2))


def block_of(quantised):
    config = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=1, in_dim=16, text_dim=32, text_len=8)
    block = WanAttentionBlock(config, sdpa())
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    if quantised:
        for name in "qkvo":
            layer = getattr(block.self_attn, name)
            fast = Fp8MatmulLinear.quantise(layer.weight.detach(), layer.bias.detach(), torch.float8_e4m3fn)
            setattr(block.self_attn, name, fast)
    return block.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("quantised", [False, True])
def test_a_block_runs_it_fused(quantised, modelled, monkeypatch):
    block, called = block_of(quantised), []
    for name in ("fused", "fused_rows"):
        inner = getattr(CudnnFp8, name)
        monkeypatch.setattr(CudnnFp8, name, lambda *a, inner=inner, name=name: (called.append(name), inner(*a))[1])
    rope = rope_table((2, 8, 8), 128)
    x = torch.randn(1, rope.shape[0], 256)
    text = block.cross_attn.keys_values(torch.randn(1, 8, 256))
    inputs = BlockInputs(torch.randn(1, 1, 6, 256), None, rope, text, (2, 8, 8))
    want = block(x, inputs)
    block.self_attn.attention = CudnnFp8()
    got = block(x, inputs)
    assert called == ["fused_rows" if quantised else "fused"]
    assert 0 < relative(got - x, want - x) < 0.06


def test_a_mask_is_refused():
    q, k, v = heads(8, 64, 1)
    with pytest.raises(ValueError, match="'cudnn_fp8' takes no mask; choose sdpa"):
        CudnnFp8()(q, k, v, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


def capable(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(attention_cudnn.importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(attention_cudnn, "_first_run", lambda device, head_dim: None)


def with_cudnn(monkeypatch, version):
    module = types.SimpleNamespace(backend_version=lambda: version, pygraph=None)
    monkeypatch.setitem(sys.modules, "cudnn", module)


def test_reasons(monkeypatch):
    assert why_not(torch.device("cpu"), 128) == "it needs an NVIDIA GPU"
    with monkeypatch.context() as rocm:
        rocm.setattr(torch.version, "hip", "7.0")
        assert "this is one of another maker" in why_not(CUDA, 128)
    capable(monkeypatch, (8, 9))
    assert "A GPU has compute capability 8.9, and it needs 9.0" in why_not(CUDA, 128)
    capable(monkeypatch)
    assert "heads have 96 channels, and it needs 64 or 128" in why_not(CUDA, 96)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert "pip install nvidia-cudnn-frontend" in why_not(CUDA, 128)
    with_cudnn(monkeypatch, 91002)
    assert "cuDNN 91002 is too old, it needs 91501" in why_not(CUDA, 128)
    with_cudnn(monkeypatch, 91900)
    assert why_not(CUDA, 128) is None
    monkeypatch.setattr(attention_cudnn.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in why_not(CUDA, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "OSError: libcudnn.so.9: cannot open"),
        ("import os; os.abort()", "the process crashed"),
        ("", "AttributeError: cudnn has no 'pygraph'"),
    ],
)
def test_it_is_first_imported_in_a_process_of_its_own(body, why, monkeypatch, tmp_path):
    real = attention_cudnn.importlib.util.find_spec
    capable(monkeypatch)
    monkeypatch.setattr(attention_cudnn.importlib.util, "find_spec", lambda name: name == "triton" or real(name))
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    (tmp_path / "cudnn.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages._tried.cache_clear()
    reason = why_not(CUDA, 128)
    packages._tried.cache_clear()
    assert f"'nvidia-cudnn-frontend' cannot be imported: {why}" in reason and "cudnn" not in sys.modules


def test_a_package_that_breaks_only_here_is_a_reason(monkeypatch):
    capable(monkeypatch)
    with_cudnn(monkeypatch, 91900)

    def broken():
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(attention_cudnn, "_cudnn", broken)
    assert "cannot be imported: OSError: libcudnn.so.9" in why_not(CUDA, 128)


def test_a_first_run_that_fails_is_a_reason(monkeypatch):
    first_run = attention_cudnn._first_run
    capable(monkeypatch)
    with_cudnn(monkeypatch, 91900)
    monkeypatch.setattr(attention_cudnn, "_first_run", lambda device, size: first_run(torch.device("cpu"), size))
    assert "a first small run failed with" in why_not(CUDA, 128)


class Recorder:
    """cuDNN's Python interface as far as it is used, with the keywords of its documentation; records every call."""

    data_type = types.SimpleNamespace(FLOAT="float", FP8_E4M3="e4m3")
    heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")

    def __init__(self):
        self.built, self.streams, self.executed = 0, [], []

    def create_handle(self):
        return object()

    def set_stream(self, handle, stream):
        self.streams.append((handle, stream))

    def pygraph(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        return GraphRecorder(self)


class TensorRecorder(types.SimpleNamespace):
    def __getattr__(self, name):
        def setter(value):
            setattr(self, name.removeprefix("set_"), value)
            return self

        return setter


class GraphRecorder:
    def __init__(self, module):
        self.module, self.tensors, self.steps = module, [], []

    def tensor(self, dim, stride, data_type, uid):
        self.tensors.append(TensorRecorder(dim=dim, stride=stride, data_type=data_type, uid=uid))
        return self.tensors[-1]

    def sdpa_fp8(
        self, q, k, v, descale_q, descale_k, descale_v, descale_s, scale_s, scale_o, generate_stats, attn_scale
    ):
        assert not generate_stats
        self.attn_scale = attn_scale
        self.results = [TensorRecorder(), None, TensorRecorder(), TensorRecorder()]
        return self.results

    def build_plans(self):
        self.module.built += 1

    def get_workspace_size(self):
        return 100

    def execute(self, tensors, workspace, handle):
        self.module.executed.append((tensors, workspace, handle))

    def __getattr__(self, name):
        if name in ("validate", "build_operation_graph", "create_execution_plans", "check_support"):
            return lambda *_: self.steps.append(name)
        raise AttributeError(name)


def test_the_graph_says_what_lies_where():
    graph = declared_graph(Recorder(), (2, 70, 3, 64), 50, object())
    by_uid = {t.uid: t for t in [*graph.tensors, graph.results[0], *graph.results[2:]]}
    assert sorted(by_uid) == list(range(1, 13)) and graph.attn_scale == 0.125
    for name, length in (("q", 70), ("k", 50), ("v", 50), ("o", 70)):
        plain = torch.empty(2, length, 3, 64).transpose(1, 2)
        t = by_uid[uid(name)]
        assert (tuple(t.dim), tuple(t.stride), t.data_type) == (tuple(plain.shape), plain.stride(), "e4m3")
    assert all(by_uid[uid(n)].data_type == "float" for n in ("descale_q", "scale_s", "scale_o", "amax_s", "amax_o"))
    assert all(t.output for t in (graph.results[0], *graph.results[2:]))


def test_graphs_are_compiled_once_a_shape(monkeypatch):
    module = Recorder()
    monkeypatch.setattr(attention_cudnn, "_cudnn", lambda: module)
    compiled_graph.cache_clear()
    attention_cudnn._handle.cache_clear()
    shape, there, elsewhere = (1, 32760, 40, 128), torch.device("cuda", 0), torch.device("cuda", 1)
    first = compiled_graph(there, shape, 32760, 1)
    assert compiled_graph(there, (1, 32760, 40, 128), 32760, 1) is first and module.built == 1
    assert first.graph.steps == ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
    others = [(there, shape, 512, 1), (elsewhere, shape, 32760, 1), (there, (1, 32760, 12, 128), 32760, 1),
              (there, (2, 32760, 40, 128), 32760, 1), (there, (1, 48384, 40, 128), 48384, 1),
              (there, shape, 32760, 2)]  # fmt: skip
    graphs = [compiled_graph(*key) for key in others]
    assert len({id(g) for g in [first, *graphs]}) == 7 and module.built == 7
    assert graphs[0].handle is first.handle and graphs[1].handle is not first.handle is not graphs[-1].handle
    compiled_graph.cache_clear()
    attention_cudnn._handle.cache_clear()


def test_a_shape_that_cudnn_cannot_run_is_named(monkeypatch):
    module = Recorder()
    monkeypatch.setattr(attention_cudnn, "_cudnn", lambda: module)
    monkeypatch.setattr(GraphRecorder, "build_plans", lambda self: 1 / 0)
    with pytest.raises(ValueError, match=r"'cudnn_fp8' has no kernel for queries \(1, 5, 2, 64\) and 7 keys"):
        compiled_graph(torch.device("cuda", 0), (1, 5, 2, 64), 7, 1)
    attention_cudnn._handle.cache_clear()


def test_the_call_is_complete(monkeypatch):
    module = Recorder()
    monkeypatch.setattr(attention_cudnn, "_cudnn", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    q, k, v = (Layout("offset", 3, i).place(tensor_fp8(torch.randn(1, 5, 2, 64))[0]) for i in range(3))
    scales = [torch.rand(1) + 0.1 for _ in range(3)]
    compiled_graph.cache_clear()
    attention_cudnn._handle.cache_clear()
    out = attention_cudnn._sdpa_fp8(q, k, v, *scales)
    ((tensors, workspace, handle),) = module.executed
    assert module.streams == [(handle, 77)] and workspace.numel() == 100 and workspace.dtype == torch.uint8
    named = {name: tensors[uid(name)] for name in attention_cudnn.INPUTS + attention_cudnn.OUTPUTS}
    assert len(tensors) == 12 and named["o"].data_ptr() == out.data_ptr()
    assert all(is_kernel_ready(t, strided=False) for t in named.values())
    assert torch.equal(bits(named["k"]), bits(k)) and torch.equal(named["descale_v"], scales[2])
    assert (named["scale_o"] * scales[2] - 1).abs() < 1e-6 and named["scale_s"] * named["descale_s"] == 1
    compiled_graph.cache_clear()
    attention_cudnn._handle.cache_clear()


def test_it_is_the_packages_interface():
    """The real package takes these calls, as far as they go without a GPU."""
    cudnn = pytest.importorskip("cudnn")
    if not hasattr(cudnn, "pygraph"):
        pytest.skip("'cudnn' is some other package")
    graph = declared_graph(cudnn, (1, 256, 2, 128), 256, None)
    assert {name: graph.find_tensor(uid(name)).data_type for name in ("q", "o")} == dict.fromkeys(
        "qo", cudnn.data_type.FP8_E4M3
    )


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
    got = CudnnFp8().fused(*inputs)
    assert got.dtype == dtype and relative(got, reference_of(*inputs)) < 0.08
    rows = CudnnFp8().fused_rows(*inputs)
    assert torch.equal(rows.to(dtype), got.flatten(2))
    streamed = torch.cuda.Stream()
    streamed.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(streamed):
        again = CudnnFp8().fused(*inputs)
    torch.cuda.current_stream().wait_stream(streamed)
    assert torch.equal(again, got)


@torch.no_grad()
@pytest.mark.cuda
def test_no_host_synchronisation():
    runs_here()
    inputs = projections(dtype=torch.bfloat16, device="cuda")
    backend = CudnnFp8()
    backend.fused(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.fused(*inputs)
        backend.fused_rows(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("form", ["call", "fused"])
def test_any_layout_on_a_gpu(form):
    runs_here()
    tokens, count, size = 77, 2, 64
    norm, rope = WanRMSNorm(count * size, 1e-6).cuda(), rope_table((1, 7, 11), size, device=CUDA)

    def run(q, k, v):
        if form == "call":
            return CudnnFp8()(*(t.unflatten(-1, (count, size)) for t in (q, k, v)))
        return CudnnFp8().fused(q, k, v.unflatten(-1, (count, size)), norm, norm, rope)

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
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
        rows = backend.fused_rows(q, k, v, norm_q, norm_k, rope)
        return backend.fused(q, k, v, norm_q, norm_k, rope) * 2, backend(v, v, v), rows.values, rows.scale

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
