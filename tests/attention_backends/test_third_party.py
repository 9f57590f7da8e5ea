"""The options behind optional packages, through stand-ins that enforce the kernels' contracts."""

import importlib.metadata
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import attention_stand_ins
import pytest
import torch
from attention_stand_ins import PACKAGES, blackwell, install, pretend  # noqa: F401
from forked import forked  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import bits, fresh, layouts, relative
from test_attention import formula
from wanvideo_wrapper import attention, tensor_layout
from wanvideo_wrapper.attention import ATTENTION_MODES, BACKENDS, AttentionCall, AttentionSpec, resolve
from wanvideo_wrapper.attention_backends import packages, sage
from wanvideo_wrapper.tensor_layout import is_kernel_ready

CPU = torch.device("cpu")
SPEC = AttentionSpec(device=CPU, heads=3, head_dim=64)
THIRD_PARTY = [
    "flash_attn_2", "flash_attn_3", "sageattn", "sageattn_3", "sageattn_compiled", "sageattn_3_fp4", "sageattn_3_fp8",
    "sageattn_varlen",
]  # fmt: skip
QUICK = settings(max_examples=20)


def capability_of(name):
    return (9, 0) if name == "flash_attn_3" else (12, 0)


def test_the_list_is_the_original_s_then_ours():
    assert ATTENTION_MODES == (
        "sdpa", "flash_attn_2", "flash_attn_3", "sageattn", "sageattn_3", "radial_sage_attention",
        "sageattn_compiled", "sageattn_ultravico", "comfy", "sageattn_3_fp4", "sageattn_3_fp8", "sageattn_varlen",
        "cudnn_fp8", "sol_attn", "fa3_fp8", "auto_fp8",
    )  # fmt: skip


@pytest.mark.parametrize("name", THIRD_PARTY)
@QUICK
@given(data=st.data(), dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
def test_any_layout(name, data, dtype, monkeypatch):
    """Whatever memory q, k, v lie in: the contract is kept, they are unchanged, the output is dense and its own."""
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    backend = resolve(name, SPEC)
    batch, queries, keys = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)))
    shapes = ((batch, queries, 3, 64), (batch, keys, 3, 64), (batch, keys, 3, 64))
    q, k, v = (data.draw(layouts()).build(shape, dtype) for shape in shapes)
    before = [bits(t) for t in (q, k, v)]
    out = backend(q, k, v)
    assert all(torch.equal(a, bits(t)) for a, t in zip(before, (q, k, v), strict=True))
    assert out.shape == q.shape and out.dtype == dtype and is_kernel_ready(out, strided=False)
    memory = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    assert out.untyped_storage().data_ptr() not in memory
    assert torch.equal(out, backend(fresh(q), fresh(k), fresh(v)))


