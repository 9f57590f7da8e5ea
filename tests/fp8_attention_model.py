"""FP8 attention in plain PyTorch: float32 sums, and every rounding to E4M3 where a kernel rounds."""

import torch

PROBABILITY_SCALE = 256.0


def e4m3(x):
    """Rounded to E4M3, saturating."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def averages(q, k, v, scale):
    """q, k, v [B, L, H, D] E4M3, scale of the scores -> averages of v as it is, [B, Lq, H, D] float32.

    Scores are descaled in float32; probabilities before normalization are rounded, their sum is not.
    """
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (scale * q.shape[-1] ** -0.5)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return (e4m3(p * PROBABILITY_SCALE) @ v / (PROBABILITY_SCALE * p.sum(-1, keepdim=True))).transpose(1, 2)


def cudnn_reference(q, k, v, scale_q, scale_k, scale_v):
    """cuDNN's: scales [1] that multiply q, k and v; the result, E4M3 with v's scale, is rounded last."""
    return e4m3(averages(q, k, v, scale_q * scale_k)).to(torch.float8_e4m3fn).contiguous()


def flash_3_reference(q, k, v, q_descale, k_descale, v_descale):
    """FlashAttention 3's function: scales [B, H]; the result is bfloat16."""
    each = (scale[:, None, :, None] for scale in (q_descale, k_descale, v_descale))
    scale_q, scale_k, scale_v = each
    out = averages(q, k, v, (scale_q * scale_k).transpose(1, 2)) * scale_v
    return out.bfloat16().contiguous()


def exact(q, k, v):
    """Softmax attention in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
