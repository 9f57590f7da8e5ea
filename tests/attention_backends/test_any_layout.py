"""Every attention option that runs on this machine, on q, k, v in every memory layout; the others skip with reasons."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import SETTINGS, bits, fresh, layouts, relative
from test_attention import formula
from wanvideo_wrapper import attention, tensor_layout
from wanvideo_wrapper.attention import ATTENTION_MODES, AttentionSpec, GridAttention
from wanvideo_wrapper.attention_backends.third_party import DTYPES
from wanvideo_wrapper.tensor_layout import is_kernel_ready

HEADS, SIZE = 3, 128
# Largest relative error against float64; sparse attention has none that holds for noise.
ERRORS = {
    "sdpa": 0.01, "flash_attn_2": 0.01, "flash_attn_3": 0.01, "sageattn": 0.08, "sageattn_compiled": 0.08,
    "sageattn_varlen": 0.08, "sageattn_3_fp8": 0.08, "cudnn_fp8": 0.1, "fa3_fp8": 0.1, "auto_fp8": 0.1,
    "sageattn_3": 0.35, "sageattn_3_fp4": 0.35, "comfy": 0.08,
}  # fmt: skip


@pytest.fixture(autouse=True)
def checking(monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ATTENTION_MODES)
@SETTINGS
@given(data=st.data())
def test_values_do_not_depend_on_the_layout(name, device, data):
    spec = AttentionSpec(device=torch.device(device), heads=HEADS, head_dim=SIZE)
    why = attention.reason(name, spec)
    if why is not None:
        pytest.skip(why)
    backend = attention.resolve(name, spec)
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(4, 300))
    dtype = data.draw(st.sampled_from([t for t in DTYPES if attention.reason(name, replace(spec, dtype=t)) is None]))
    if isinstance(backend, GridAttention):
        # These compile a kernel for each size and type.
        batch, tokens, dtype = 1, data.draw(st.sampled_from((50, 260))), torch.bfloat16
        backend = backend.on_grid((2, 2, tokens // 4))
    # Not the layouts' own values: their outlier channels make the softmax one-hot, which hides errors.
    q, k, v = (data.draw(layouts()).place(torch.randn(batch, tokens, HEADS, SIZE).to(device, dtype)) for _ in range(3))
    before = [bits(t) for t in (q, k, v)]
    out = backend(q, k, v)
    assert all(torch.equal(a, bits(t)) for a, t in zip(before, (q, k, v), strict=True))
    assert out.shape == q.shape and out.dtype == dtype and is_kernel_ready(out, strided=False)
    assert out.isfinite().all() and relative(out, backend(fresh(q), fresh(k), fresh(v))) < 0.02
    if name in ERRORS:
        assert relative(out, formula(q, k, v)) < ERRORS[name]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@SETTINGS
@given(data=st.data(), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_masks_in_any_layout(device, data, dtype):
    # Rows of whole 16 bytes are not padded, so that nothing but the rule copies them.
    lengths = st.integers(1, 60) | st.sampled_from((8, 16, 40))
    batch, queries, keys = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 60), lengths))
    shape = [data.draw(st.sampled_from((1, size))) for size in (batch, HEADS, queries)]
    allowed = torch.rand(*shape, keys) > 0.5
    allowed[..., data.draw(st.integers(0, keys - 1))] = True
    added = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    mask = data.draw(layouts()).place(data.draw(st.sampled_from((allowed, added))).to(device))
    q, k, v = (torch.randn(batch, n, HEADS, SIZE).to(device, dtype) for n in (queries, keys, keys))
    before = fresh(mask)
    want = formula(q, k, v, before if before.dtype == torch.bool else before == 0)
    assert relative(attention.sdpa()(q, k, v, mask=mask), want) < ERRORS["sdpa"]
    assert torch.equal(mask, before)
