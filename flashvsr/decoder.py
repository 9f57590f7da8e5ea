"""FlashVSR's decoder (TC decoder): a tiny one that also sees the video of low quality, folded to the grid of latents.

Source: OpenImagingLab/FlashVSR (examples/WanVSR/utils/TCDecoder.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..wanvideo.assign import assign
from ..wanvideo.checkpoint import open_checkpoint
from ..wanvideo.frames import VAE_TIME_STRIDE
from ..wanvideo.modules.tiny_vae import Bound, TinyVAE, conv, growing_layers
from ..wanvideo.modules.vae import Tile
from ..wanvideo.shard import ALONE, Ranks

if TYPE_CHECKING:
    from ..host import Host

LOADER = "WanVideo FlashVSR Decoder Loader"
# What the sampler's LATENT holds of the low-quality video: [1, 3, 4 F, H, W] in -1..1, as the model saw it.
LOW_QUALITY = "low_quality"
LATENT_CHANNELS, LATENT_SIDE = 16, 8
FOLDED_CHANNELS = 3 * VAE_TIME_STRIDE * LATENT_SIDE**2
# Positions, in the published list of layers, of the first convolution and of those that grow and narrow.
FIRST, GROWS = 1, (9, 15, 21)


class DecoderLayout(NamedTuple):
    """Sizes of the decoder: channels before the first of three stages and behind each, frames that they make of one."""

    widths: tuple[int, ...]
    grows: tuple[int, ...]
    z_dim: int = LATENT_CHANNELS + FOLDED_CHANNELS
    spatial_factor: int = LATENT_SIDE
    patch: int = 1


class FlashVsrDecoder(nn.Module):
    """The list of layers, under the published key names."""

    def __init__(self, layout: DecoderLayout) -> None:
        super().__init__()
        first, *_, last = layout.widths
        grown = growing_layers(layout.widths, layout.grows)
        opening = (Bound(), conv(layout.z_dim, first), *_deepened(first))
        self.decoder = nn.Sequential(*opening, *grown, *_deepened(last), conv(last, 3))


def _deepened(width: int) -> tuple[nn.Module, ...]:
    return nn.ReLU(), conv(width, width, bias=False), nn.ReLU()


class FlashVsrVAE(TinyVAE):
    """The loaded decoder, in the place of a VAE. Its latents have the folded video in front of them, as channels."""

    def latents_of(self, samples: Mapping[str, object]) -> Tensor:
        """[768 + 16, F, h, w]. Raises ValueError where the low-quality video is missing or of another size."""
        latents, video = super().latents_of(samples), samples.get(LOW_QUALITY)
        if video is None:
            raise ValueError(
                "FlashVSR's decoder reads the video of low quality, too, but these samples have none: connect samples "
                "of a sampler whose image_embeds come from WanVideoAddFlashVSRInput, or decode with another VAE."
            )
        frames, height, width = latents.shape[1:]
        wanted = (VAE_TIME_STRIDE * frames, LATENT_SIDE * height, LATENT_SIDE * width)
        if len(latents) != LATENT_CHANNELS or tuple(video.shape[2:]) != wanted:
            raise ValueError(
                f"The samples have the shape {tuple(latents.shape)}, for which FlashVSR's decoder needs a video of low "
                f"quality of {wanted} (four frames a latent, height, width), but theirs has {tuple(video.shape[2:])}: "
                "connect the samples as the sampler gives them."
            )
        return torch.cat((folded(video[0].float()), latents))

    def encode(self, video: Tensor, *, tile: Tile | None = None, quiet: bool = False, ranks: Ranks = ALONE) -> Tensor:
        """Raises ValueError: it decodes only."""
        raise ValueError("FlashVSR's decoder cannot encode: connect the VAE of the model (WanVideo VAE Loader) here.")


def folded(video: Tensor) -> Tensor:
    """Low-quality video [3, 4 F, H, W] as channels [768, F, H / 8, W / 8] of the latents that stand for it.

    The model's features of a latent are of its last frame and the three behind it, as if the video began with its first
    frame twice. What the decoder sees must lie in time as what the model saw, so it begins so, too: the first latent
    has that frame four times, every other the four frames before its last one.
    """
    start = video[:, :1].expand(-1, VAE_TIME_STRIDE, -1, -1)
    video = torch.cat((start, video[:, :-VAE_TIME_STRIDE]), dim=1)
    cells = video.unflatten(3, (-1, LATENT_SIDE)).unflatten(2, (-1, LATENT_SIDE)).unflatten(1, (-1, VAE_TIME_STRIDE))
    return cells.permute(0, 2, 4, 6, 1, 3, 5).flatten(0, 3)


def read_decoder_layout(shapes: Mapping[str, tuple[int, ...]]) -> DecoderLayout:
    """Sizes from the shapes of the published tensors. Raises KeyError that names the first one that is missing."""
    grows = tuple(shapes[f"decoder.{index}.conv.weight"] for index in GROWS)
    narrow = tuple(shapes[f"decoder.{index + 1}.weight"][0] for index in GROWS)
    first = shapes[f"decoder.{FIRST}.weight"]
    return DecoderLayout((first[0], *narrow), tuple(made // max(read, 1) for made, read, *_ in grows), z_dim=first[1])


def load_decoder(path: Path, *, dtype: torch.dtype, host: Host) -> FlashVsrVAE:
    """Load it. Raises FileNotFoundError, or ValueError if the file is no decoder of FlashVSR or is incomplete."""
    checkpoint = open_checkpoint(path)
    try:
        layout = read_decoder_layout(checkpoint.shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path.name} is no decoder of FlashVSR (it has no {error}): choose the safetensors file of its TC decoder."
        ) from error
    if layout.z_dim != LATENT_CHANNELS + FOLDED_CHANNELS or math.prod(layout.grows) != VAE_TIME_STRIDE:
        raise ValueError(
            f"{path.name} decodes {layout.z_dim} channels to {math.prod(layout.grows)} frames, but FlashVSR's decoder "
            f"{LATENT_CHANNELS + FOLDED_CHANNELS} to {VAE_TIME_STRIDE}: choose the safetensors file of its TC decoder."
        )
    with torch.device("meta"):
        model = FlashVsrDecoder(layout)
    assign(
        model, checkpoint, {name: name for name, _ in model.named_parameters()}, dtype=dtype, what="FlashVSR decoder"
    )
    # Latents as the model gives them, normalized.
    vae = FlashVsrVAE(model, layout, (torch.zeros(1), torch.ones(1)), dtype=dtype, host=host)
    vae.recipe = partial(load_decoder, path, dtype=dtype)
    return vae
