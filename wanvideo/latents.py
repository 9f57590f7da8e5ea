"""Latents before and around a run: starting noise, latents to go on from, inpainting, given frames.

Latents are [C, F, H, W] float32; a LATENT is ComfyUI's dict with `samples` [1, C, F, H, W].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .config import CHANNELS_2_2, WanConfig
from .request import ImageEmbeds
from .schedulers import Schedule

log = logging.getLogger("wanvideo")

# Side of a token of any Wan model.
LATENTS_A_TOKEN = 2


def noise_shape(image: ImageEmbeds, config: WanConfig) -> tuple[int, int, int, int]:
    """Shape of the noise. Empty embeds do not know the model: the 5B's VAE has more channels and half the size.

    Raises ValueError if the embeds were made for another kind of VAE.
    """
    channels, frames, height, width = image.latent_shape
    if channels == config.out_dim:
        return image.latent_shape
    if config.out_dim == CHANNELS_2_2 and not any(payload.encoded for payload in image.payloads):
        return CHANNELS_2_2, frames, *_sides_2_2(height, width)
    raise ValueError(
        f"The image embeds have {channels} latent channels but the model predicts {config.out_dim}: encode the images "
        "with the VAE of this model (Wan 2.2 VAE for the 5B model, Wan 2.1 VAE for the others)."
    )


def _sides_2_2(height: int, width: int) -> tuple[int, int]:
    """Sides in latents of the 2.2 VAE, in whole tokens, of sides in latents of the 2.1 VAE; says so where less is left.

    Nodes without a model round to what the other models can run, which may be half a token more.
    """
    sides = height // (2 * LATENTS_A_TOKEN) * LATENTS_A_TOKEN, width // (2 * LATENTS_A_TOKEN) * LATENTS_A_TOKEN
    sides = max(sides[0], LATENTS_A_TOKEN), max(sides[1], LATENTS_A_TOKEN)
    if sides != (height // 2, width // 2):
        asked, made = (f"{w}x{h}" for w, h in ((width * 8, height * 8), (sides[1] * 16, sides[0] * 16)))
        log.info("%s is rounded to %s: sides must divide by 32 for the 5B model.", asked, made)
    return sides


def start_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed gives the same video on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def given_samples(samples: dict[str, object], shape: Sequence[int], ends: tuple[int, int] = (0, 0)) -> Tensor | None:
    """The latents of a LATENT as [C, F, H, W]; missing frames repeat the first one in front.

    ends: how many latents in front of the video and behind it are no part of it; the last frame stands for those
    behind, where they are missing, so that the video keeps its place. Returns None where the dict has none. Raises
    ValueError if the size does not fit.
    """
    found = samples.get("samples")
    if found is None:
        return None
    latents = found.to(torch.float32)
    if latents.ndim == 5 and latents.shape[0] == 1:
        latents = latents[0]
    channels, frames, height, width = shape
    fits = latents.ndim == 4 and latents.shape[0] == channels and latents.shape[2:] == (height, width)
    if not fits or latents.shape[1] > frames:
        raise ValueError(
            f"The samples are {tuple(found.shape)} but the sampler makes latents of shape {(1, *shape)}: use the same "
            "width, height, frame count and VAE for both."
        )
    missing, (leading, trailing) = frames - latents.shape[1], ends
    behind = max(min(missing - leading, trailing), 0)
    first, last = (latents[:, place].unsqueeze(1) for place in (0, -1))
    return torch.cat([first.expand(-1, missing - behind, -1, -1), latents, last.expand(-1, behind, -1, -1)], dim=1)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Flow matching forward process: (1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean + sigma * noise


@dataclass(frozen=True)
class Inpainting:
    """LatentHook: differential diffusion (Levin and Fried 2023). A pixel is free once its mask value comes up.

    original, noise [C, F, H, W]; change [1, F, H, W] in 0..1: 1 is painted from the first step, 0 keeps the original.
    """

    original: Tensor
    noise: Tensor
    change: Tensor
    schedule: Schedule

    def before(self, latents: Tensor, index: int) -> Tensor:
        """Nothing to do."""
        return latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """The original, at the noise level reached, where the mask keeps it in this step."""
        keep = ((1 - self.change) > index / len(self.schedule)).to(latents)
        noised = add_noise(self.original.to(latents), self.noise.to(latents), self.schedule.sigmas[index + 1])
        return noised * keep + latents * (1 - keep)


def change_mask(mask: Tensor, shape: Sequence[int], ends: tuple[int, int] = (0, 0)) -> Tensor:
    """A ComfyUI noise_mask, [n, H, W] or [n, 1, H, W] with 1 where to paint, as [1, F, H, W] of the latents.

    Fewer masks than latent frames are repeated; sizes are interpolated. ends: as `given_samples`; masks are of the
    video between, and what is at the ends is free.
    """
    frames, height, width = shape[1] - sum(ends), *shape[2:]
    masks = mask.float().reshape(-1, *mask.shape[-2:])
    if masks.shape[0] < frames:
        masks = masks.repeat(frames // masks.shape[0], 1, 1)
    sized = functional.interpolate(masks[None, None], size=(frames, height, width), mode="trilinear")
    return functional.pad(sized[0], (0, 0, 0, 0, *ends), value=1.0)


@dataclass(frozen=True)
class GivenLatents:
    """LatentHook: frames that are known and stay as they are. parts: (first frame, [C, frames, H, W])."""

    parts: tuple[tuple[int, Tensor], ...]

    @classmethod
    def placed(cls, given: Sequence[tuple[int, Tensor]], shape: Sequence[int]) -> GivenLatents:
        """With frame numbers counted from the start and kept inside a video of this shape.

        Raises ValueError if a part's size does not fit.
        """
        channels, frames, height, width = shape
        parts = []
        for index, latents in given:
            part = latents[0] if latents.ndim == 5 else latents
            if (part.shape[0], *part.shape[2:]) != (channels, height, width) or part.shape[1] > frames:
                raise ValueError(
                    f"The extra latents are {tuple(latents.shape)} but the video's are {tuple(shape)}: encode them at "
                    "the same width and height with the VAE of this model."
                )
            first = index + frames if index < 0 else index
            parts.append((max(0, min(first, frames - part.shape[1])), part.float()))
        return cls(tuple(parts))

    @property
    def frames(self) -> tuple[int, ...]:
        """The latent frames that are given."""
        return tuple(first + offset for first, part in self.parts for offset in range(part.shape[1]))

    def before(self, latents: Tensor, index: int) -> Tensor:
        """The latents with the given frames in place."""
        latents = latents.clone()
        for first, part in self.parts:
            latents[:, first : first + part.shape[1]] = part.to(latents)
        return latents

    def after(self, latents: Tensor, index: int) -> Tensor:
        """As `before`: the solver moves those that the model sees at the time of the others."""
        return self.before(latents, index)
