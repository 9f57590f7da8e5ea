"""cuDNN's FP8 attention in plain PyTorch: float32 sums, and every rounding to E4M3 where the kernel rounds."""

import torch

PROBABILITY_SCALE = 256.0


def e4m3(x):
    """Rounded to E4M3, saturating."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def cudnn_fp8_reference(q, k, v, scale_q, scale_k, scale_v):
    """q, k, v [B, L, H, D] E4M3 with scales [1] that multiply them -> [B, Lq, H, D] E4M3 with v's scale.

    Scores are descaled in float32; probabilities before normalization are rounded, their sum is not; the result is
    rounded last.
    """
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (scale_q * scale_k * q.shape[-1] ** -0.5)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    out = e4m3(p * PROBABILITY_SCALE) @ v / (PROBABILITY_SCALE * p.sum(-1, keepdim=True))
    return e4m3(out).transpose(1, 2).to(torch.float8_e4m3fn).contiguous()


def exact(q, k, v):
    """Softmax attention in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
