"""Training speech: takes of synthetic voices under many conditions, and the mouths that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...multitalk.audio import SAMPLE_RATE, Wav2Vec, normalize_loudness
from ..sounds import FRAME, Sound, envelope, opening, read_sound

TAKE_SECONDS = (5.0, 14.0)
LEAD_SECONDS = 1.0
NOISE_DB = (-70.0, -32.0)
SILENT_SHARE, NOISE_SHARE, DULL_SHARE, CUT_SHARE = 0.04, 0.04, 0.3, 0.15
DULL_CUTOFF = (1500.0, 7000.0)


@dataclass(frozen=True)
class Take:
    """A sound as the audio node prepares it, and how far the mouth is open at every frame, [frames]."""

    sound: Sound
    mouth: NDArray[np.float64]


def read_recordings(folder: Path) -> list[NDArray[np.float32]]:
    """All Opus files of a folder."""
    return [read_sound(path) for path in sorted(folder.glob("*.opus"))]


def make_takes(recordings: Sequence[NDArray[np.float32]], count: int, seed: int) -> list[Take]:
    """Random stretches of the recordings, some behind noise or a dull line, some mute or noise alone."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda n: _take(recordings, np.random.default_rng((seed, n))), range(count)))


def _take(recordings: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Take:
    length = int(rng.uniform(*TAKE_SECONDS) * SAMPLE_RATE) // FRAME * FRAME
    kind = rng.random()
    if kind < SILENT_SHARE:
        return Take(np.zeros(length), np.zeros(length // FRAME))
    noise = _noise(length, rng)
    if kind < SILENT_SHARE + NOISE_SHARE:
        return Take(normalize_loudness(noise), np.zeros(length // FRAME))
    source = recordings[rng.integers(len(recordings))]
    start = rng.integers(max(len(source) - length, 1))
    spoken = np.zeros(length)
    lead = int(rng.uniform(0, LEAD_SECONDS) * SAMPLE_RATE)
    part = source[start : start + length - lead]
    spoken[lead : lead + len(part)] = normalize_loudness(part.astype(np.float64))
    if rng.random() < CUT_SHARE:
        # A long pause: the rest is silence.
        spoken[int(length * rng.uniform(0.3, 0.8)) :] = 0
    mouth = opening(envelope(spoken, length // FRAME))
    if rng.random() < DULL_SHARE:
        spoken = _dull(spoken, rng)
    heard = spoken + noise * 10 ** (rng.uniform(*NOISE_DB) / 20) * (rng.random() < 0.6)
    return Take(normalize_loudness(heard), mouth)


def _noise(length: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise of a random colour and unit power."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.arange(len(spectrum)), 1.0)
    noise = np.fft.irfft(spectrum * frequency ** rng.uniform(-0.8, 0.1), length)
    return noise / noise.std()


def _dull(sound: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    from scipy.signal import butter, sosfilt

    return sosfilt(butter(2, rng.uniform(*DULL_CUTOFF) / (SAMPLE_RATE / 2), output="sos"), sound)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Takes in a row on the device: features [frames, layers, channels], mouth [frames], first, length [takes]."""

    features: Tensor
    mouth: Tensor
    first: Tensor
    length: Tensor

    @classmethod
    def encode(cls, wav2vec: Wav2Vec, takes: Sequence[Take], device: torch.device) -> Bank:
        """Encode every take as a whole, as the audio node does."""
        lengths = torch.tensor([len(take.mouth) for take in takes])
        return cls(
            features=torch.cat([wav2vec.encode(take.sound, len(take.mouth)) for take in takes]).to(device),
            mouth=torch.from_numpy(np.concatenate([take.mouth for take in takes])).float().to(device),
            first=(lengths.cumsum(0) - lengths).to(device),
            length=lengths.to(device),
        )

    def frames(self, take: Tensor, start: Tensor, offsets: Tensor) -> Tensor:
        """Rows of the bank for frames start + offsets of the takes, clamped to them: [..., *offsets.shape]."""
        shape = (..., *(None,) * offsets.dim())
        inside = (start[shape] + offsets).clamp(min=0).minimum(self.length[take][shape] - 1)
        return self.first[take][shape] + inside
