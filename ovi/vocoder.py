"""BigVGAN: log mel spectra to sound.

Source: BigVGAN (Lee et al. 2023; NVIDIA/BigVGAN), filters of alias-free activations (Karras et al. 2021). Names are the
published keys, weight normalization included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from ..wanvideo.assign import layer_count

DILATIONS = (1, 3, 5)
FILTER = 12
TINY = 1e-9
NORMED = "parametrizations.weight.original1"


class Doubler(nn.Module):
    """Twice the samples, through a low-pass filter [1, 1, 12] that the file has."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.zeros(1, 1, FILTER))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, 2 T]."""
        pad = FILTER // 2 - 1
        x = functional.pad(x, (pad, pad), mode="replicate")
        kernel = self.filter.expand(x.shape[1], -1, -1)
        x = 2 * functional.conv_transpose1d(x, kernel, stride=2, groups=x.shape[1])
        cut = 2 * pad + (FILTER - 2) // 2
        return x[..., cut:-cut]


class LowPass(nn.Module):
    """Half the samples, through a filter of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.zeros(1, 1, FILTER))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T / 2]."""
        x = functional.pad(x, (FILTER // 2 - 1, FILTER // 2), mode="replicate")
        return functional.conv1d(x, self.filter.expand(x.shape[1], -1, -1), stride=2, groups=x.shape[1])


class Halver(nn.Module):
    """A `LowPass` under its published name."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T / 2]."""
        return self.lowpass(x)


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b with a and b in logarithms, a pair a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> the same."""
        alpha, beta = (p.exp()[:, None] for p in (self.alpha, self.beta))
        return x + (x * alpha).sin().square() / (beta + TINY)


class AliasFree(nn.Module):
    """The activation at twice the rate, so that its overtones do not fold back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.upsample, self.downsample = Doubler(), Halver()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> the same."""
        return self.downsample(self.act(self.upsample(x)))


def _conv(channels: int, out: int, kernel: int, dilation: int = 1) -> nn.Module:
    return weight_norm(nn.Conv1d(channels, out, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2))


class PeriodicUnit(nn.Module):
    """Three residual pairs of dilated convolutions."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(channels, channels, kernel, dilation) for dilation in DILATIONS)
        self.convs2 = nn.ModuleList(_conv(channels, channels, kernel) for _ in DILATIONS)
        self.activations = nn.ModuleList(AliasFree(channels) for _ in range(2 * len(DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> the same."""
        for index, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            before, between = self.activations[2 * index], self.activations[2 * index + 1]
            x = x + second(between(first(before(x))))
        return x


@dataclass(frozen=True)
class VocoderSizes:
    """bands of the spectra, width of the first level; kernels of its upsampling steps, and of a level's units."""

    bands: int
    width: int
    steps: tuple[int, ...]
    units: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Of a file's tensors under published names. Raises KeyError for another kind of file."""
        width, bands, _ = shapes[f"conv_pre.{NORMED}"]
        steps = tuple(shapes[f"ups.{i}.0.{NORMED}"][2] for i in range(layer_count(shapes, "ups.")))
        units = layer_count(shapes, "resblocks.") // max(len(steps), 1)
        kernels = tuple(shapes[f"resblocks.{i}.convs1.0.{NORMED}"][2] for i in range(units))
        return cls(bands, width, steps, kernels)


class BigVgan(nn.Module):
    """Each level has half the channels and a multiple of the samples."""

    def __init__(self, sizes: VocoderSizes) -> None:
        super().__init__()
        widths = [sizes.width >> level for level in range(len(sizes.steps) + 1)]
        self.conv_pre = _conv(sizes.bands, sizes.width, 7)
        self.ups = nn.ModuleList(
            nn.ModuleList([
                weight_norm(nn.ConvTranspose1d(before, after, kernel, kernel // 2, padding=kernel // 4))
            ])
            for before, after, kernel in zip(widths, widths[1:], sizes.steps, strict=False)
        )  # fmt: skip
        self.resblocks = nn.ModuleList(PeriodicUnit(after, kernel) for after in widths[1:] for kernel in sizes.units)
        self.units = len(sizes.units)
        self.activation_post = AliasFree(widths[-1])
        self.conv_post = _conv(widths[-1], 1, 7)

    def fold(self) -> None:
        """Multiply the normalized weights out."""
        for module in list(self.modules()):
            if hasattr(module, "parametrizations"):
                remove_parametrizations(module, "weight")

    def forward(self, spectrum: Tensor) -> Tensor:
        """[B, bands, T] -> sound [B, 1, samples] in -1..1."""
        x = self.conv_pre(spectrum)
        for level, (step,) in enumerate(self.ups):
            x = step(x)
            units = self.resblocks[level * self.units : (level + 1) * self.units]
            x = sum(unit(x) for unit in units) / self.units
        return self.conv_post(self.activation_post(x)).tanh()
