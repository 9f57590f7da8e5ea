"""Tiny video autoencoders in the latent space of the Wan VAEs: a few convolutions a frame, and one frame of memory.

Layers work on frames [n, C, H, W] in order of time; a remembering layer also sees the frame before each. The encoder
pools four frames into one latent, the decoder grows one latent into four frames, of which the first three of a video
are none of its frames.
Source: madebyollin/taehv (TAEW2.1, TAEW2.2: architecture, key names); ModelTC/LightX2V (lighttaew2_1, lighttaew2_2,
which are trained on latents that are not normalized).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..assign import assign
from ..checkpoint import open_checkpoint
from ..frames import VAE_TIME_STRIDE
from .vae import MEAN_21, MEAN_22, STD_21, STD_22, WanVAE

if TYPE_CHECKING:
    from ...host import Host

Shapes = Mapping[str, tuple[int, ...]]
Memory = dict[int, Tensor]

BLOCKS = 3
STATISTICS = {16: (MEAN_21, STD_21), 48: (MEAN_22, STD_22)}
# Latents are kept within this bound, smoothly, before they are decoded.
BOUND = 3.0
# Positions of the layers that change the number of frames, in the published lists of layers.
POOLS, GROWS = (2, 7, 12), (7, 13, 19)
RAW_LATENTS = "light"


class TinyLayout(NamedTuple):
    """Sizes of a tiny autoencoder: latent channels, pixels a side folded into channels, widths and frame strides."""

    z_dim: int
    patch: int
    width: int
    decoder_widths: tuple[int, ...]
    pools: tuple[int, ...]
    grows: tuple[int, ...]

    @property
    def spatial_factor(self) -> int:
        """Pixels a side behind one latent."""
        return 2 ** len(self.pools) * self.patch


class Remembering(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, *others = (conv(inputs, width) for inputs in (2 * width, width, width))
        self.conv = nn.Sequential(first, nn.ReLU(), others[0], nn.ReLU(), others[1])

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """Frames [n, C, H, W] and the frame before each, in the same shape."""
        return F.relu(self.conv(torch.cat((frames, before), dim=1)) + frames)


class Pool(nn.Module):
    """`stride` frames become one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[n * stride, C, H, W] -> [n, C, H, W]."""
        return self.conv(frames.unflatten(0, (-1, self.stride)).flatten(1, 2))


class Grow(nn.Module):
    """One frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[n, C, H, W] -> [n * stride, C, H, W]."""
        return self.conv(frames).unflatten(1, (self.stride, -1)).flatten(0, 1)


class Bound(nn.Module):
    """Keeps latents within BOUND."""

    def forward(self, latents: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(latents / BOUND) * BOUND


class TinyAutoencoder(nn.Module):
    """The two lists of layers, under the published key names."""

    def __init__(self, layout: TinyLayout) -> None:
        super().__init__()
        pixel, width = 3 * layout.patch**2, layout.width
        encoder: list[nn.Module] = [conv(pixel, width), nn.ReLU()]
        for stride in layout.pools:
            halved = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            encoder += [Pool(width, stride), halved, *(Remembering(width) for _ in range(BLOCKS))]
        encoder.append(conv(width, layout.z_dim))
        first, *_, last = layout.decoder_widths
        grown = growing_layers(layout.decoder_widths, layout.grows)
        decoder = (Bound(), conv(layout.z_dim, first), nn.ReLU(), *grown, nn.ReLU(), conv(last, pixel))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)


def growing_layers(widths: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """The stages of a decoder, each of which doubles both sides and makes `stride` frames of one.

    widths: channels before the first stage and behind each.
    """
    layers: list[nn.Module] = []
    for stride, wide, narrow in zip(strides, widths, widths[1:], strict=False):
        layers += [Remembering(wide) for _ in range(BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), Grow(wide, stride), conv(wide, narrow, bias=False)]
    return layers


def conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """Three by three, at the size of its input."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def run_layers(layers: nn.Sequential, frames: Tensor, memory: Memory) -> Tensor:
    """The next frames [n, C, H, W] of a video through the layers. memory: what they saw last; empty at the start."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, Remembering):
            frames = layer(frames)
            continue
        last = memory.get(index, torch.zeros_like(frames[:1]))
        before = torch.cat((last, frames[:-1]))
        memory[index] = frames[-1:].clone()
        frames = layer(frames, before)
    return frames


class TinyVAE(WanVAE):
    """A loaded tiny autoencoder, in the place of a Wan VAE. statistics: of raw latents, or 0 and 1."""

    def __init__(
        self,
        model: TinyAutoencoder,
        layout: TinyLayout,
        statistics: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype,
        host: Host,
    ) -> None:
        self.model = model
        self.layout = layout
        self.dtype = dtype
        self.managed = host.manage(model)
        self._host = host
        self._mean, self._std = (value.float().view(-1, 1, 1, 1) for value in statistics)

    def _encode_chunks(self, video: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Latents [z, 1, h, w] of four frames at a time; the last frame is repeated to fill the last four."""
        memory: Memory = {}
        for part in video.split(VAE_TIME_STRIDE, dim=1):
            self._host.check_cancelled()
            frames = part.movedim(1, 0).add(1).div(2).to(device, self.dtype)
            frames = torch.cat((frames, frames[-1:].expand(VAE_TIME_STRIDE - len(frames), -1, -1, -1)))
            folded = F.pixel_unshuffle(frames, self.layout.patch)
            yield run_layers(self.model.encoder, folded, memory).movedim(0, 1).float().cpu()

    def _decode_chunks(self, raw: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Frames [3, f, H, W] of each latent frame: one of the first, four of the others."""
        memory: Memory = {}
        for index, latent in enumerate(raw.movedim(1, 0).split(1)):
            self._host.check_cancelled()
            frames = run_layers(self.model.decoder, latent.to(device, self.dtype), memory)
            pixels = F.pixel_shuffle(frames, self.layout.patch).float().cpu()
            # In 0..1, but for overshoot, which is cut off with everything else outside -1..1.
            yield pixels[0 if index else VAE_TIME_STRIDE - 1 :].mul(2).sub(1).movedim(0, 1)


def read_tiny_layout(shapes: Shapes) -> TinyLayout:
    """Sizes from the shapes of the published tensors. Raises KeyError that names the first one that is missing."""
    pixel = shapes["encoder.0.weight"][1]
    pools = tuple(shapes[f"encoder.{index}.conv.weight"] for index in POOLS)
    grows = tuple(shapes[f"decoder.{index}.conv.weight"] for index in GROWS)
    narrow = tuple(shapes[f"decoder.{index + 1}.weight"][0] for index in GROWS)
    return TinyLayout(
        z_dim=shapes["decoder.1.weight"][1],
        patch=math.isqrt(pixel // 3),
        width=shapes["encoder.0.weight"][0],
        decoder_widths=(shapes["decoder.1.weight"][0], *narrow),
        pools=tuple(shape[1] // max(shape[0], 1) for shape in pools),
        grows=tuple(shape[0] // max(shape[1], 1) for shape in grows),
    )


def load_tiny_vae(path: Path, *, dtype: torch.dtype, host: Host) -> TinyVAE:
    """Load TAEW2.1 or TAEW2.2, or LightX2V's of the same architecture ("light" in the name: raw latents).

    Raises FileNotFoundError, or ValueError if the file is no tiny autoencoder of Wan's latents or is incomplete.
    """
    checkpoint = open_checkpoint(path)
    try:
        layout = read_tiny_layout(checkpoint.shapes)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path.name} is no tiny VAE (it has no {error}): choose a safetensors file of taew2_1 or taew2_2; "
            "'WanVideo VAE Loader' loads the others."
        ) from error
    if layout.z_dim not in STATISTICS or {math.prod(layout.pools), math.prod(layout.grows)} != {VAE_TIME_STRIDE}:
        raise ValueError(
            f"{path.name} is a tiny VAE of {layout.z_dim} channels that makes {math.prod(layout.grows)} frames of a "
            "latent; Wan's latents have 16 or 48 channels and stand for 4 frames: choose taew2_1 or taew2_2."
        )
    with torch.device("meta"):
        model = TinyAutoencoder(layout)
    assign(model, checkpoint, {name: name for name, _ in model.named_parameters()}, dtype=dtype, what="tiny Wan VAE")
    mean, std = (torch.tensor(values) for values in STATISTICS[layout.z_dim])
    raw = RAW_LATENTS in path.name.lower()
    statistics = (mean, std) if raw else (torch.zeros_like(mean), torch.ones_like(std))
    vae = TinyVAE(model, layout, statistics, dtype=dtype, host=host)
    vae.recipe = partial(load_tiny_vae, path, dtype=dtype)
    return vae
