"""Softmax by heads, with bias and gain, equals float64 for every type of scores and number of keys and heads."""

import interpreted
import pytest
import torch
from layouts import relative
from wanvideo_wrapper import kernels
from wanvideo_wrapper.kernels.head_softmax import head_softmax

# Half of the last bit of a single number, and in float32 what exponentials cost.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = [(2, 21, 32, 40), (3, 9, 5, 7), (1, 1, 1, 12)]


def operands(batch, rows, keys, heads, dtype, device="cpu"):
    """Scores of rows that are far above or below zero, further than an exponential reaches."""
    level = 120 * torch.randn(batch, rows, 1, device=device).sign()
    scores = (torch.randn(batch, rows, keys * heads, device=device) * 3 + level).to(dtype)
    return scores, torch.randn(batch, keys * heads, device=device) * 3, torch.rand((), device=device) + 0.5


def float64(scores, bias, gain, heads):
    """One head at a time."""
    total, out = scores.double() + bias.double()[:, None], torch.empty_like(scores, dtype=torch.float64)
    for head in range(heads):
        out[..., head::heads] = total[..., head::heads].softmax(-1) * gain.double()
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "keys", "heads"), SIZES)
def test_equals_float64_in_place(batch, rows, keys, heads, dtype, device):
    scores, bias, gain = operands(batch, rows, keys, heads, dtype, device)
    want, place = float64(scores, bias, gain, heads), scores.data_ptr()
    head_softmax(scores, bias, gain, heads)
    assert relative(scores, want) < TOLERANCES[dtype] and scores.data_ptr() == place


def test_float64_stays():
    scores, bias, gain = operands(2, 3, 4, 5, torch.float64)
    want = float64(scores, bias, gain, 5)
    head_softmax(scores, bias, gain, 5)
    assert relative(scores, want) < 1e-7


def test_scores_that_cannot_be_changed_in_place_are_refused():
    scores, bias, gain = operands(2, 8, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="not contiguous"):
        head_softmax(scores[:, ::2], bias, gain, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(device):
    operator = getattr(torch.ops, kernels.NAMESPACE).head_softmax.default
    given = (*operands(2, 3, 4, 5, torch.bfloat16, device), 5)
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@interpreted.needed
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "keys", "heads"), SIZES)
def test_kernel_interpreted(batch, rows, keys, heads, dtype, monkeypatch):
    interpreted.exact(monkeypatch)
    kernel = kernels.triton_kernels("head_softmax_triton")
    scores, bias, gain = operands(batch, rows, keys, heads, dtype)
    # What a program too far would change.
    whole = torch.cat((scores.flatten(), scores.new_full((64,), 7)))
    inside, behind = whole[: scores.numel()].view(scores.shape), whole[scores.numel() :]
    kernel.head_softmax(inside, bias, gain, heads)
    assert relative(inside, float64(scores, bias, gain, heads)) < TOLERANCES[dtype] and bool((behind == 7).all())
