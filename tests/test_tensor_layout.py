"""The layout contract, checked against its own definition on generated views."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.quantized import fp8
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.tensor_layout import dense, is_kernel_ready, kernel_ready

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]


@st.composite
def views(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    offset = draw(st.integers(0, 15))
    numel = 1
    for size in shape:
        numel *= size
    storage = torch.randint(0, 256, ((numel + offset) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    t = storage[offset:].view(shape)
    if len(shape) > 1 and draw(st.booleans()):
        t = t.permute(draw(st.permutations(range(len(shape)))))
    if t.dim() and t.shape[-1] > 1 and draw(st.booleans()):
        t = t[..., :: draw(st.integers(1, 2))]
    if draw(st.booleans()):
        t = t.unsqueeze(0).expand(draw(st.integers(1, 3)), *t.shape)
    return t


def ready_by_definition(t, strided):
    if t.numel() == 0:
        return True
    if t.data_ptr() % 16:
        return False
    if not strided:
        return t.is_contiguous()
    axes = [(i, n, s) for i, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)) if n != 1]
    return all(s == 1 if i == t.dim() - 1 else s > 0 and s * t.element_size() % 16 == 0 for i, n, s in axes)


def bits(t):
    return torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten()).view(torch.uint8)


@settings(max_examples=400)
@given(views(), st.booleans())
def test_ready_copy_holds_the_rule_and_the_values(t, strided):
    before = t.clone()
    ready = kernel_ready(t, strided)
    assert is_kernel_ready(t, strided) == ready_by_definition(t, strided)
    assert ready_by_definition(ready, strided)
    assert (ready is t) == ready_by_definition(t, strided)
    assert ready.shape == t.shape and ready.dtype == t.dtype
    assert torch.equal(bits(ready), bits(before))


def test_contiguous_is_not_enough():
    t = torch.randn(65)[1:].view(8, 8)
    assert t.is_contiguous() and t.contiguous() is t
    assert not is_kernel_ready(t)
    assert is_kernel_ready(kernel_ready(t))


@pytest.mark.parametrize("strided", [True, False])
def test_column_major_is_copied(strided):
    assert is_kernel_ready(kernel_ready(torch.randn(16, 24).t(), strided), strided)


def test_dense_copies_only_what_is_not():
    t = torch.randn(4, 6, 8)
    assert dense(t) is t
    assert dense(t.transpose(1, 2)).stride(-1) == 1
    assert dense(t[:, :, :1]).stride(-1) == t.stride(-1)
    assert dense(t[0, 0, 0]).dim() == 0


class Broken(nn.Module):
    """Hands its input to a kernel as it is."""

    def forward(self, x):
        tensor_layout.check_entry("kernel", weight=None, x=x)
        return x


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)


def test_checking_names_kernel_module_and_argument(checking):
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"o": Broken()})["o"])
    tensor_layout.watch(model)
    model(torch.randn(8, 8))
    for bad in (torch.randn(65)[1:].view(8, 8), torch.randn(8, 16)[:, ::2], torch.randn(1, 8).expand(4, 8)):
        with pytest.raises(AssertionError, match=r"^kernel in 1: argument 'x' is not kernel-ready: shape \(\d, 8\)"):
            model(bad)
    assert tensor_layout._running == []


def test_checking_catches_a_kernel_that_skips_the_rule(checking, monkeypatch):
    model = nn.ModuleDict({"q": Fp8MatmulLinear.quantize(torch.randn(16, 32), None, torch.float8_e4m3fn)})
    tensor_layout.watch(model)
    weight = model["q"].weight
    weight.data = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view(weight.shape).copy_(weight.data)
    x = torch.randn(3, 32)
    assert model["q"](x).isfinite().all()
    monkeypatch.setattr(fp8, "kernel_ready", lambda t, strided=True: t)
    with pytest.raises(AssertionError, match=r"torch\._scaled_mm in q: argument 'weight'.*address % 16 = 1"):
        model["q"](x)


def test_without_checking_nothing_is_watched():
    model = nn.Sequential(Broken())
    tensor_layout.watch(model)
    assert not model[0]._forward_hooks
    model(torch.randn(65)[1:].view(8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("value", ["1", "0"])
def test_the_environment_turns_checking_on(value, monkeypatch):
    """Read when the module is imported: here anew, under another name."""
    monkeypatch.setenv("WAN_LAYOUT_CHECK", value)
    spec = importlib.util.spec_from_file_location("layout_anew", tensor_layout.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    bad = torch.randn(65)[1:]
    if value == "0":
        anew.check_entry("kernel", x=bad)
        return
    with pytest.raises(AssertionError, match="kernel in no watched module: argument 'x'"):
        anew.check_entry("kernel", x=bad)
