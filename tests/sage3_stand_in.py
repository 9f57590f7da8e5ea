"""A stand-in for SageAttention 3's kernel: its contract, enforced, and its arithmetic in plain PyTorch.

The arithmetic is that of the paper (Zhang et al. 2025): K is shifted by its mean, Q by its own, the shift of Q comes
back as an exact row of scores; Q, K, V and the probabilities are NVFP4 (E2M1 in blocks of 16 with an E4M3 scale), the
probabilities after a scale for each row. Like the kernel it changes K in place and returns a part of a padded tensor.
"""

import torch

BLOCK, QUERY_BLOCK = 16, 128
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0
calls = []


def four_bits(x):
    """[..., n] with n a multiple of 16 -> the nearest NVFP4 values, float32."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / LARGEST_E2M1).clamp(max=LARGEST_E4M3)
    scale = scale.to(torch.float8_e4m3fn).float()
    levels = E2M1.to(x.device)
    edges = (levels[1:] + levels[:-1]) / 2
    steps = blocks / torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = levels[torch.bucketize(steps.abs().contiguous(), edges)] * steps.sign()
    return (rounded * scale).flatten(-2)


def check(q, k, v, attn_mask, per_block_mean):
    """What the compiled kernel needs and does not check."""
    assert attn_mask is None, "masks are ignored"
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert all(t.dim() == 4 and t.shape[-1] in (64, 128) for t in (q, k, v))
    assert k.shape == v.shape and q.shape[:2] == k.shape[:2]
    for name, t in (("q", q), ("k", k), ("v", v)):
        assert t.is_contiguous(), f"{name} is not contiguous: {t.stride()}"
        assert t.data_ptr() % 16 == 0, f"{name} is not aligned"
    rows = -(-q.shape[2] // QUERY_BLOCK) if per_block_mean else 1
    assert q.shape[1] * rows * k.shape[2] < 2**31, "a stride overflows"


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
    """q, k, v [B, H, L, D] -> [B, H, L, D], a part of a padded tensor."""
    check(q, k, v, attn_mask, per_block_mean)
    calls.append(tuple(q.shape))
    k -= k.mean(dim=2, keepdim=True)
    groups = q.split(QUERY_BLOCK if per_block_mean else q.shape[2], dim=2)
    mean = torch.cat([g.float().mean(2, keepdim=True).expand(-1, -1, g.shape[2], -1) for g in groups], dim=2)
    scores = four_bits(q.float() - mean) @ four_bits(k).transpose(-1, -2) + mean @ k.float().transpose(-1, -2)
    chances = (scores * q.shape[-1] ** -0.5).sub(scores.amax(-1, keepdim=True) * q.shape[-1] ** -0.5).exp()
    padding = -k.shape[2] % BLOCK
    row = chances.amax(-1, keepdim=True) / (LARGEST_E2M1 * LARGEST_E4M3)
    small = four_bits(torch.nn.functional.pad(chances / row, (0, padding))) * row
    values = torch.nn.functional.pad(v.float(), (0, 0, 0, padding))
    out = small @ four_bits(values.transpose(-1, -2)).transpose(-1, -2) / chances.sum(-1, keepdim=True)
    padded = q.new_zeros(*q.shape[:2], -(-q.shape[2] // QUERY_BLOCK) * QUERY_BLOCK, q.shape[3])
    padded[:, :, : q.shape[2]] = out.to(q.dtype)
    return padded[:, :, : q.shape[2]]
