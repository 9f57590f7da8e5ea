"""The Wav2Vec2 speech encoder: sound at 16 kHz -> features of every layer at the video's frame rate.

Source: Baevski et al. 2020 and facebook/wav2vec2 (architecture), MeiGen-AI/MultiTalk (features interpolated to the
video's rate between the convolutions and the transformer layers).

Memory is bounded for sound of any length. The convolutions run piece by piece and give what a single pass gives: their
only global part, the first layer's group norm, takes its statistics from a pass over all pieces before. Attention is
global too, so it runs in one pass up to WHOLE_SECONDS, and beyond it in pieces that see CONTEXT_SECONDS on both sides.
The published encoders were trained on pieces of 16 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..kernels import with_float64
from ..quiet_imports import kernels_hidden
from ..wanvideo.assign import assign, head_count, layer_count
from ..wanvideo.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ..host import Host

SAMPLE_RATE = 16000
HEAD_SIZE = 64
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
HOP = 320
RECEPTIVE_FIELD = 400
PREFIX = "wav2vec2."
# Of large models alone: a norm behind every convolution, instead of one behind the first.
LARGE = "feature_extractor.conv_layers.1.layer_norm.weight"
WHOLE_SECONDS, PIECE_SECONDS, CONTEXT_SECONDS = 300, 120, 15
# Convolution frames, 50 a second, that are computed at once.
CONV_PIECE = 1500


@dataclass(frozen=True)
class Statistics:
    """Mean and one over the deviation of the first convolution's channels, [1, C, 1] float32."""

    mean: Tensor
    scale: Tensor


