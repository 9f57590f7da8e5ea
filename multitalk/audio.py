"""Speech for the transformer: sound -> Wav2Vec2 features at the video's frame rate -> windows of frames.

Source: MeiGen-AI/InfiniteTalk (feature interpolation, five-frame context, loudness), facebook/wav2vec2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..wanvideo.assign import assign, head_count, layer_count
from ..wanvideo.checkpoint import Checkpoint, open_checkpoint
from .extension import AudioWindow
from .multitalk import AUDIO_WINDOW

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

SAMPLE_RATE = 16000
SILENCE_SECONDS = 4
LOUDNESS = -23.0
LOUDNESS_BLOCK = 0.4
NOISE_FLOOR_DB = -45.0
TRANSIENT_CUTOFF = 3000.0
HEAD_SIZE = 64
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
RECEPTIVE_FIELD = 400
PREFIX = "wav2vec2."
# Rounding error of times in floating point, far below one sample.
SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How sound is prepared: normalised to -23 LUFS, with a noise floor at -45 dB, low-passed at 3 kHz."""

    normalize_loudness: bool = True
    add_noise_floor: bool = False
    smooth_transients: bool = False


@dataclass(frozen=True, kw_only=True)
class MultiTalkEmbeds:
    """Encoded speech (socket MULTITALK_EMBEDS).

    features: one tensor [frames, layers, channels] per speaker, all of one length. scale: strength; cfg_scale: audio
    guidance, one number or one a step. masks [P or P + 1, H, W]: where each speaker is. silence [n, layers, channels]:
    what follows the end of the sound; None mirrors it.
    """

    features: tuple[Tensor, ...]
    scale: float = 1.0
    cfg_scale: float | Sequence[float] = 1.0
    masks: Tensor | None = None
    silence: Tensor | None = None

    @property
    def num_frames(self) -> int:
        """Frames of the sound."""
        return int(self.features[0].shape[0])

    def window(self, frames: range) -> AudioWindow:
        """The speech of these frames of the whole video, each with its two neighbours on both sides.

        Frames before the start repeat the first; after the end comes silence, or the sound mirrored.
        """
        half = AUDIO_WINDOW // 2
        last = max(frames) + half
        index = torch.tensor([[f + offset for offset in range(-half, half + 1)] for f in frames]).clamp(min=0)
        speakers = [self._extended(feature, last + 1)[index] for feature in self.features]
        return AudioWindow(torch.stack(speakers)[None], torch.tensor(float(self.scale)), self.masks)

    def _extended(self, feature: Tensor, length: int) -> Tensor:
        missing = length - feature.shape[0]
        if missing <= 0:
            return feature
        tail = feature.flip(0) if self.silence is None else self.silence.to(feature)
        repeats = math.ceil(missing / tail.shape[0])
        return torch.cat((feature, tail.repeat(repeats, 1, 1)[:missing]))


