"""The encoder of Whisper: sound at 16 kHz -> five levels of features at the video's frame rate.

Source: Radford et al. 2022 and openai/whisper-large-v3 (architecture), Phantom-video/HuMo (pieces of 30 s, levels).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..quiet_imports import kernels_hidden
from ..wanvideo.assign import assign, head_count, layer_count
from ..wanvideo.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ..host import Host

SAMPLE_RATE = 16000
HEAD_SIZE = 64
# Encoder frames a second, and those of the videos that models were trained on.
ENCODER_FPS, VIDEO_FPS = 50, 25
# Rounding error of times in floating point, far below one sample.
SLACK = 1e-6
SAMPLES_A_FRAME = SAMPLE_RATE // VIDEO_FPS
# Levels below the last: layers are averaged in as many groups.
GROUPS = 4
LEVELS = GROUPS + 1
PREFIXES = ("model.encoder.", "encoder.")
# Width of large-v3, the encoder that HuMo was trained with.
LARGE_WIDTH = 1280


class Whisper:
    """A loaded Whisper encoder under the host's memory management (socket WHISPERMODEL)."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, host: Host) -> None:
        with kernels_hidden("transformers"):
            from transformers import WhisperFeatureExtractor

        self.model = model
        self.managed = host.manage(model)
        self.dtype = dtype
        seconds = model.config.max_source_positions // ENCODER_FPS
        self.piece = seconds * SAMPLE_RATE
        self._mel = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.model.config.d_model

    @torch.no_grad()
    def encode(self, sound: NDArray[np.floating], fps: float = VIDEO_FPS) -> Tensor:
        """Mono sound at 16 kHz -> [video frames, 5, channels] float32 on the CPU.

        Each piece of 30 s is heard by itself. Raises ValueError if the sound is shorter than a video frame.
        """
        device = self.managed.acquire()
        starts = range(0, len(sound), self.piece)
        heard = [self._levels(sound[start : start + self.piece], device) for start in starts]
        frames = int(len(sound) * fps / SAMPLE_RATE + SLACK)
        if frames < 1:
            raise ValueError(f"The sound is shorter than a video frame ({SAMPLE_RATE / fps:.0f} samples at 16 kHz).")
        count = max(round(frames * ENCODER_FPS / fps), 1)
        levels = torch.cat(heard, dim=-1)[..., :count]
        return F.interpolate(levels, size=frames, mode="linear", align_corners=True).permute(2, 0, 1).float().cpu()

    def _levels(self, sound: NDArray[np.floating], device: torch.device) -> Tensor:
        """Of one piece, [5, channels, encoder frames]: means of each quarter of the layers, and the last."""
        mel = self._mel(np.asarray(sound, dtype=np.float32), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = mel.input_features.to(device, self.dtype)
        *layers, last = self.model(features, output_hidden_states=True).hidden_states
        means = torch.cat(layers).unflatten(0, (GROUPS, -1)).mean(dim=1)
        return torch.cat((means, last)).transpose(1, 2)


def load_whisper(path: Path, *, dtype: torch.dtype, host: Host) -> Whisper:
    """Load the encoder of a Whisper model, with or without the `model.` prefix and the decoder.

    Raises ValueError for another kind of file, or an encoder whose sizes cannot be HuMo's.
    """
    checkpoint = open_checkpoint(path)
    prefix = next((p for p in PREFIXES if f"{p}embed_positions.weight" in checkpoint.shapes), None)
    if prefix is None:
        raise ValueError(f"{path.name} is no Whisper encoder: choose whisper_large_v3_encoder_fp16.safetensors.")
    with torch.device("meta"):
        model = _build(checkpoint, prefix)
    names = {name: prefix + name for name, _ in model.named_parameters()}
    assign(model, checkpoint, names, dtype=dtype, what="Whisper encoder")
    return Whisper(model, dtype=dtype, host=host)


def _build(checkpoint: Checkpoint, prefix: str) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import WhisperConfig, WhisperModel

    shapes = {key.removeprefix(prefix): shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)}
    positions, width = shapes["embed_positions.weight"]
    layers = layer_count(shapes, "layers.")
    if layers % GROUPS or not layers or positions % ENCODER_FPS:
        raise ValueError(
            f"{checkpoint.path.name} is a Whisper encoder of {layers} layers and {positions} positions; HuMo averages "
            f"layers in {GROUPS} groups and hears whole seconds of {ENCODER_FPS}: choose that of Whisper large-v3."
        )
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=head_count(checkpoint, width, HEAD_SIZE),
        encoder_ffn_dim=shapes.get("layers.0.fc1.weight", (4 * width,))[0],
        num_mel_bins=shapes.get("conv1.weight", (width, 128))[1],
        max_source_positions=positions,
        # The decoder is built on the meta device and left there.
        decoder_layers=1,
        decoder_attention_heads=1,
    )
    return WhisperModel(config).get_encoder()
