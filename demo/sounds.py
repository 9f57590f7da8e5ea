"""Speech as numbers: reading and writing sound, its loudness by video frame, and the mouth that goes with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..multitalk.audio import SAMPLE_RATE, normalize_loudness

Sound = NDArray[np.floating]

FPS = 25
FRAME = SAMPLE_RATE // FPS
WINDOW_FRAMES = 2
SHUT_LEVEL, WIDE_LEVEL = 0.01, 0.15
OPUS_BITS = 24000
OPUS_FRAME = 960
OPUS_RATE = 48000


def read_sound(path: Path) -> NDArray[np.float32]:
    """The first sound track of a file, mono at 16 kHz, in -1..1."""
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(str(path)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames]).astype(np.float32)


def write_opus(path: Path, sound: Sound) -> None:
    """Write mono sound at 16 kHz as Opus."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=OPUS_RATE, layout="mono")
        stream.bit_rate = OPUS_BITS
        frame = av.AudioFrame.from_ndarray(np.float32(sound)[None], format="flt", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        resampler = av.AudioResampler(format="flt", layout="mono", rate=OPUS_RATE, frame_size=OPUS_FRAME)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def envelope(sound: Sound, frames: int) -> NDArray[np.float64]:
    """Root mean square of 16 kHz sound around every video frame: [frames], Hann windows of two frames.

    The sound is brought to -23 LUFS first, as the audio node does. Frame i stands for the time i / 25 s.
    """
    level = normalize_loudness(np.asarray(sound, dtype=np.float64))
    half = WINDOW_FRAMES * FRAME // 2
    weights = np.hanning(2 * half + 1)
    power = np.convolve(np.pad(level**2, half), weights / weights.sum(), mode="valid")
    index = np.minimum(np.arange(frames) * FRAME, len(power) - 1)
    return np.sqrt(np.maximum(power[index], 0))


def opening(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a mouth is open at these levels: 0 shut, 1 wide."""
    return np.clip((levels - SHUT_LEVEL) / (WIDE_LEVEL - SHUT_LEVEL), 0, 1)
