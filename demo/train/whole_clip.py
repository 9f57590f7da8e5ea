"""The Wan VAE over a whole clip at once, for training.

Inference streams: one frame, then four at a time, with cached convolution inputs, which is bound by kernel launches.
Over a whole clip the same numbers come from causal zero padding, but for the two time resamplings, which leave out the
first frame; tests/demo/test_training.py holds the two forms equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Z_DIM = 16
TINY = 1e-24


def normed(rows: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of rows [N, C] over their norm, computed in float32. gamma [C], the root of C included."""
    wide = rows.float()
    size = wide.square().sum(dim=1, keepdim=True).clamp(min=TINY)
    return F.silu(wide * size.rsqrt() * gamma).to(rows.dtype)


# A step is bound by memory: one kernel for the norm and its activation instead of seven.
compiled_normed = torch.compile(normed)


def fused_normed(rows: Tensor, gamma: Tensor) -> Tensor:
    """`normed` as one kernel for each number of channels, whatever the clip's length."""
    torch._dynamo.mark_dynamic(rows, 0)
    torch._dynamo.mark_static(rows, 1)
    torch._dynamo.mark_static(gamma, 0)
    return compiled_normed(rows, gamma)


@dataclass(frozen=True)
class WholeClip:
    """The two directions of a Wan 2.1 VAE. compiled: with a fused norm, which takes seconds to build."""

    vae: nn.Module
    compiled: bool = False

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 4n+1, H, W] in -1..1 -> posterior moments [B, 2 z, n + 1, H / 8, W / 8], not normalized."""
        encoder = self.vae.encoder
        x = encoder.conv_in(video)
        for layer in encoder.down_blocks:
            x = self._down(layer, x) if hasattr(layer, "resample") else self._residual(layer, x)
        x = self._normed(self._middle(encoder.mid_block, x), encoder.norm_out)
        return self.vae.quant_conv(encoder.conv_out(x))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, n + 1, h, w], not normalized -> video [B, 3, 4n+1, 8 h, 8 w]."""
        decoder = self.vae.decoder
        x = self._middle(decoder.mid_block, decoder.conv_in(self.vae.post_quant_conv(latents)))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = self._residual(layer, x)
            if block.upsamplers is not None:
                x = self._up(block.upsamplers[0], x)
        return decoder.conv_out(self._normed(x, decoder.norm_out))

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        cells = x.movedim(1, -1)
        gamma = (norm.gamma * norm.scale).flatten()
        rows = (fused_normed if self.compiled else normed)(cells.flatten(0, -2), gamma)
        return rows.view(cells.shape).movedim(-1, 1)

    def _residual(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer.conv1(self._normed(x, layer.norm1))
        return layer.conv2(self._normed(y, layer.norm2)) + layer.conv_shortcut(x)

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        return self._residual(block.resnets[1], block.attentions[0](x))

    @staticmethod
    def _in_space(layer: nn.Module, x: Tensor) -> Tensor:
        frames = x.movedim(2, 1).flatten(0, 1)
        return layer.resample(frames).unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)

    def _down(self, layer: nn.Module, x: Tensor) -> Tensor:
        x = self._in_space(layer, x)
        if layer.mode != "downsample3d" or x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)

    def _up(self, layer: nn.Module, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            later = layer.time_conv(x[:, :, 1:])
            pairs = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], pairs), dim=2)
        return self._in_space(layer, x)
