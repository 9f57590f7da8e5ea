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
# Tensor cores want channels in multiples of this.
WIDTH = 8


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


def causal_conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A causal convolution [B, C, F, H, W] -> [B, O, f, h, w] with its frames side by side as channels.

    For few channels the gradients of a 2-D convolution are many times faster than those of a 3-D one.
    """
    (taps, side, _), step = conv.kernel_size, conv.stride[0]
    # diffusers keeps the padding of WanCausalConv3d here: of columns, rows and frames, before and after each.
    frames = F.pad(x.movedim(1, -1), (0, 0, 0, 0, 0, 0, conv._padding[4], 0))
    last = frames.shape[1] - taps
    if taps > 1:
        frames = torch.cat([frames[:, n : n + last + 1 : step] for n in range(taps)], dim=-1)
    weight = conv.weight.movedim(2, 1).flatten(1, 2)
    if side == 1:
        return F.linear(frames, weight.flatten(1), conv.bias).movedim(-1, 1)
    spare_in, spare_out = -frames.shape[-1] % WIDTH, -len(weight) % WIDTH
    frames = F.pad(frames, (0, spare_in)).flatten(0, 1).movedim(-1, 1)
    weight = F.pad(weight, (0, 0, 0, 0, 0, spare_in, 0, spare_out))
    made = F.conv2d(frames, weight, F.pad(conv.bias, (0, spare_out)), padding=side // 2)[:, : conv.out_channels]
    return made.unflatten(0, (x.shape[0], -1)).movedim(2, 1)


@dataclass(frozen=True)
class WholeClip:
    """The two directions of a Wan 2.1 VAE. compiled: with a fused norm, which takes seconds to build."""

    vae: nn.Module
    compiled: bool = False

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 4n+1, H, W] in -1..1 -> posterior moments [B, 2 z, n + 1, H / 8, W / 8], not normalised."""
        encoder = self.vae.encoder
        x = causal_conv(encoder.conv_in, video)
        for layer in encoder.down_blocks:
            x = self._down(layer, x) if hasattr(layer, "resample") else self._residual(layer, x)
        x = self._normed(self._middle(encoder.mid_block, x), encoder.norm_out)
        return causal_conv(self.vae.quant_conv, causal_conv(encoder.conv_out, x))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, n + 1, h, w], not normalised -> video [B, 3, 4n+1, 8 h, 8 w]."""
        decoder = self.vae.decoder
        x = causal_conv(decoder.conv_in, causal_conv(self.vae.post_quant_conv, latents))
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = self._residual(layer, x)
            if block.upsamplers is not None:
                x = self._up(block.upsamplers[0], x)
        return causal_conv(decoder.conv_out, self._normed(x, decoder.norm_out))

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        cells = x.movedim(1, -1)
        gamma = (norm.gamma * norm.scale).flatten()
        rows = (fused_normed if self.compiled else normed)(cells.flatten(0, -2), gamma)
        return rows.view(cells.shape).movedim(-1, 1)

    def _residual(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = causal_conv(layer.conv1, self._normed(x, layer.norm1))
        kept = x if isinstance(layer.conv_shortcut, nn.Identity) else causal_conv(layer.conv_shortcut, x)
        return causal_conv(layer.conv2, self._normed(y, layer.norm2)) + kept

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        return self._residual(block.resnets[1], block.attentions[0](x))

    @staticmethod
    def _in_space(layer: nn.Module, x: Tensor) -> Tensor:
        frames = x.movedim(2, 1).flatten(0, 1)
        if layer.mode.startswith("upsample"):
            # Doubling by copies is exact in any type; the module's own goes through float32.
            frames = layer.resample[1](F.interpolate(frames, scale_factor=2, mode="nearest"))
        else:
            frames = layer.resample(frames)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)

    def _down(self, layer: nn.Module, x: Tensor) -> Tensor:
        x = self._in_space(layer, x)
        if layer.mode != "downsample3d" or x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], causal_conv(layer.time_conv, x)), dim=2)

    def _up(self, layer: nn.Module, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            later = causal_conv(layer.time_conv, x[:, :, 1:])
            pairs = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], pairs), dim=2)
        return self._in_space(layer, x)
