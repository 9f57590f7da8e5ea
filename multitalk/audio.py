"""Speech for the transformer: sound -> Wav2Vec2 features at the video's frame rate -> windows of frames.

Source: MeiGen-AI/InfiniteTalk (feature interpolation, five-frame context, loudness), facebook/wav2vec2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..wanvideo.conditioning import Payload, Row, Step, Window
from ..wanvideo.guidance import NO_TEXT, at_step, per_step
from .extension import AUDIO, NEEDS, AudioWindow
from .multitalk import AUDIO_WINDOW
from .wav2vec import SAMPLE_RATE, Wav2Vec

SILENCE_SECONDS = 4
# Samples of a sound that are worked on at once: five minutes at 16 kHz, in whole steps of loudness blocks.
PIECE = 300 * SAMPLE_RATE
LOUDNESS = -23.0
MARGIN_SECONDS = 1
# ITU-R BS.1770: seconds of a block, blocks that begin in the time of one, LUFS of a mean square of 1, and the gates.
LOUDNESS_BLOCK, LOUDNESS_HOPS, LOUDNESS_OFFSET = 0.4, 4, -0.691
SILENT, RELATIVE_GATE = -70.0, -10.0
NOISE_FLOOR_DB = -45.0
TRANSIENT_CUTOFF = 3000.0
NO_AUDIO = frozenset({AUDIO})
# Names in the dict that the original pack has for speech, and those here.
IN_DICT = {
    "audio_features": "features", "audio_scale": "scale", "audio_cfg_scale": "cfg_scale", "ref_target_masks": "masks",
}  # fmt: skip
# Rounding error of times in floating point, far below one sample.
SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How sound is prepared: normalized to -23 LUFS, with a noise floor at -45 dB, low-passed at 3 kHz."""

    normalize_loudness: bool = True
    add_noise_floor: bool = False
    smooth_transients: bool = False


