"""Frame counts of the Wan VAE, which is causal: the first latent frame is one pixel frame, every other four."""

from __future__ import annotations

from collections.abc import Sequence

VAE_TIME_STRIDE = 4


def latent_frames(num_frames: int) -> int:
    """Latent frames of a video: 4n+1 pixel frames give n+1."""
    return (num_frames - 1) // VAE_TIME_STRIDE + 1


def round_frames(num_frames: int) -> int:
    """The largest 4n+1 that is not more than `num_frames`, the counts the Wan VAE can encode."""
    return (latent_frames(num_frames) - 1) * VAE_TIME_STRIDE + 1


def pixel_frames(latents: Sequence[int]) -> tuple[int, ...]:
    """The pixel frames behind these latent frames when they are seen as a video of their own: 1 + 4 (n - 1) of them."""
    later = (VAE_TIME_STRIDE * frame - back for frame in latents[1:] for back in range(VAE_TIME_STRIDE - 1, -1, -1))
    return (VAE_TIME_STRIDE * latents[0], *(max(frame, 0) for frame in later))
