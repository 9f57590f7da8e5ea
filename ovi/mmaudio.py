"""MMAudio's VAE of sound at 16 kHz: log mel spectra [B, 80, 2 L] to latents [B, 20, L] and back.

Magnitude-preserving layers (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").
Source: MMAudio (Cheng et al. 2025; hkchengrex/MMAudio). Names are the published keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (1, 2, 4)
ENCODER_UNITS, DECODER_UNITS = 2, 3
# Where the length is halved: behind this level of the encoder, before this one of the decoder.
DOWN, UP = 0, 1
EPSILON = 1e-4
SILU_GAIN = 0.596
BRANCH = 0.3
LARGEST = 256.0


def unit_size(x: Tensor, dim: int) -> Tensor:
    """x over its root mean square along `dim`."""
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[dim])
    return x / (size + EPSILON).to(x.dtype)


def preserving_silu(x: Tensor) -> Tensor:
    """SiLU whose output is as large as its input, on average."""
    return functional.silu(x) / SILU_GAIN


def joined(x: Tensor, branch: Tensor) -> Tensor:
    """A residual sum that is as large as its parts, on average."""
    return x.lerp(branch, BRANCH) / math.hypot(1 - BRANCH, BRANCH)


class PreservingConv(nn.Module):
    """A convolution without bias that keeps lengths; `fold` must have seen its weight."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, channels, kernel))

    def fold(self) -> None:
        """Give the stored weight unit size a filter, once, in float32."""
        rows = self.weight.data.float().flatten(1)
        self.weight.data = (unit_size(rows, 1) / math.sqrt(rows.shape[1])).view_as(self.weight).to(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[B, channels, L] -> [B, out, L]."""
        return functional.conv1d(x, self.weight * gain, padding=self.weight.shape[2] // 2)


class ResidualUnit(nn.Module):
    """Two convolutions around a residual."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = PreservingConv(channels, out, 3), PreservingConv(out, out, 3)
        if channels != out:
            self.nin_shortcut = PreservingConv(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, L] -> [B, out, L]."""
        x = unit_size(x, 1)
        branch = self.conv2(preserving_silu(self.conv1(preserving_silu(x))))
        return joined(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x, branch)


class LengthAttention(nn.Module):
    """Attention of one head along the length. Channels of q, k and v lie next to each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.proj_out = PreservingConv(channels, 3 * channels, 1), PreservingConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> the same."""
        parts = unit_size(self.qkv(x).unflatten(1, (-1, 3)), 1)
        q, k, v = (part.mT.unsqueeze(1) for part in parts.unbind(2))
        heads = functional.scaled_dot_product_attention(q, k, v)
        return joined(x, self.proj_out(heads.squeeze(1).mT))


class Halving(nn.Module):
    """Half the length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = PreservingConv(channels, channels, 1), PreservingConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C, L // 2]."""
        return self.conv2(functional.avg_pool1d(self.conv1(x), 2))


class Doubling(nn.Module):
    """Twice the length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = PreservingConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C, 2 L]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest-exact"))


class Middle(nn.Module):
    """The level of the fewest frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualUnit(channels, channels), ResidualUnit(channels, channels)
        self.attn_1 = LengthAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> the same."""
        return self.block_2(self.attn_1(self.block_1(x))).clamp(-LARGEST, LARGEST)


class Level(nn.Module):
    """Units of one width."""

    def __init__(self, channels: int, out: int, units: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualUnit(out if unit else channels, out) for unit in range(units))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, L] -> [B, out, L]."""
        for unit in self.block:
            x = unit(x).clamp(-LARGEST, LARGEST)
        return x


class Ends(nn.Module):
    """What both halves of the VAE have: a convolution at either end, and the level between them."""

    def __init__(self, channels: int, first: int, middle: int, last: int, out: int) -> None:
        super().__init__()
        self.conv_in, self.conv_out = PreservingConv(channels, first, 3), PreservingConv(last, out, 3)
        self.mid = Middle(middle)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def last(self, x: Tensor) -> Tensor:
        """The convolution at the end."""
        return self.conv_out(preserving_silu(x), self.learnable_gain + 1)


class Encoder(Ends):
    """Normalized spectra to means and log variances of latents."""

    def __init__(self, width: int, bands: int, latents: int) -> None:
        wide = [width * times for times in WIDTHS]
        super().__init__(bands, width, wide[-1], wide[-1], 2 * latents)
        self.down = nn.ModuleList(
            Level(before, out, ENCODER_UNITS) for before, out in zip((width, *wide), wide, strict=False)
        )
        self.down[DOWN].downsample = Halving(wide[DOWN])

    def forward(self, x: Tensor) -> Tensor:
        """[B, bands, 2 L] -> [B, 2 latents, L]."""
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x)
            if index == DOWN:
                x = level.downsample(x)
        return self.last(self.mid(x))


class Decoder(Ends):
    """Latents to normalized spectra."""

    def __init__(self, width: int, bands: int, latents: int) -> None:
        wide = [width * times for times in WIDTHS]
        super().__init__(latents, wide[-1], wide[-1], width, bands)
        self.up = nn.ModuleList(
            Level(before, out, DECODER_UNITS) for before, out in zip((*wide[1:], wide[-1]), wide, strict=True)
        )
        self.up[UP].upsample = Doubling(wide[UP])

    def forward(self, z: Tensor) -> Tensor:
        """[B, latents, L] -> [B, bands, 2 L]."""
        x = self.mid(self.conv_in(z))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
            if index == UP:
                x = self.up[index].upsample(x)
        return self.last(x)


@dataclass(frozen=True)
class VaeSizes:
    """width of the narrowest level, bands of the spectra, channels of the latents."""

    width: int
    bands: int
    latents: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Of a file's tensors. Raises KeyError for another kind of file."""
        width, bands, _ = shapes["encoder.conv_in.weight"]
        return cls(width, bands, shapes["decoder.conv_in.weight"][1])


class SpectrumVae(nn.Module):
    """Encoder and decoder, with the statistics of the spectra that both work with."""

    def __init__(self, sizes: VaeSizes) -> None:
        super().__init__()
        self.data_mean, self.data_std = (nn.Parameter(torch.ones(1, sizes.bands, 1)) for _ in range(2))
        self.encoder = Encoder(sizes.width, sizes.bands, sizes.latents)
        self.decoder = Decoder(sizes.width, sizes.bands, sizes.latents)

    def fold(self) -> None:
        """Ready all convolutions."""
        for module in self.modules():
            if isinstance(module, PreservingConv):
                module.fold()

    def encode(self, spectrum: Tensor) -> Tensor:
        """Log mel spectrum [B, bands, 2 L] -> means of the latents [B, latents, L]."""
        return self.encoder((spectrum - self.data_mean) / self.data_std).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, latents, L] -> log mel spectrum [B, bands, 2 L]."""
        return self.decoder(latents) * self.data_std + self.data_mean