class Wav2Vec:
    """A loaded Wav2Vec2 encoder under the host's memory management."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)
        self.dtype = dtype

    @torch.no_grad()
    def encode(self, sound: NDArray[np.floating], frames: int) -> Tensor:
        """Mono sound at 16 kHz -> features of every layer at `frames` video frames: [frames, layers, channels] float32.

        The convolutional features are interpolated to the video rate before the transformer layers see them.
        """
        device = self.managed.acquire()
        samples = torch.from_numpy(np.ascontiguousarray(sound)).float()
        if samples.shape[0] < RECEPTIVE_FIELD:
            samples = nn.functional.pad(samples, (0, RECEPTIVE_FIELD - samples.shape[0]))
        outputs: list[Tensor] = []
        hooks = [layer.register_forward_hook(_keep(outputs)) for layer in self.model.encoder.layers]
        try:
            features = self.model.feature_extractor(samples[None].to(device, self.dtype))
            features = nn.functional.interpolate(features.float(), size=frames, mode="linear", align_corners=True)
            hidden, _ = self.model.feature_projection(features.transpose(1, 2).contiguous().to(self.dtype))
            self.model.encoder(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([output[0] for output in outputs], dim=1).float().cpu()


def _keep(outputs: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    return hook


def load_wav2vec(path: Path, *, dtype: torch.dtype, host: Host) -> Wav2Vec:
    """Load a Wav2Vec2 encoder (base layout, any width), with or without the `wav2vec2.` prefix.

    Raises ValueError for another kind of file.
    """
    checkpoint = open_checkpoint(path)
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
    return Wav2Vec(model, dtype=dtype, host=host)


def _stored_name(name: str, checkpoint: Checkpoint, prefix: str) -> str:
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, published in old.items():
        if name.endswith(new) and prefix + name not in checkpoint.shapes:
            return name.replace(new, published)
    return name


def _build(checkpoint: Checkpoint, prefix: str) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    shapes = {k.removeprefix(prefix): v for k, v in checkpoint.shapes.items() if k.startswith(prefix)}
    if "feature_extractor.conv_layers.1.layer_norm.weight" in shapes:
        raise ValueError(f"{checkpoint.path.name} is a large Wav2Vec2; the audio layers need a base model.")
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
        feat_extract_norm="group",
        do_stable_layer_norm=False,
    )
    return Wav2Vec2Model(config)


def prepare_sound(audio: dict[str, object], seconds: float, options: AudioOptions) -> NDArray[np.float64]:
    """AUDIO -> the first `seconds` as mono at 16 kHz, prepared as the options say.

    Not brought to unit variance: the encoder's first group norm takes the volume out, up to its epsilon.
    Raises ValueError if the audio is empty.
    """
    waveform, rate = audio["waveform"], int(audio["sample_rate"])
    sound = np.asarray(waveform.float().cpu())[0].mean(axis=0, dtype=np.float64)
    if sound.size == 0:
        raise ValueError("The audio has no samples: choose a file that has sound, or trim less of it.")
    if rate != SAMPLE_RATE:
        import soxr

        sound = soxr.resample(sound, rate, SAMPLE_RATE)
    # Rounded up: with one sample less, the last frame of the time asked for would be lost.
    sound = sound[: math.ceil(seconds * SAMPLE_RATE - SLACK)]
    if options.normalize_loudness:
        sound = normalise_loudness(sound)
    if options.add_noise_floor:
        sound = sound + np.random.default_rng(0).standard_normal(len(sound)) * 10 ** (NOISE_FLOOR_DB / 20)
    if options.smooth_transients:
        sound = _low_pass(sound)
    return sound


def frame_count(samples: int, fps: float) -> int:
    """Whole video frames that so many samples at 16 kHz last."""
    return int(samples * fps / SAMPLE_RATE + SLACK)


def normalise_loudness(sound: NDArray[np.float64]) -> NDArray[np.float64]:
    """At -23 LUFS (ITU-R BS.1770). Silence, and sound shorter than a measuring block, stay as they are."""
    if len(sound) < LOUDNESS_BLOCK * SAMPLE_RATE:
        return sound
    import pyloudnorm

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(sound)
    if not math.isfinite(loudness):
        return sound
    return sound * 10 ** ((LOUDNESS - loudness) / 20)


def _low_pass(sound: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.signal import butter, lfilter

    numerator, denominator = butter(3, TRANSIENT_CUTOFF / (SAMPLE_RATE / 2))
    return lfilter(numerator, denominator, sound)


def encode_speech(
    wav2vec: Wav2Vec, sounds: Sequence[NDArray[np.float64]], *, fps: float, sequential: bool
) -> MultiTalkEmbeds:
    """Features of every speaker, padded with silence to one length.

    sequential: speakers talk one after the other, else at once. Raises ValueError if a sound is shorter than a frame.
    """
    features = []
    for sound in sounds:
        frames = frame_count(len(sound), fps)
        if frames < 1:
            raise ValueError(f"The audio is shorter than one video frame at {fps} fps: choose a longer one.")
        features.append(wav2vec.encode(sound, frames))
    silence = encode_silence(wav2vec, fps=fps)
    embeds = MultiTalkEmbeds(features=tuple(features), silence=silence)
    lengths = [len(feature) for feature in features]
    total = sum(lengths) if sequential else max(lengths)
    starts = [sum(lengths[:i]) if sequential else 0 for i in range(len(lengths))]
    placed = [_placed(f, start, total) for f, start in zip(features, starts, strict=True)]
    return replace(embeds, features=tuple(placed))


def _placed(feature: Tensor, start: int, total: int) -> Tensor:
    # Others are mute in zeros, as the model saw it in training; silence is for what follows the end.
    whole = feature.new_zeros(total, *feature.shape[1:])
    whole[start : start + len(feature)] = feature
    return whole


def encode_silence(wav2vec: Wav2Vec, *, fps: float) -> Tensor:
    """Features [frames, layers, channels] of a few seconds of digital silence, to be repeated as needed."""
    samples = SILENCE_SECONDS * SAMPLE_RATE
    return wav2vec.encode(np.zeros(samples), frame_count(samples, fps))


def silent_speech(silence: Tensor, frames: int) -> MultiTalkEmbeds:
    """Speech of `frames` frames that is all silence."""
    repeats = math.ceil(frames / len(silence))
    return MultiTalkEmbeds(features=(silence.repeat(repeats, 1, 1)[:frames],), silence=silence)


def mix(sounds: Sequence[NDArray[np.float64]], *, sequential: bool) -> dict[str, object]:
    """The speakers as one AUDIO, one after the other or over each other."""
    if sequential:
        joined = np.concatenate(sounds)
    else:
        joined = np.zeros(max(len(sound) for sound in sounds))
        for sound in sounds:
            joined[: len(sound)] += sound
    return {"waveform": torch.from_numpy(joined).float()[None, None], "sample_rate": SAMPLE_RATE}
