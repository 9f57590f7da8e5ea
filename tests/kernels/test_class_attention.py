"""Attention to classes of keys equals float64, whatever the scores, the masks and the layout."""

from types import SimpleNamespace

import interpreted
import pytest
import torch
from hypothesis import given
from layouts import SETTINGS, bits, layouts, relative
from wanvideo_wrapper import kernels, tensor_layout
from wanvideo_wrapper.kernels import class_attention as module
from wanvideo_wrapper.kernels.class_attention import class_attention, class_attention_eager

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 3e-3, torch.float32: 1e-5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# Batch, queries, keys, heads, head size.
SHAPES = [(1, 33, 32, 2, 64), (2, 20, 45, 3, 64), (1, 5, 7, 1, 128)]


def operands(shape, classes, dtype, device="cpu"):
    """q, k, and masks that overlap, leave keys out and are one of them empty."""
    batch, queries, keys, heads, size = shape
    q, k = (torch.randn(batch, length, heads, size, device=device).to(dtype) for length in (queries, keys))
    masks = (torch.rand(classes, keys, device=device) < 0.4).float()
    masks[0, :3], masks[0, 3], masks[1] = 1, 0, 0
    return q, k, masks


def float64(q, k, masks):
    weights = torch.einsum("blhd,bshd->bhls", q.double(), k.double()).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhls,ns->bln", weights, masks.double()) / q.shape[2]


def check(got, q, k, masks):
    assert got.dtype == torch.float32 and got.shape == (*q.shape[:2], len(masks)) and got[..., 1].abs().max() == 0
    assert relative(got, float64(q, k, masks)) < TOLERANCES[q.dtype]


def interpret(monkeypatch, q, k, masks, **constants):
    """What the kernel gives, in small tiles."""
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("class_attention_triton")
    for name, value in {"QUERIES": 16, "KEYS": 16, **constants}.items():
        monkeypatch.setattr(kernel, name, value)
    shares = torch.full((q.shape[0], q.shape[2], q.shape[1], len(masks)), float("nan"))
    kernel.class_shares(q, k, masks, shares)
    return shares.mean(1)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("classes", [3, 7, 9])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 301, 2, 128), (1, 10, 40, 2, 32)])
def test_equals_float64(shape, classes, dtype, device):
    """Those without a kernel, too: many classes, float32, heads of other sizes."""
    q, k, masks = operands(shape, classes, dtype, device)
    check(class_attention(q, k, masks), q, k, masks)


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("strength", [1, 4, 30])
def test_the_kernel_at_any_scores(strength, monkeypatch):
    monkeypatch.setattr(module, "class_attention_eager", None)
    q, k, masks = operands((1, 1000, 600, 4, 128), 3, torch.bfloat16, "cuda")
    check(class_attention(q * strength, k, masks), q * strength, k, masks)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_takes_any_layout(device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)

    @SETTINGS
    @given(layouts(), layouts(), layouts())
    def run(for_q, for_k, for_masks):
        q, k = (layout.build((2, 6, 2, 64), torch.bfloat16, device) for layout in (for_q, for_k))
        masks = for_masks.place((torch.rand(3, 6, device=device) < 0.5).float())
        before = [bits(t) for t in (q, k, masks)]
        got = class_attention(q, k, masks)
        assert relative(got, float64(q, k, masks)) < 6e-3
        assert all(torch.equal(bits(t), old) for t, old in zip((q, k, masks), before, strict=True))

    run()


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(device):
    q, k, masks = operands((2, 20, 45, 3, 64), 3, torch.bfloat16, device)
    operator = getattr(torch.ops, kernels.NAMESPACE).class_attention.default
    torch.library.opcheck(operator, (q, k, masks), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.autograd
def test_gradients_reach_queries_and_keys():
    q, k, masks = operands((1, 4, 6, 2, 32), 2, torch.float32)
    wanted = [t.clone().requires_grad_() for t in (q, k)]
    class_attention(*wanted, masks)[..., 0].sum().backward()
    exact = [t.double().requires_grad_() for t in (q, k)]
    float64(*exact, masks)[..., 0].sum().backward()
    assert all(relative(got.grad, want.grad) < 1e-5 for got, want in zip(wanted, exact, strict=True))


@pytest.mark.parametrize(
    ("capability", "cuda", "classes", "size", "dtype", "runs"),
    [
        ((8, 0), "12.8", 7, 128, torch.float16, True),
        ((7, 5), "12.8", 7, 128, torch.float16, False),
        ((9, 0), None, 7, 128, torch.bfloat16, False),
        ((9, 0), "12.8", 8, 128, torch.bfloat16, False),
        ((9, 0), "12.8", 7, 96, torch.bfloat16, False),
        ((9, 0), "12.8", 7, 128, torch.float32, False),
    ],
)
def test_where_the_kernel_runs(capability, cuda, classes, size, dtype, runs, monkeypatch):
    monkeypatch.setattr(module, "triton_runs", lambda device: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(shape=(1, 5, 2, size), dtype=dtype, is_cuda=True, device=torch.device("cuda"))
    assert module._has_kernel(q, torch.ones(classes, 5)) == runs


@interpreted.needed
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("dtype", module.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_interpreted(shape, classes, dtype, monkeypatch):
    q, k, masks = operands(shape, classes, dtype)
    got = interpret(monkeypatch, q, k, masks)
    check(got, q, k, masks)
    assert relative(got, class_attention_eager(q, k, masks)) < 2 * TOLERANCES[dtype]


@interpreted.needed
def test_kernel_interpreted_on_views(monkeypatch):
    """Queries and keys that other tokens follow, in heads of a wider row."""
    q, k, masks = operands((2, 40, 40, 4, 64), 3, torch.bfloat16)
    q, k, masks = q[:, :33, 1:3], k[:, :20, 2:], masks[:, :20]
    assert relative(interpret(monkeypatch, q, k, masks), float64(q, k, masks)) < 3e-3


@interpreted.needed
@pytest.mark.parametrize("limit", [-1.0, 100.0])
@pytest.mark.parametrize("strength", [1, 5, 60])
def test_a_maximum_where_scores_may_leave_the_range(strength, limit, monkeypatch):
    """With and without one the same. Weights of 5 leave float16, and those of 60 float32."""
    q, k, masks = operands((1, 33, 45, 2, 64), 3, torch.bfloat16)
    q *= strength
    check(interpret(monkeypatch, q, k, masks, RANGE=limit), q, k, masks)


@interpreted.needed
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_all_far_from_zero(sign, monkeypatch):
    """Their exponentials are infinite or 0, and no key behind the last one may stand above them."""
    q, k, masks = operands((1, 20, 45, 2, 64), 3, torch.bfloat16)
    q, k = (q + 10), (k / 4 + sign * 10)
    check(interpret(monkeypatch, q, k, masks), q, k, masks)


@interpreted.needed
def test_each_tile_of_queries_decides_for_itself(monkeypatch):
    """Long queries do not share the way of short ones, nor of another head or entry of the batch."""
    q, k, masks = operands((2, 48, 40, 2, 64), 3, torch.bfloat16)
    q[0, 20, 1] *= 100
    k[1, 30, 1] *= 100
    check(interpret(monkeypatch, q, k, masks), q, k, masks)
