"""SageAttention 3 without Blackwell: the wrapper against a strict stand-in, and the stand-in against 4-bit errors."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sage3_stand_in
import torch
from attention_stand_ins import PACKAGES, blackwell, install, pretend  # noqa: F401
from forked import forked  # noqa: F401
from layouts import relative
from test_attention import formula
from wanvideo_wrapper.attention import AttentionSpec, resolve
from wanvideo_wrapper.attention_backends import packages, probe, probe_kernel, sage3
from wanvideo_wrapper.attention_backends.third_party import Kernel
from wanvideo_wrapper.wanvideo.attention_plan import plan_for
from wanvideo_wrapper.wanvideo.conditioning import Step

CPU = torch.device("cpu")
SPEC = AttentionSpec(device=CPU, heads=2, head_dim=64)
NAMES = [
    ("sageattn3", "sageattn3_blackwell"), ("sageattn", "sageattn3_blackwell"), ("sageattn", "sageattn_blackwell"),
    ("sage3", "sageattn3_blackwell"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "function"), NAMES)
def test_both_packages_and_their_names(module, function, monkeypatch):
    pretend(monkeypatch, (12, 0))
    install(monkeypatch, {module: {function: sage3_stand_in.sageattn3_blackwell}})
    q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
    sage3_stand_in.calls.clear()
    resolve("sageattn_3_fp4", SPEC)(q, k, v)
    assert sage3_stand_in.calls == [(1, 2, 100, 64)]


@pytest.mark.parametrize("size", [64, 128])
def test_error_is_that_of_four_bits(blackwell, size):  # noqa: F811
    q, k, v = (torch.randn(2, 300, 2, size) + torch.randn(1, 1, 2, size) for _ in range(3))
    before = [t.clone() for t in (q, k, v)]
    backend = resolve("sageattn_3_fp4", AttentionSpec(device=CPU, heads=2, head_dim=size))
    assert 0.02 < relative(backend(q, k, v), formula(q, k, v)) < 0.3
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_the_stand_in_changes_k_and_refuses_what_the_kernel_cannot_take():
    q, k, v = (torch.randn(1, 2, 32, 64, dtype=torch.bfloat16) for _ in range(3))
    before = k.clone()
    sage3_stand_in.sageattn3_blackwell(q, k, v)
    assert not torch.equal(k, before)
    bad = torch.randn(1, 32, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
    with pytest.raises(AssertionError, match="q is not contiguous"):
        sage3_stand_in.sageattn3_blackwell(bad, k, v)
    storage = torch.randn(k.numel() + 1, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="v is not aligned"):
        sage3_stand_in.sageattn3_blackwell(q, k, storage[1:].view(k.shape))


def test_four_bit_values_by_hand():
    x = torch.tensor([[0.2, 0.3, 0.8, 1.2, 1.3, 1.8, 2.4, 2.6, 3.4, 3.6, 4.9, 5.1, -6.0, -0.3, 0.0, 6.0]])
    want = torch.tensor([[0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 6.0, -6.0, -0.5, 0.0, 6.0]])
    assert torch.equal(sage3_stand_in.four_bits(x), want)


@pytest.mark.parametrize(
    ("heads", "tokens", "per_block", "fits"),
    [
        (40, 75_600, True, True), (40, 82_800, True, True), (40, 83_100, True, False), (56, 73_774, True, False),
        (40, 1_000_000, False, True), (40, 53_700_000, False, False),
    ],
)  # fmt: skip
def test_strides_of_the_correction(heads, tokens, per_block, fits):
    assert (sage3.correction_stride(heads, tokens, tokens, per_block) <= sage3.LARGEST_STRIDE) == fits


def test_a_stride_that_would_overflow_is_refused(blackwell, monkeypatch):  # noqa: F811
    q = k = v = torch.randn(1, 300, 2, 64)
    monkeypatch.setattr(sage3, "LARGEST_STRIDE", 2 * 384 - 1)
    with pytest.raises(ValueError, match="300 tokens of 2 heads overflow a 32-bit stride"):
        resolve("sageattn_3_fp4", SPEC)(q, k, v)
    monkeypatch.setattr(sage3, "LARGEST_STRIDE", 2 * 384)
    resolve("sageattn_3_fp4", SPEC)(q, k, v)


def test_each_option_runs_what_it_says(blackwell):  # noqa: F811
    def kernels(name):
        steps = [Step(index=i, total=4, in_run=i) for i in range(4)]
        return [plan_for(name, SPEC).at(step, (1, 2, 2), 1)[0].kernel.name for step in steps]

    assert kernels("sageattn_3") == ["sageattn", "sageattn_3_fp4", "sageattn_3_fp4", "sageattn"]
    assert kernels("sageattn_3_fp4") == ["sageattn_3_fp4"] * 4
    assert kernels("sageattn_3_fp8") == ["sageattn_3_fp8_sm120"] * 4


@pytest.fixture
def other_process(monkeypatch, tmp_path, forked):  # noqa: F811
    """write(body): the package sageattn3 of other processes; these are forked, or `started` as they are for users."""
    pretend(monkeypatch, (12, 0))
    install(monkeypatch, {"sageattn3": PACKAGES["sageattn3"]})
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(Path(sage3_stand_in.__file__).parent), *sys.path])
    monkeypatch.setattr(probe, "_verdicts", {})

    def write(body, *, started=False):
        if not started:
            monkeypatch.setattr(packages, "other_process", forked)
            monkeypatch.setattr(probe, "other_process", forked)
        (tmp_path / "sageattn3.py").write_text(f"from sage3_stand_in import sageattn3_blackwell as good\n{body}\n")

    return write


CRASHES = "import os\ndef sageattn3_blackwell(*a, **k): os.abort()"


@pytest.mark.parametrize(
    ("body", "why", "started"),
    [
        ("sageattn3_blackwell = good", None, True),
        (CRASHES, "the process crashed", True),
        (CRASHES, "the process crashed", False),
        ("def sageattn3_blackwell(q, k, v, **_): return q * float('nan')", "it gave NaN or infinite values", False),
        ("import torch\ndef sageattn3_blackwell(q, *a, **_): return torch.randn_like(q)", "was wrong by", False),
        ("def sageattn3_blackwell(q, k, v): return good(q, k, v)", "keyword argument 'per_block_mean'", False),
        ("import torch\ndef sageattn3_blackwell(*a, **_): raise torch.OutOfMemoryError", None, False),
        ("def sageattn3_blackwell(*a, **_): raise RuntimeError('CUDA error: out of memory')", None, False),
    ],
)
def test_the_kernel_is_tried_in_a_process_of_its_own(body, why, started, other_process):
    other_process(body, started=started)
    plan = plan_for("sageattn_3_fp4", SPEC)
    if why is None:
        plan.try_out(SPEC, 200)
        return
    with pytest.raises(ValueError, match="'sageattn_3_fp4' cannot run on 200 tokens: a trial in a process") as error:
        plan.try_out(SPEC, 200)
    assert why in str(error.value)


@pytest.mark.parametrize(("module", "function"), NAMES)
def test_every_name_can_be_tried(module, function, other_process, monkeypatch, tmp_path):
    other_process("sageattn3_blackwell = good")
    monkeypatch.delitem(sys.modules, "sageattn3")
    (tmp_path / "sageattn3.py").rename(tmp_path / f"{module}.py")
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write(f"{function} = good\n")
    packages._tried.cache_clear()
    plan_for("sageattn_3_fp4", SPEC).try_out(SPEC, 200)
    packages._tried.cache_clear()


def test_as_many_videos_are_tried_as_share_a_forward(other_process):
    other_process("def sageattn3_blackwell(q, *a, **k):\n    assert len(q) < 2, 'two'\n    return good(q, *a, **k)")
    plan = plan_for("sageattn_3_fp4", SPEC)
    plan.try_out(SPEC, 200)
    with pytest.raises(ValueError, match="AssertionError: two"):
        plan.try_out(SPEC, 200, batch=2)


def test_every_video_of_a_trial_is_compared(other_process):
    other_process(
        "def sageattn3_blackwell(q, *a, **k):\n    out = good(q, *a, **k)\n    out[1:] = q[1:]\n    return out"
    )
    plan = plan_for("sageattn_3_fp4", SPEC)
    plan.try_out(SPEC, 200)
    with pytest.raises(ValueError, match="its result was wrong by"):
        plan.try_out(SPEC, 200, batch=2)


def test_a_verdict_is_kept_by_shape(blackwell, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "_try", lambda kernel, spec, tokens, batch: seen.append((kernel.name, tokens)))
    plan = plan_for("sageattn_3", SPEC)
    for tokens in (100, 100, 200):
        plan.try_out(SPEC, tokens)
    assert seen == [(n, t) for t in (100, 200) for n in ("sageattn_3_fp4", "sageattn")]


def test_the_next_process_knows_what_ran(blackwell, monkeypatch, tmp_path):  # noqa: F811
    seen, kept, bad = [], tmp_path / "cache" / "kernels.json", {"sageattn": "noise"}

    def tried(kernel, spec, tokens, batch):
        seen.append((kernel.name, tokens))
        return bad.get(kernel.name)

    def process(tokens):
        monkeypatch.setattr(probe, "_verdicts", {})
        with contextlib.suppress(ValueError):
            plan_for("sageattn_3", SPEC).try_out(SPEC, tokens, kept=kept)

    monkeypatch.setattr(probe, "_try", tried)
    process(100)
    process(100)
    # What failed is tried again, as is another shape, or another driver.
    assert seen == [("sageattn_3_fp4", 100), ("sageattn", 100), ("sageattn", 100)]
    bad.clear()
    process(100)
    process(100)
    process(200)
    assert seen[3:] == [("sageattn", 100), ("sageattn_3_fp4", 200), ("sageattn", 200)]
    monkeypatch.setattr(probe, "_machine", lambda device: ("another driver",))
    process(100)
    assert len(seen) == 8
    for damaged in ("[", "3", ""):
        kept.write_text(damaged)
        process(100)
    assert len(seen) == 14 and not list(kept.parent.glob("*.part"))


def test_a_full_disk_costs_trials_alone(blackwell, monkeypatch, tmp_path, caplog):  # noqa: F811
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "_try", lambda *_: None)
    assert probe.verdict(sage3.KERNEL, SPEC, 100, kept=tmp_path / "cache" / "kernels.json") is None
    assert "is not kept in" in caplog.text


def test_a_trial_without_memory_is_made_again(blackwell, monkeypatch):  # noqa: F811
    done = [subprocess.CompletedProcess([], code, "", "") for code in (probe_kernel.OUT_OF_MEMORY, 0)]
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "other_process", lambda *_, **__: done.pop(0))
    for _ in range(3):
        assert probe.verdict(sage3.KERNEL, SPEC, 100) is None
    assert not done


def test_sizes_beyond_a_limit_are_refused_before_the_run(blackwell, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sage3, "LARGEST_STRIDE", 2 * 384 - 1)
    monkeypatch.setattr(probe, "_try", lambda *_: pytest.fail("the kernel was tried"))
    with pytest.raises(ValueError, match="'sageattn_3_fp4' cannot run on 300 tokens: 300 tokens of 2 heads"):
        plan_for("sageattn_3_fp4", SPEC).try_out(SPEC, 300)


@pytest.mark.slow
@pytest.mark.cuda
def test_a_kernel_that_faults_does_not_reach_this_process(monkeypatch, tmp_path):
    """An out-of-bounds gather poisons the other process's CUDA context; this one goes on."""
    (tmp_path / "faulty.py").write_text(
        "import torch\ndef fault(q, k, v): return q.flatten()[torch.full((9,), 2**40, device='cuda')].sum() + q\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kernel = Kernel(name="faulty", exports=(("faulty", "fault"),))
    assert "device-side assert" in probe.verdict(
        kernel, AttentionSpec(device=torch.device("cuda"), heads=2, head_dim=64), 64
    )
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_the_probe_imports_nothing_of_the_project():
    code = f"import runpy, sys; runpy.run_path({str(packages.SCRIPT)!r}); print('wanvideo_wrapper' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert json.loads(json.dumps(dict(sage3.KERNEL.options))) == {"per_block_mean": False}
    assert packages.found(()) is None


def test_the_driver_says_its_version(monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, version):  # noqa: N802
            version._obj.value = 13000
            return 0

    opened = []
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: opened.append(name) or Driver())
    assert probe._driver_version() == 13000
    assert opened == ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"]


@pytest.mark.cuda
def test_a_gpu_is_told_from_others():
    name, _, cuda, _, driver = probe._machine(torch.device("cuda"))
    assert name == torch.cuda.get_device_name() and cuda == torch.version.cuda and driver >= 12000