@pytest.mark.parametrize("name", [name for name in THIRD_PARTY if name not in ("sageattn_3", "sageattn_3_fp4")])
def test_equals_the_formula(name, monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    q, k, v = (torch.randn(2, 33, 3, 64) + 0.5 for _ in range(3))
    assert relative(resolve(name, SPEC)(q, k, v), formula(q, k, v)) < 0.02


@pytest.mark.parametrize("name", [name for name in ATTENTION_MODES if name not in ("sdpa", "auto_fp8")])
def test_masks_are_refused(name, monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    q, k, v = (torch.randn(1, 8, 3, 64) for _ in range(3))
    with pytest.raises(ValueError, match=f"'{name}' takes no mask"):
        BACKENDS[name].make(SPEC)(q, k, v, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    assert not BACKENDS[name].masks


@pytest.mark.parametrize("name", [name for name in THIRD_PARTY if name not in ("sageattn_3", "sageattn_3_fp4")])
def test_padded_keys_do_not_count(name, monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    q, k, v = (torch.randn(2, 12, 3, 64) for _ in range(3))
    got = attention.attend(resolve(name, SPEC), AttentionCall(q, k, v, k_lens=(5, 12)))
    assert relative(got[:1], formula(q[:1], k[:1, :5], v[:1, :5])) < 0.02
    assert relative(got[1:], formula(q[1:], k[1:], v[1:])) < 0.02


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "why"),
    [
        ("sageattn", (7, 5), 128, "needs compute capability 8.0 or newer, and this GPU has 7.5"),
        ("sageattn", (8, 6), 80, "takes heads of 64 or 96 or 128 channels, and this model's have 80"),
        ("sageattn_varlen", (8, 6), 96, "takes heads of 64 or 128 channels"),
        ("sageattn_3_fp8", (8, 6), 128, "needs compute capability 8.9 or newer"),
        ("sageattn_3_fp4", (9, 0), 128, "needs compute capability 12.0 or 12.1, and this GPU has 9.0"),
        ("sageattn_3_fp4", (12, 0), 96, "takes heads of 64 or 128 channels"),
        ("flash_attn_3", (12, 0), 128, "needs compute capability 9.0"),
        ("flash_attn_2", (8, 0), 320, "up to 256 channels"),
        ("sol_attn", (9, 0), 64, "takes heads of 128 channels"),
    ],
)
def test_reasons(name, capability, head_dim, why, monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, capability)
    with pytest.raises(ValueError, match=f"'{name}' cannot run because") as error:
        resolve(name, AttentionSpec(device=CPU, heads=3, head_dim=head_dim))
    message = str(error.value)
    assert why in message and all(mode in message for mode in ATTENTION_MODES)


@pytest.mark.parametrize("module", ["flash_attn_interface", "fa3_fwd_interface"])
def test_flash_3_comes_from_either_package(module, monkeypatch):
    pretend(monkeypatch, (9, 0))
    install(monkeypatch, {module: PACKAGES["flash_attn_interface"]})
    q, k, v = (torch.randn(1, 9, 3, 64) for _ in range(3))
    assert relative(resolve("flash_attn_3", SPEC)(q, k, v), formula(q, k, v)) < 0.02
    half = attention.reason("flash_attn_3", replace(SPEC, dtype=torch.float16))
    assert half is None if module == "flash_attn_interface" else "has no kernels for float16" in half


def test_a_model_that_needs_masks_gets_only_what_takes_them(monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, (12, 0))
    masked = AttentionSpec(device=CPU, heads=3, head_dim=64, masked=True)
    assert resolve("sdpa", masked).name == "sdpa"
    for name in THIRD_PARTY:
        assert "takes no mask" in attention.reason(name, masked)


def test_missing_packages_and_functions_are_named(monkeypatch):
    pretend(monkeypatch, (12, 0))
    install(monkeypatch, {"sageattention": {"sageattn": attention_stand_ins.sageattn}})
    assert attention.reason("sageattn", SPEC) is None
    assert "has no 'sageattn_qk_int8_pv_fp8_cuda'" in attention.reason("sageattn_3_fp8", SPEC)
    assert "'sageattn3' or 'sageattn' or 'sage3' is not installed" in attention.reason("sageattn_3_fp4", SPEC)


def test_a_missing_kernel_of_the_ends_is_named(monkeypatch):
    pretend(monkeypatch, (12, 0))
    install(monkeypatch, {"sageattn3": attention_stand_ins.PACKAGES["sageattn3"]})
    why = attention.reason("sageattn_3", SPEC)
    assert why.startswith("'sageattn', which its first and last step run, cannot: ") and "not installed" in why


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise OSError('DLL load failed while importing _fused')", "OSError: DLL load failed while importing _fused"),
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process crashed"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (
            "import sys; sys.stderr.buffer.write(b'f\\xfcr \\xff\\n'); raise OSError('not for this GPU')",
            "not for this GPU",
        ),
        (
            "raise ImportError('undefined symbol: x\\nSee https://example.invalid/help')",
            "ImportError: undefined symbol: x",
        ),
        (
            "import atexit; atexit.register(print, 'E: late', file=__import__('sys').stderr); raise OSError('a')",
            "OSError: a",
        ),
    ],
)
def test_broken_packages_stay_in_their_own_process(body, why, monkeypatch, tmp_path, forked):  # noqa: F811
    if "stderr" not in body:
        # What becomes of the last words of an interpreter is seen in one that is started.
        monkeypatch.setattr(packages, "other_process", forked)
    (tmp_path / "sageattention.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    pretend(monkeypatch, (8, 9))
    packages._tried.cache_clear()
    with pytest.raises(ValueError, match="'sageattn' cannot run") as error:
        resolve("sageattn", SPEC)
    assert why in str(error.value) and "sageattention" not in sys.modules
    packages._tried.cache_clear()


@pytest.mark.slow
def test_paths_that_others_added_do_no_harm(monkeypatch, tmp_path):
    (tmp_path / "sageattention.py").write_text("def sageattn(): pass")
    (tmp_path / "tokenize.py").write_text("raise RuntimeError('another pack has a module of this name')")
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, str(tmp_path), ""])
    packages._tried.cache_clear()
    assert packages.trouble(("sageattention", "sageattn")) is None
    packages._tried.cache_clear()


