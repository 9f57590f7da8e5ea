"""Attention backends against the textbook formula in float64."""

import pytest
import torch
from wanvideo_wrapper.attention import ATTENTION_MODES, AttentionCall, AttentionSpec, attend, reason, resolve, sdpa
from wanvideo_wrapper.attention_backends.torch_sdpa import added_mask
from wanvideo_wrapper.tensor_layout import is_kernel_ready


def formula(q, k, v, mask=None):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def qkv(queries=7, keys=5, heads=3, size=16):
    return torch.randn(2, queries, heads, size), *(torch.randn(2, keys, heads, size) for _ in range(2))


def assert_close(got, want, tolerance=1e-5):
    error = (got.double() - want).norm() / want.norm()
    assert error < tolerance


def test_matches_the_formula_and_leaves_inputs_alone():
    q, k, v = qkv()
    before = [t.clone() for t in (q, k, v)]
    got = sdpa()(q, k, v)
    assert got.is_contiguous()
    assert_close(got, formula(q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_mask():
    q, k, v = qkv()
    mask = torch.rand(2, 1, 7, 5) > 0.4
    mask[..., 0] = True
    assert_close(sdpa()(q, k, v, mask=mask), formula(q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 47), (2, 1, 3, 8), (2, 3, 5, 1), (1, 1, 4, 13)], ids=str)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_kernel_can_read_16_bytes_at_the_end_of_a_mask(shape, dtype, boolean):
    allowed = torch.rand(shape) > 0.5
    mask = allowed if boolean else torch.randn(shape).to(dtype)
    got = added_mask(mask, dtype)
    assert is_kernel_ready(got) and got.dtype == dtype
    assert torch.equal(got, torch.zeros(shape, dtype=dtype).masked_fill(~allowed, -torch.inf) if boolean else mask)
    last = got.storage_offset() + sum((size - 1) * stride for size, stride in zip(shape, got.stride(), strict=True))
    row_start = last - shape[-1] + 1
    row_bytes = -(-shape[-1] * got.element_size() // 16) * 16
    assert row_start * got.element_size() + row_bytes <= got.untyped_storage().nbytes()


def test_views_at_odd_offsets():
    storage = torch.randn(3, 2 * 7 * 3 * 16 + 1)
    q, k, v = (storage[i, 1:].view(2, 3, 7, 16).transpose(1, 2) for i in range(3))
    assert_close(sdpa()(q, k, v), formula(q, k, v))


def test_one_key_does_not_alias_its_value():
    q, k, v = qkv(queries=1, keys=1)
    out = sdpa()(q, k, v)
    out.zero_()
    assert v.abs().min() > 0


@pytest.mark.autograd
def test_gradients_flow():
    q, k, v = (t.requires_grad_() for t in qkv())
    sdpa()(q, k, v).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (q, k, v))


@pytest.mark.autograd
@pytest.mark.parametrize("masked", ["no mask", "boolean", "numbers"])
def test_gradients_flow_through_views_at_odd_offsets(masked, monkeypatch):
    storage = torch.randn(3, 2 * 7 * 3 * 16 + 1)
    leaf = storage.clone().requires_grad_()
    allowed = torch.rand(7, 8)[:, 1:] > 0.4
    allowed[:, 0] = True
    added = torch.zeros(7, 8)[:, 1:].masked_fill(~allowed, -1e4).requires_grad_()
    mask = {"no mask": None, "boolean": allowed, "numbers": added}[masked]
    upstream = torch.randn(2 * 7 * 3 * 16 + 1)[1:].view(2, 7, 3, 16)
    ready, product = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask):
        ready.extend(is_kernel_ready(t) for t in (*arguments, attn_mask) if t is not None)
        out = product(*arguments, attn_mask=attn_mask)
        out.register_hook(lambda gradient: ready.append(is_kernel_ready(gradient)))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    got = sdpa()(*(leaf[i, 1:].view(2, 3, 7, 16).transpose(1, 2) for i in range(3)), mask=mask)
    got.backward(upstream)
    wide = storage.double().requires_grad_()
    q, k, v = (wide[i, 1:].view(2, 3, 7, 16).transpose(1, 2) for i in range(3))
    want = formula(q, k, v, None if mask is None else allowed)
    want.backward(upstream.double())
    assert len(ready) >= 4 and all(ready)
    assert_close(got, want)
    assert_close(leaf.grad, wide.grad)
    assert masked != "numbers" or added.grad.abs().sum() > 0


@pytest.mark.autograd
def test_a_compiled_graph_has_gradients():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv())
    compiled = torch.compile(lambda q, k, v: sdpa()(q, k, v), fullgraph=True, backend="aot_eager")
    got = compiled(q, k, v)
    got.sum().backward()
    assert_close(got, formula(q, k, v))
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (q, k, v))


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: sdpa()(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), 2 * formula(q, k, v))


def test_spans_see_only_their_keys():
    q, k, v = qkv(queries=6, keys=6)
    got = attend(sdpa(), AttentionCall(q, k, v, spans=(((0, 4), (0, 6)), ((4, 6), (4, 6)))))
    assert_close(got[:, :4], formula(q[:, :4], k, v))
    assert_close(got[:, 4:], formula(q[:, 4:], k[:, 4:], v[:, 4:]))


SPANS = (((0, 4), (0, 6)), ((4, 6), (2, 6)))


@pytest.mark.parametrize("spans", [(), SPANS])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 4), (3, 5)])
def test_padded_keys_do_not_count(lengths, spans):
    q, k, v = qkv(queries=6, keys=6)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None])[:, None, None].expand(2, 1, 6, 6).clone()
    for (q0, q1), (k0, k1) in spans:
        mask[:, :, q0:q1, :k0] = mask[:, :, q0:q1, k1:] = False
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = float("nan")
    got = attend(sdpa(), AttentionCall(q, k, v, spans, lengths))
    assert_close(got, formula(q, k.nan_to_num(), v.nan_to_num(), mask))


@pytest.mark.parametrize("lengths", [(6,), (0, 6), (6, 7)])
def test_lengths_that_do_not_fit_are_refused(lengths):
    q, k, v = qkv(queries=6, keys=6)
    with pytest.raises(ValueError, match="k_lens .* do not fit keys of shape"):
        attend(sdpa(), AttentionCall(q, k, v, k_lens=lengths))


def test_a_span_of_padding_alone_is_refused():
    q, k, v = (torch.randn(2, 6, 1, 8) for _ in range(3))
    with pytest.raises(ValueError, match="has padding alone: k_lens is"):
        attend(sdpa(), AttentionCall(q, k, v, spans=(((0, 3), (0, 3)), ((3, 6), (3, 6))), k_lens=(2, 6)))


def test_resolve_names_every_backend_and_reason():
    spec = AttentionSpec(device=torch.device("cpu"), heads=40, head_dim=128)
    assert resolve("sdpa", spec).name == "sdpa"
    anywhere = {"sdpa", "radial_sage_attention", "sageattn_ultravico"}
    for name in [*(set(ATTENTION_MODES) - anywhere), "nonsense"]:
        with pytest.raises(ValueError, match=f"'{name}' cannot run") as error:
            resolve(name, spec)
        message = str(error.value)
        able, unable = message.split("These run here: ")[1].split(". The others do not: ")
        reasons = {mode: reason(mode, spec) for mode in ATTENTION_MODES if mode != name}
        assert set(able.split(", ")) == {mode for mode, why in reasons.items() if why is None} == anywhere
        assert all(f"{mode}: {why}" in unable for mode, why in reasons.items() if why is not None)
