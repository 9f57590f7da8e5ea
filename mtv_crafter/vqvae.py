"""The motion tokenizer of MTVCrafter (Ding et al. 2025): a VQ-VAE over the joints of a body, frame by frame.

Joints along one axis and frames along the other are a picture of three channels; two stages halve its frames, the first
of them counting alone as in the video's VAE. Module names are the published keys. Source: DINGYANB/MTVCrafter
(models/motion4d/vqvae). Shapes: B batch, F frames, f latent frames, J joints, D code size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.assign import assign
from ..wanvideo.checkpoint import open_checkpoint
from .joints import deviation, mean

if TYPE_CHECKING:
    from ..host import Host

GROUPS = 32
# Convolutions see as far as if they were this wide: narrow ones are dilated.
FULL_WIDTH = 512
# Frames, and latent frames, that are encoded and decoded at once.
ENCODED, DECODED = 8, 2
CODEBOOK = "vq.codebook"


@dataclass(frozen=True)
class VqSizes:
    """Channels of the outer and inner stages, size and number of codes."""

    outer: int
    inner: int
    code: int
    codes: int


class ResBlock(nn.Module):
    """Two convolutions behind norms, added to their input."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        reach = max(1, FULL_WIDTH // out - 1)
        self.block = nn.Sequential(
            nn.GroupNorm(GROUPS, channels, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(channels, out, 3, padding=reach, dilation=reach),
            nn.GroupNorm(GROUPS, out, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(out, out, 1),
        )
        self.conv_short = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, J] -> [B, out, F, J]."""
        return self.conv_short(x) + self.block(x)


class Downsample(nn.Module):
    """Means of two frames each, then a convolution along the joints."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.joint_downsample = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, J] -> [B, C, ceil(F / 2), J]; the first of an odd number of frames stays as it is."""
        first, rest = x.split((x.shape[2] % 2, x.shape[2] // 2 * 2), dim=2)
        halved = rest.unflatten(2, (rest.shape[2] // 2, 2)).mean(dim=3)
        return _along_joints(self.joint_downsample, torch.cat((first, halved), dim=2))


class Upsample(nn.Module):
    """Twice the frames by interpolation, then a convolution along the joints."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsampler = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, f, J] -> [B, C, 2f or 2f - 1, J]; the first of an odd number of frames stays as it is."""
        first, rest = x.split((x.shape[2] % 2, x.shape[2] // 2 * 2), dim=2)
        if rest.shape[2]:
            rest = F.interpolate(rest, scale_factor=(2.0, 1.0), mode="bilinear", align_corners=True)
        return _along_joints(self.upsampler, torch.cat((first, rest), dim=2))


def _along_joints(layer: nn.Conv1d, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2)
    return layer(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class Encoder(nn.Module):
    """Joints to codes."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        outer, inner = sizes.outer, sizes.inner
        self.conv_in = nn.Conv2d(3, outer, 3, padding=1)
        self.resnet1 = nn.ModuleList(ResBlock(outer, outer) for _ in range(3))
        self.downsample1 = Downsample(outer)
        self.resnet2 = ResBlock(outer, inner)
        self.resnet3 = nn.ModuleList(ResBlock(inner, inner) for _ in range(3))
        self.downsample2 = Downsample(inner)
        self.conv_out = nn.Conv2d(inner, sizes.code, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, F, J] -> [B, D, f, J]."""
        x = _through(self.resnet1, self.conv_in(x))
        x = _through(self.resnet3, self.resnet2(self.downsample1(x)))
        return self.conv_out(self.downsample2(x))


class Decoder(nn.Module):
    """Codes to joints."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        outer, inner = sizes.outer, sizes.inner
        self.conv_in = nn.Conv2d(sizes.code, inner, 3, padding=1)
        self.resnet1 = nn.ModuleList(ResBlock(inner, inner) for _ in range(3))
        self.upsample1 = Upsample(inner)
        self.resnet2 = ResBlock(inner, outer)
        self.resnet3 = nn.ModuleList(ResBlock(outer, outer) for _ in range(3))
        self.upsample2 = Upsample(outer)
        self.conv_out = nn.Conv2d(outer, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, f, J] -> [B, 3, F, J]."""
        x = _through(self.resnet1, self.conv_in(x))
        x = _through(self.resnet3, self.resnet2(self.upsample1(x)))
        return self.conv_out(self.upsample2(x))


def _through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class VectorQuantizer(nn.Module):
    """The nearest of the codes."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.zeros(sizes.codes, sizes.code))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, f, J] -> the same, of codes."""
        vectors = x.permute(0, 2, 3, 1)
        # The square of the vector itself is the same for all codes.
        distance = self.codebook.square().sum(dim=1) - 2 * vectors @ self.codebook.t()
        return self.codebook[distance.argmin(dim=-1)].permute(0, 3, 1, 2)


class MotionVqVae(nn.Module):
    """Encoder, codes and decoder."""

    def __init__(self, sizes: VqSizes) -> None:
        super().__init__()
        self.encoder, self.decoder, self.vq = Encoder(sizes), Decoder(sizes), VectorQuantizer(sizes)

    def codes(self, joints: Tensor) -> Tensor:
        """Normalized joints [B, F, J, 3] -> codes [B, D, f, J]."""
        return self.vq(_in_parts(self.encoder, joints.permute(0, 3, 1, 2), ENCODED))

    def joints(self, codes: Tensor) -> Tensor:
        """[B, D, f, J] -> normalized joints [B, F, J, 3]."""
        return _in_parts(self.decoder, codes, DECODED).permute(0, 2, 3, 1)


def _in_parts(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Parts of `size` frames by themselves, what is left over with the first."""
    return torch.cat([run(x[:, :, start:stop]) for start, stop in _parts(x.shape[2], size)], dim=2)


def _parts(frames: int, size: int) -> Iterator[tuple[int, int]]:
    first = frames if frames < 2 * size else size + frames % size
    yield 0, first
    yield from ((start, start + size) for start in range(first, frames, size))


class MotionTokenizer:
    """A loaded VQ-VAE under the host's memory management (socket VQVAE)."""

    def __init__(self, model: MotionVqVae, *, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)

    @torch.no_grad()
    def encode(self, joints: Tensor) -> tuple[Tensor, Tensor]:
        """Joints [F, J, 3] in mm -> tokens [1, f * J, D], and the joints that they stand for; float32 on the CPU."""
        device = self.managed.acquire()
        try:
            normalized = (joints.float() - mean()) / deviation()
            codes = self.model.codes(normalized[None].to(device))
            seen = self.model.joints(codes)[0].cpu() * deviation() + mean()
            return codes.flatten(2).transpose(1, 2).contiguous().cpu(), seen
        finally:
            self.managed.release()


def load_tokenizer(path: Path, host: Host) -> MotionTokenizer:
    """Load it in float32. Raises ValueError for another kind of file."""
    checkpoint = open_checkpoint(path)
    names = ("encoder.conv_in.weight", "encoder.conv_out.weight", CODEBOOK)
    shapes: Sequence[tuple[int, ...] | None] = [checkpoint.shapes.get(name) for name in names]
    if None in shapes:
        raise ValueError(
            f"{path.name} is no motion VQ-VAE of MTVCrafter: choose MTV_Crafter_4DMoT_VQVAE_fp32.safetensors."
        )
    first, last, codebook = shapes
    with torch.device("meta"):
        model = MotionVqVae(VqSizes(outer=first[0], inner=last[1], code=codebook[1], codes=codebook[0]))
    parameters = {name: name for name, _ in model.named_parameters()}
    assign(model, checkpoint, parameters, dtype=torch.float32, what="motion VQ-VAE")
    return MotionTokenizer(model, host=host)