@dataclass(frozen=True, kw_only=True)
class MultiTalkEmbeds(Payload):
    """Encoded speech (socket MULTITALK_EMBEDS); `window` makes what the model reads.

    features: one tensor [frames, layers, channels] per speaker, all of one length. scale: strength; cfg_scale: audio
    guidance, one number or one a step. masks [P or P + 1, H, W]: where each speaker is. silence [n, layers, channels]:
    what follows the end of the sound; None mirrors it.
    """

    features: tuple[Tensor, ...]
    scale: float = 1.0
    cfg_scale: float | Sequence[float] = 1.0
    masks: Tensor | None = None
    silence: Tensor | None = None
    needs: ClassVar[str] = NEEDS
    holds_given: ClassVar[bool] = True
    part: ClassVar[type[Payload]] = AudioWindow

    @property
    def num_frames(self) -> int:
        """Frames of the sound."""
        return int(self.features[0].shape[0])

    def __getitem__(self, name: str) -> object:
        """A part under its name in the original pack's dict: nodes of other packs cut speech."""
        return getattr(self, IN_DICT[name])

    def __iter__(self) -> Iterator[str]:
        return iter(IN_DICT)

    def keys(self) -> Iterable[str]:
        """The names of all parts."""
        return IN_DICT.keys()

    def get(self, name: str, default: object = None) -> object:
        """As of a dict."""
        return self[name] if name in IN_DICT else default

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Nothing + scale * (all - no text) + cfg_scale * (no text - nothing): each term has a scale of its own.

        Without text guidance, speech is dropped under the same prompt.
        """
        audio = at_step(per_step(self.cfg_scale), step)
        if math.isclose(audio, 1.0):
            return None
        if math.isclose(scale, 1.0):
            return Row(audio), Row(1.0 - audio, NO_AUDIO)
        return Row(scale), Row(audio - scale, NO_TEXT), Row(1.0 - audio, NO_TEXT | NO_AUDIO)

    def window(self, window: Window) -> AudioWindow:
        """The speech of these frames of the whole video, each with its two neighbors on both sides.

        Frames before the start repeat the first. After the end the last one is repeated, but in a loop's later windows
        comes silence, or the sound mirrored.
        """
        half = AUDIO_WINDOW // 2
        index = torch.tensor([[f + offset for offset in range(-half, half + 1)] for f in window.sounding]).clamp(min=0)
        if window.end is None or window.pixels[0] == 0:
            index = index.clamp(max=self.num_frames - 1)
        speakers = [self._at(feature, index) for feature in self.features]
        return AudioWindow(torch.stack(speakers)[None], torch.tensor(float(self.scale)), self.masks)

    def _at(self, feature: Tensor, index: Tensor) -> Tensor:
        """Features at indices that may lie after the end. Nothing but the result is copied."""
        length = feature.shape[0]
        found = feature[index.clamp(max=length - 1)]
        after = index >= length
        if bool(after.any()):
            place = index[after] - length
            if self.silence is None:
                # The sound mirrored, over and over.
                found[after] = feature[length - 1 - place % length]
            else:
                found[after] = self.silence[place % self.silence.shape[0]].to(feature)
        return found


def prepare_sound(audio: dict[str, object], seconds: float, options: AudioOptions) -> NDArray[np.float32]:
    """AUDIO -> the first `seconds` as mono at 16 kHz, prepared as the options say.

    Not brought to unit variance: the encoder's first group norm takes the volume out, up to its epsilon. An hour has
    230 MB, and is the only thing here as long as the sound: all is done piece by piece, in float64. Raises ValueError
    if the audio is empty.
    """
    waveform, rate = audio["waveform"][0], int(audio["sample_rate"])
    # The margin is more than the resampling filter looks ahead.
    waveform = waveform[..., : math.ceil((seconds + MARGIN_SECONDS) * rate)]
    if not waveform.shape[-1]:
        raise ValueError("The audio has no samples: choose a file that has sound, or trim less of it.")
    # Rounded up: with one sample less, the last frame of the time asked for would be lost.
    sound = _mono(waveform, rate)[: math.ceil(seconds * SAMPLE_RATE - SLACK)]
    if options.normalize_loudness:
        sound *= loudness_gain(sound)
    if options.add_noise_floor:
        noise = np.random.default_rng(0)
        _change(sound, lambda part: part + noise.standard_normal(len(part)) * 10 ** (NOISE_FLOOR_DB / 20))
    if options.smooth_transients:
        _low_pass(sound)
    return sound


def _mono(waveform: Tensor, rate: int) -> NDArray[np.float32]:
    """The mean of the channels at 16 kHz."""
    count = waveform.shape[-1]
    resampler = None
    if rate != SAMPLE_RATE:
        import soxr

        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float64")
    sound, filled = np.empty(math.ceil(count * SAMPLE_RATE / rate) + 1, dtype=np.float32), 0
    for start in range(0, count, PIECE):
        part = np.asarray(waveform[..., start : start + PIECE].float().cpu()).mean(axis=0, dtype=np.float64)
        if resampler is not None:
            part = resampler.resample_chunk(part, last=start + PIECE >= count)[: len(sound) - filled]
        sound[filled : filled + len(part)] = part
        filled += len(part)
    return sound[:filled]


def _change(sound: NDArray[np.float32], change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
    """Change a sound in its place, by pieces in their order."""
    for start in range(0, len(sound), PIECE):
        sound[start : start + PIECE] = change(sound[start : start + PIECE].astype(np.float64))


def frame_count(samples: int, fps: float) -> int:
    """Whole video frames that so many samples at 16 kHz last."""
    return int(samples * fps / SAMPLE_RATE + SLACK)


def normalize_loudness(sound: NDArray[np.floating]) -> NDArray[np.floating]:
    """A copy at -23 LUFS."""
    return sound * loudness_gain(sound)


def loudness_gain(sound: NDArray[np.floating]) -> float:
    """What brings it to -23 LUFS (ITU-R BS.1770); 1 for silence, and for sound shorter than a measuring block."""
    if len(sound) < LOUDNESS_BLOCK * SAMPLE_RATE:
        return 1.0
    measured = loudness(sound)
    return 10 ** ((LOUDNESS - measured) / 20) if math.isfinite(measured) else 1.0


def loudness(sound: NDArray[np.floating]) -> float:
    """Integrated loudness in LUFS. pyloudnorm measures it, which takes several copies; long sound goes by pieces."""
    import pyloudnorm

    if len(sound) <= PIECE:
        return pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(sound.astype(np.float64))
    hop = round(LOUDNESS_BLOCK * SAMPLE_RATE / LOUDNESS_HOPS)
    shelf = pyloudnorm.IIRfilter(4.0, 0.5**0.5, 1500.0, SAMPLE_RATE, "high_shelf")
    weighted = [_filtering(f.b, f.a) for f in (shelf, pyloudnorm.IIRfilter(0.0, 0.5, 38.0, SAMPLE_RATE, "high_pass"))]
    squares = []
    for start in range(0, len(sound), PIECE):
        part = sound[start : start + PIECE].astype(np.float64)
        for weigh in weighted:
            part = weigh(part)
        squares.append(np.square(part[: len(part) // hop * hop]).reshape(-1, hop).mean(axis=1))
    hops = np.concatenate(squares)
    power = np.convolve(hops, np.full(LOUDNESS_HOPS, 1 / LOUDNESS_HOPS), mode="valid")
    # Two gates: what is silent does not count, then what is 10 LU below the mean of the rest.
    audible = power[power >= _power(SILENT)]
    if not len(audible):
        return -math.inf
    heard = audible[audible > audible.mean() * 10 ** (RELATIVE_GATE / 10)]
    return LOUDNESS_OFFSET + 10 * math.log10(heard.mean())


def _power(level: float) -> float:
    return 10 ** ((level - LOUDNESS_OFFSET) / 10)


def _filtering(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A filter that goes on from one piece of a sound to the next."""
    from scipy.signal import lfilter

    state = np.zeros(max(len(numerator), len(denominator)) - 1)

    def filtered(part: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal state
        part, state = lfilter(numerator, denominator, part, zi=state)
        return part

    return filtered


def _low_pass(sound: NDArray[np.float32]) -> None:
    from scipy.signal import butter

    _change(sound, _filtering(*butter(3, TRANSIENT_CUTOFF / (SAMPLE_RATE / 2))))


def encode_speech(
    wav2vec: Wav2Vec, sounds: Sequence[NDArray[np.float32]], *, fps: float, sequential: bool, longest: int
) -> MultiTalkEmbeds:
    """Features of every speaker, and silence for what follows them. As `encode_each`."""
    features = encode_each(wav2vec.encode, sounds, fps=fps, sequential=sequential, longest=longest)
    return MultiTalkEmbeds(features=features, silence=encode_silence(wav2vec, fps=fps))


def encode_each(
    encode: Callable[[NDArray[np.float32], int], Tensor],
    sounds: Sequence[NDArray[np.float32]],
    *,
    fps: float,
    sequential: bool,
    longest: int,
) -> tuple[Tensor, ...]:
    """Features [frames, layers, channels] of every speaker, of one length.

    encode: a sound and its number of frames -> its features. sequential: speakers talk one after the other, else at
    once. longest: frames after which all is cut. Raises ValueError if a sound is shorter than a frame.
    """
    features = []
    for sound in sounds:
        frames = frame_count(len(sound), fps)
        if frames < 1:
            raise ValueError(f"The audio is shorter than one video frame at {fps} fps: choose a longer one.")
        features.append(encode(sound, frames))
    lengths = [len(feature) for feature in features]
    total = min(sum(lengths) if sequential else max(lengths), longest)
    starts = [sum(lengths[:i]) if sequential else 0 for i in range(len(lengths))]
    return tuple(_placed(f, start, total) for f, start in zip(features, starts, strict=True))


def _placed(feature: Tensor, start: int, total: int) -> Tensor:
    if not start and len(feature) == total:
        # With the published encoder, an hour has 3.3 GB.
        return feature
    # Others are mute in zeros, as the model saw it in training; silence is for what follows the end.
    whole = feature.new_zeros(total, *feature.shape[1:])
    inside = feature[: max(total - start, 0)]
    whole[start : start + len(inside)] = inside
    return whole


def encode_silence(wav2vec: Wav2Vec, *, fps: float) -> Tensor:
    """Features [frames, layers, channels] of a few seconds of digital silence, to be repeated as needed."""
    samples = SILENCE_SECONDS * SAMPLE_RATE
    return wav2vec.encode(np.zeros(samples), frame_count(samples, fps))


def silent_speech(silence: Tensor, frames: int) -> MultiTalkEmbeds:
    """Speech of `frames` frames that is all silence."""
    repeats = math.ceil(frames / len(silence))
    return MultiTalkEmbeds(features=(silence.repeat(repeats, 1, 1)[:frames],), silence=silence)


def whole_frames(sound: NDArray[np.float32], fps: float) -> NDArray[np.float32]:
    """Without the part of a frame at the end, which would put a sound after it behind its picture."""
    # Rounded up: with a sample less, the last frame would not be whole.
    return sound[: math.ceil(frame_count(len(sound), fps) * SAMPLE_RATE / fps - SLACK)]


def mix(sounds: Sequence[NDArray[np.float32]], *, sequential: bool, seconds: float) -> dict[str, object]:
    """The speakers as one AUDIO of at most so many seconds, one after the other or over each other."""
    if sequential:
        joined = np.concatenate(sounds)[: round(seconds * SAMPLE_RATE)]
    elif len(sounds) == 1:
        (joined,) = sounds
    else:
        joined = np.zeros(max(len(sound) for sound in sounds), dtype=np.float32)
        for sound in sounds:
            joined[: len(sound)] += sound
    return {"waveform": torch.from_numpy(joined).float()[None, None], "sample_rate": SAMPLE_RATE}