@pytest.mark.slow
def test_a_sound_package_is_imported_when_it_first_runs(monkeypatch, tmp_path):
    (tmp_path / "sageattention.py").write_text("from attention_stand_ins import sageattn\n")
    here = Path(attention_stand_ins.__file__).parent
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(here), *sys.path])
    pretend(monkeypatch, (8, 9))
    packages._tried.cache_clear()
    backend = resolve("sageattn", SPEC)
    assert "sageattention has no 'sageattn_varlen'" in attention.reason("sageattn_varlen", SPEC)
    assert "sageattention" not in sys.modules
    q, k, v = (torch.randn(1, 9, 3, 64) for _ in range(3))
    assert relative(backend(q, k, v), formula(q, k, v)) < 0.02
    packages._tried.cache_clear()
    monkeypatch.delitem(sys.modules, "sageattention")


def test_the_line_that_says_what_happened():
    cuda = (
        'Traceback (most recent call last):\n  File "x.py", line 3, in <module>\n    main()\n'
        "torch.AcceleratorError: CUDA error: misaligned address\n"
        "CUDA kernel errors might be asynchronously reported, so the stacktrace below might be incorrect.\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    )
    for status in (-11, 0xC0000005):
        assert "crashed" in packages.outcome(subprocess.CompletedProcess([], status, "", "W: some warning\n"))
    said = packages.outcome(subprocess.CompletedProcess([], 1, "", cuda))
    assert said == "torch.AcceleratorError: CUDA error: misaligned address"
    assert packages.outcome(subprocess.CompletedProcess([], 1, "", "W: old\nit gave NaN\n")) == "it gave NaN"
    assert "crashed" in packages.outcome(subprocess.CompletedProcess([], -11, "", "anything"))


@pytest.mark.parametrize(("version", "fits"), [("2.2.0", False), ("1.0.6", True), (None, True)])
def test_gpus_that_sageattention_picks_no_kernel_for(version, fits, monkeypatch):
    install(monkeypatch, {"sageattention": PACKAGES["sageattention"]})

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    pretend(monkeypatch, (8, 9))
    assert attention.reason("sageattn", SPEC) is None
    pretend(monkeypatch, (10, 0))
    why = attention.reason("sageattn", SPEC)
    assert (why is None) if fits else why.startswith("SageAttention 2.2.0 picks no kernel for compute capability 10.0")


def test_noise_above_a_token_limit_is_refused(blackwell):  # noqa: F811
    long = torch.empty(1, sage.NOISY_KEYS + 1, 1, 1).expand(1, -1, 1, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sage, "capability", lambda device: (12, 0))
        with pytest.raises(ValueError, match="noise above 160000 tokens"):
            resolve("sageattn", SPEC)(long[:, :2], long, long)


def test_hopper_has_an_eight_bit_kernel_of_its_own(monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, (9, 0))
    assert resolve("sageattn_3_fp8", SPEC).kernel is sage.FP8_HOPPER
    # SageAttention 2.0 had none for it.
    monkeypatch.delattr(sys.modules["sageattention"], "sageattn_qk_int8_pv_fp8_cuda_sm90")
    assert "has no 'sageattn_qk_int8_pv_fp8_cuda_sm90'" in attention.reason("sageattn_3_fp8", SPEC)
    pretend(monkeypatch, (8, 9))
    assert resolve("sageattn_3_fp8", SPEC).kernel is sage.FP8


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_compiles_without_graph_break(name, monkeypatch):
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 9, 3, 64) for _ in range(3))
    backend = resolve(name, SPEC)
    compiled = torch.compile(lambda q, k, v: backend(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), 2 * backend(q, k, v))


@pytest.mark.parametrize("name", [name for name in THIRD_PARTY if name.startswith("flash")])
def test_kernels_that_leave_k_alone_get_no_copy_of_it(name, monkeypatch):
    """A copy of K is a pass over memory."""
    install(monkeypatch)
    pretend(monkeypatch, capability_of(name))
    q, k, v = (torch.randn(1, 64, 3, 64).bfloat16() for _ in range(3))
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **options: copied.append(t) or torch.empty_like(t).copy_(t))
    resolve(name, SPEC)(q, k, v)
    assert not copied
    attention.resolve("sageattn", SPEC)(q, k, v)
    assert len(copied) == 1


def test_the_host_s_own_attention(monkeypatch):
    from wanvideo_wrapper.attention_backends import comfy

    host = types.SimpleNamespace(attention=lambda: None)
    monkeypatch.setattr(comfy, "get_host", lambda: host)
    assert "this is not ComfyUI" in attention.reason("comfy", SPEC)

    def of_comfyui(q, k, v):
        k.sub_(k.mean(2, keepdim=True))
        return attention_stand_ins.exact(q, k, v).transpose(1, 2).flatten(2)

    host.attention = lambda: of_comfyui
    q, k, v = (torch.randn(2, 9, 3, 64) for _ in range(3))
    before = k.clone()
    assert relative(resolve("comfy", SPEC)(q, k, v), formula(q, k, v)) < 1e-5
    assert torch.equal(before, k)
