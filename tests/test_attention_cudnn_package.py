"""cuDNN's FP8 attention: the reasons it gives, and the calls that the package gets."""

import sys
import types

import pytest
import torch
from forked import forked  # noqa: F401
from layouts import Layout, bits
from wanvideo_wrapper.attention_backends import cudnn as attention_cudnn
from wanvideo_wrapper.attention_backends import packages
from wanvideo_wrapper.attention_backends.cudnn import compiled_graph, declared_graph, uid, why_not
from wanvideo_wrapper.attention_backends.fp8 import first_run
from wanvideo_wrapper.kernels.norm_rope_fp8 import tensor_fp8
from wanvideo_wrapper.tensor_layout import is_kernel_ready

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def capable(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with_triton(monkeypatch, "3.4.0")
    monkeypatch.setattr(attention_cudnn, "first_run", lambda backend, device, head_dim: None)


def with_triton(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version, jit=None))


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
    with monkeypatch.context() as older:
        with_triton(older, "3.3.1")
        assert "Triton 3.3 cannot compile its rotation, it needs 3.4 (PyTorch 2.8)" in why_not(CUDA, 128)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in why_not(CUDA, 128)


def test_a_broken_triton_is_a_reason(monkeypatch, tmp_path, forked):  # noqa: F811
    monkeypatch.setattr(packages, "other_process", forked)
    capable(monkeypatch)
    monkeypatch.delitem(sys.modules, "triton")
    (tmp_path / "triton.py").write_text("raise ImportError('DLL load failed while importing libtriton\\nSee the docs')")
    monkeypatch.syspath_prepend(tmp_path)
    packages._tried.cache_clear()
    reason = why_not(CUDA, 128)
    packages._tried.cache_clear()
    assert reason.endswith("'triton' cannot be imported: ImportError: DLL load failed while importing libtriton")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "OSError: libcudnn.so.9: cannot open"),
        ("import os; os.abort()", "the process crashed"),
        ("", "AttributeError: cudnn has no 'pygraph'"),
    ],
)
def test_it_is_first_imported_in_a_process_of_its_own(body, why, monkeypatch, tmp_path, forked):  # noqa: F811
    monkeypatch.setattr(packages, "other_process", forked)
    capable(monkeypatch)
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    (tmp_path / "cudnn.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
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
    capable(monkeypatch)
    with_cudnn(monkeypatch, 91900)
    monkeypatch.setattr(attention_cudnn, "first_run", lambda backend, device, size: first_run(backend, CPU, size))
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