class Wav2Vec:
    """A loaded Wav2Vec2 encoder under the host's memory management."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)
        self.dtype = dtype

    @torch.no_grad()
    def encode(self, sound: NDArray[np.floating], frames: int) -> Tensor:
        """Mono sound at 16 kHz -> features at `frames` video frames: [frames, layers, channels] on the CPU.

        The convolutional features are interpolated to the video rate before the transformer layers see them.
        """
        device = self.managed.acquire()
        samples = torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32))
        if samples.shape[0] < RECEPTIVE_FIELD:
            samples = F.pad(samples, (0, RECEPTIVE_FIELD - samples.shape[0]))
        count = (samples.shape[0] - RECEPTIVE_FIELD) // HOP + 1
        if count <= CONV_PIECE:
            whole = self.model.feature_extractor(samples[None].to(device, self.dtype)).float()
            features = F.interpolate(whole, size=frames, mode="linear", align_corners=True)
            return self._layers(features)
        statistics = self._statistics(samples, count, device)
        rate = frames * SAMPLE_RATE / samples.shape[0]
        result: Tensor | None = None
        for kept, seen in pieces(frames, rate):
            features = self._video_features(samples, statistics, count, frames, seen, device)
            outputs = self._layers(features)[kept.start - seen.start : kept.stop - seen.start]
            if result is None:
                result = torch.empty(frames, *outputs.shape[1:])
            result[kept.start : kept.stop] = outputs
        return result

    def _statistics(self, samples: Tensor, count: int, device: torch.device) -> Statistics:
        """Of the first convolution over the whole sound, summed in float64."""
        first = self.model.feature_extractor.conv_layers[0]
        kernel, stride = first.conv.kernel_size[0], CONV_STRIDES[0]
        total = (samples.shape[0] - kernel) // stride + 1
        step = CONV_PIECE * HOP // stride
        place = with_float64(device)
        sums = torch.zeros(2, first.conv.out_channels, dtype=torch.float64, device=place)
        for start in range(0, total, step):
            stop = min(start + step, total)
            part = samples[start * stride : (stop - 1) * stride + kernel]
            values = first.conv(part[None, None].to(device, self.dtype)).to(place).double()
            sums += torch.stack((values.sum(dim=(0, 2)), values.square().sum(dim=(0, 2))))
        mean, square = sums / total
        scale = (square - mean.square()).clamp(min=0).add(first.layer_norm.eps).rsqrt()
        return Statistics(mean[None, :, None].float().to(device), scale[None, :, None].float().to(device))

    def _video_features(
        self, samples: Tensor, statistics: Statistics, count: int, frames: int, wanted: range, device: torch.device
    ) -> Tensor:
        """Convolutional features at these of `frames` video frames, [1, C, n], interpolated with the ends aligned."""
        places = torch.tensor(wanted, dtype=torch.float64) * (count - 1) / max(frames - 1, 1)
        low = places.floor().long().clamp(max=count - 2)
        share = (places - low).float().to(device)
        first, last = int(low[0]), int(low[-1]) + 1
        parts = [
            self._convolve(samples[start * HOP : (stop - 1) * HOP + RECEPTIVE_FIELD], statistics, device)
            for start, stop in _steps(first, last + 1, CONV_PIECE)
        ]
        features = torch.cat(parts, dim=2)
        index = (low - first).to(device)
        return features[..., index] * (1 - share) + features[..., index + 1] * share

    def _convolve(self, samples: Tensor, statistics: Statistics, device: torch.device) -> Tensor:
        first, *others = self.model.feature_extractor.conv_layers
        values = first.conv(samples[None, None].to(device, self.dtype)).float()
        norm = first.layer_norm
        values = (values - statistics.mean) * statistics.scale
        values = values * norm.weight.float()[None, :, None] + norm.bias.float()[None, :, None]
        values = first.activation(values.to(self.dtype))
        for layer in others:
            values = layer(values)
        return values.float()

    def _layers(self, features: Tensor) -> Tensor:
        """Interpolated features [1, C, n] -> every layer's output, [n, layers, channels] float32 on the CPU."""
        outputs: list[Tensor] = []
        hooks = [layer.register_forward_hook(_keep(outputs)) for layer in self.model.encoder.layers]
        try:
            hidden, _ = self.model.feature_projection(features.transpose(1, 2).contiguous().to(self.dtype))
            self.model.encoder(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(outputs, dim=1)


def _keep(outputs: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

    return hook


def pieces(frames: int, rate: float) -> Iterator[tuple[range, range]]:
    """How attention is cut, as (frames that are kept, frames that are seen); rate: frames a second."""
    if frames <= WHOLE_SECONDS * rate:
        yield range(frames), range(frames)
        return
    context = round(CONTEXT_SECONDS * rate)
    for start, stop in _steps(0, frames, max(round(PIECE_SECONDS * rate), 1)):
        yield range(start, stop), range(max(start - context, 0), min(stop + context, frames))


def _steps(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, size):
        yield begin, min(begin + size, stop)


def load_wav2vec(path: Path, *, dtype: torch.dtype, host: Host) -> Wav2Vec:
    """Load a Wav2Vec2 encoder (base layout, any width), with or without the `wav2vec2.` prefix.

    Raises ValueError for another kind of file.
    """
    checkpoint = open_checkpoint(path)
    if any(key.removeprefix(PREFIX) == LARGE for key in checkpoint.shapes):
        raise ValueError(f"{path.name} is a large Wav2Vec2; the audio layers need a base model.")
    return Wav2Vec(read_encoder(checkpoint, dtype=dtype), dtype=dtype, host=host)


def read_encoder(checkpoint: Checkpoint, *, dtype: torch.dtype) -> nn.Module:
    """transformers' Wav2Vec2Model of a file, base or large. Raises ValueError for another kind of file."""
    path = checkpoint.path
    prefix = PREFIX if any(key.startswith(PREFIX) for key in checkpoint.shapes) else ""
    if f"{prefix}feature_extractor.conv_layers.0.conv.weight" not in checkpoint.shapes:
        raise ValueError(f"{path.name} is no Wav2Vec2 encoder: choose chinese-wav2vec2-base or wav2vec2-base-960h.")
    with torch.device("meta"):
        model = _build(checkpoint, prefix)
    names = {name: prefix + _stored_name(name, checkpoint, prefix) for name, _ in model.named_parameters()}
    if names.get("masked_spec_embed") not in checkpoint.shapes:
        # It only matters in training, and some exports leave it out.
        del model.masked_spec_embed
    assign(model, checkpoint, names, dtype=dtype, what="Wav2Vec2 encoder")
    return model


def _stored_name(name: str, checkpoint: Checkpoint, prefix: str) -> str:
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, published in old.items():
        if name.endswith(new) and prefix + name not in checkpoint.shapes:
            return name.replace(new, published)
    return name


def _build(checkpoint: Checkpoint, prefix: str) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import Wav2Vec2Config, Wav2Vec2Model

    shapes = {k.removeprefix(prefix): v for k, v in checkpoint.shapes.items() if k.startswith(prefix)}
    large = LARGE in shapes
    convs = [shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(len(CONV_STRIDES))]
    width = shapes["feature_projection.projection.weight"][0]
    kernel = next(v for k, v in shapes.items() if "pos_conv_embed.conv" in k and len(v) == 3 and v[0] == width)
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=layer_count(shapes, "encoder.layers."),
        num_attention_heads=head_count(checkpoint, width, HEAD_SIZE),
        intermediate_size=shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        conv_dim=tuple(shape[0] for shape in convs),
        conv_kernel=tuple(shape[2] for shape in convs),
        conv_stride=CONV_STRIDES,
        num_conv_pos_embeddings=kernel[2],
        num_conv_pos_embedding_groups=width // kernel[1],
        conv_bias="feature_extractor.conv_layers.1.conv.bias" in shapes,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
    )
    return Wav2Vec2Model(config)
