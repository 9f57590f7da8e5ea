"""The forward of diffusers' AutoencoderKLWan, chunk by chunk, in the layout and the passes that a GPU is fast with.

The modules and their numbers are diffusers'; only the way through them is another. Activations keep channels innermost,
norm and SiLU are one pass that writes where the convolution reads, behind the last two frames of the chunk before, and
the convolution pads space itself: nothing is concatenated, padded or converted.
Source: huggingface/diffusers (autoencoder_kl_wan), Wan-Video/Wan2.1 (causal cache).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.channel_rows import add_biased, norm_silu

LAYOUT = torch.channels_last_3d


class VaeStream:
    """One video's way through an encoder or a decoder; remembers the frames that causal convolutions look back at."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}
        self._first = True

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """One frame [1, C, 1, H, W], then four at a time -> moments [1, 2z, 1, h, w] before quant_conv."""
        x = self._conv(encoder.conv_in, pixels.contiguous(memory_format=LAYOUT))
        for layer in encoder.down_blocks:
            x = self._down(layer, x)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        self._first = False
        return x

    def decode(self, decoder: nn.Module, latent: Tensor) -> Tensor:
        """One latent frame [1, z, 1, h, w] behind post_quant_conv -> pixels, one frame of the first, then four."""
        x = self._middle(decoder.mid_block, self._conv(decoder.conv_in, latent.contiguous(memory_format=LAYOUT)))
        for block in decoder.up_blocks:
            x = self._up(block, x)
        x = self._head(decoder, x)
        self._first = False
        return x

    def _head(self, side: nn.Module, x: Tensor) -> Tensor:
        y = self._normed(side.conv_out, x, side.norm_out)
        return y.add_(side.conv_out.bias.view(-1, 1, 1, 1))

    def _down(self, layer: nn.Module, x: Tensor) -> Tensor:
        if hasattr(layer, "resnets"):
            y = x
            for block in layer.resnets:
                y = self._residual(block, y)
            if layer.downsampler is not None:
                y = self._smaller(layer.downsampler, y)
            return y.add_(layer.avg_shortcut(x))
        if hasattr(layer, "resample"):
            return self._smaller(layer, x)
        return self._residual(layer, x) if hasattr(layer, "conv1") else layer(x)

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(residual, attention(x))
        return x

    def _up(self, block: nn.Module, x: Tensor) -> Tensor:
        y = x
        for residual in block.resnets:
            y = self._residual(residual, y)
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or (None,))[0]
        if upsampler is not None:
            y = self._larger(upsampler, y)
        shortcut = getattr(block, "avg_shortcut", None)
        return y if shortcut is None else y.add_(shortcut(x, first_chunk=self._first))

    def _residual(self, block: nn.Module, x: Tensor) -> Tensor:
        kept = x if isinstance(block.conv_shortcut, nn.Identity) else block.conv_shortcut(x)
        y = self._normed(block.conv1, x, block.norm1)
        y = self._normed(block.conv2, y, block.norm2, bias=block.conv1.bias)
        return add_biased(_dense(y), block.conv2.bias, _dense(kept))

    def _normed(self, conv: nn.Conv3d, x: Tensor, norm: nn.Module, *, bias: Tensor | None = None) -> Tensor:
        """The convolution, without its bias, of norm and SiLU of x + bias."""
        whole, now = self._behind_tail(conv, x)
        norm_silu(_dense(x), norm.gamma, now, bias)
        return self._causal(conv, whole, None)

    def _conv(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        whole, now = self._behind_tail(conv, x)
        now.copy_(x)
        return self._causal(conv, whole, conv.bias)

    def _behind_tail(self, conv: nn.Conv3d, x: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the frames that the convolution looks back at and for those of x, and its part for those of x."""
        back, (_, channels, frames, height, width) = conv._padding[4], x.shape
        shape = (1, channels, back + frames, height, width)
        whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
        tail = self._tails.get(conv)
        past = whole[:, :, :back]
        past.zero_() if tail is None else past.copy_(tail)
        return whole, whole[:, :, back:]

    def _causal(self, conv: nn.Conv3d, whole: Tensor, bias: Tensor | None) -> Tensor:
        left, _, top, _, back, _ = conv._padding
        self._tails[conv] = whole[:, :, -back:].clone()
        return F.conv3d(whole, conv.weight, bias, conv.stride, (0, top, left))

    def _larger(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Twice the width and height, and behind the first chunk twice the frames where the layer has a time_conv."""
        pairs = 1
        if hasattr(layer, "time_conv") and not self._first:
            x, pairs = self._conv(layer.time_conv, x), 2
        _, channels, frames, height, width = x.shape
        cells = x.permute(0, 2, 3, 4, 1).reshape(frames, 1, height, 1, width, 1, pairs, channels // pairs)
        cells = cells.permute(0, 6, 2, 3, 4, 5, 7, 1)[..., 0].expand(-1, -1, -1, 2, -1, 2, -1)
        images = cells.reshape(frames * pairs, 2 * height, 2 * width, channels // pairs).permute(0, 3, 1, 2)
        return _as_video(layer.resample[1](images))

    def _smaller(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Half the width and height, and behind the first chunk half the frames where the layer has a time_conv."""
        images = F.pad(x[0].transpose(0, 1), (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)
        x = _as_video(layer.resample[1](images))
        if not hasattr(layer, "time_conv"):
            return x
        conv, last = layer.time_conv, x[:, :, -1:].clone()
        if not self._first:
            whole = torch.cat((self._tails[conv], x), dim=2).contiguous(memory_format=LAYOUT)
            x = F.conv3d(whole, conv.weight, conv.bias, conv.stride)
        self._tails[conv] = last
        return x


def _dense(x: Tensor) -> Tensor:
    """Channels innermost, as convolutions on a GPU leave them; those on a CPU do not."""
    return x.contiguous(memory_format=LAYOUT)


def _as_video(images: Tensor) -> Tensor:
    """[T, C, H, W] in channels_last as [1, C, T, H, W] in channels_last_3d, without a copy."""
    return images.transpose(0, 1)[None].contiguous(memory_format=LAYOUT)
