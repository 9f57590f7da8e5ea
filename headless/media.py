"""Sound and video files, read through PyAV: what is damaged costs its own length, and sizes are known before decoding.

Only the containers of FORMATS are opened, by the file protocol: playlists and scripts, which make FFmpeg open other
files or addresses, are none of them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .video_file import Encoding, write_video

__all__ = ["Audio", "Encoding", "MediaError", "VideoInfo", "probe", "read_audio", "read_frames", "write_video"]

log = logging.getLogger("wanvideo")

Audio = dict[str, object]

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,apng,ogg,wav,w64,flac,mp3,aac,aiff,au,"
    "caf,amr,ac3,eac3,dts,ape,wv,tta,m4v,h264,hevc,av1,obu,ivf,mxf,nut,dv,yuv4mpegpipe"
)
OPENING = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
# Formats without time stamps: FFmpeg counts frames, so a damaged stretch of any length counts as one of them.
COUNTED = ("mp3", "aac", "ac3", "eac3", "dts")
# Twelve hours of stereo at 48 kHz; files of a kilobyte may claim more than any disk holds.
MOST_SAMPLES = 12 * 3600 * 48000 * 2
IN_MEMORY = 64 * 2**20
LARGEST_FRAME = 2**26
# A gap is filled from this length on where nothing was damaged, and never beyond the other.
LEAST_GAP, LONGEST_GAP = 0.1, 600.0
ATTEMPTS = 8
BT601 = 5


class MediaError(ValueError):
    """A file that cannot be read as what it should be."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds."""

    fps: float
    frames: int
    width: int
    height: int
    duration: float


@dataclass
class Damage:
    """What of a stream could not be decoded. pending: since the last good frame."""

    packets: int = 0
    filled: float = 0.0
    pending: bool = False

    def note(self) -> None:
        """One more packet is lost."""
        self.packets += 1
        self.pending = True

    def report(self, path: Path, what: str) -> None:
        """One line for the whole file."""
        if self.packets or self.filled:
            log.warning(
                "%s is damaged: %d parts of its %s cannot be decoded, %.2f s are filled by time stamp.",
                path.name, self.packets, what, self.filled,
            )  # fmt: skip


@contextmanager
def _container(path: Path, what: str) -> Iterator[av.container.InputContainer]:
    """The open file; whatever FFmpeg and PyAV raise on the way comes as one sentence."""
    try:
        with av.open(str(path), options=OPENING, metadata_errors="replace") as container:
            yield container
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError(f"{path.name} needs more memory than there is; use a shorter or smaller one.") from error
    except Exception as error:
        # Damaged headers reach PyAV's own code, which raises any type.
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path.name} is no {what} that can be read ({reason}); choose another.") from error


def _stream(container: av.container.InputContainer, path: Path, kind: str) -> av.stream.Stream:
    # The cover of a sound file is no video.
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        missing = {"audio": "has no sound; choose a file that has.", "video": "has no picture; choose a video."}[kind]
        raise MediaError(f"{path.name} {missing}")
    if streams[0].codec_context is None:
        raise MediaError(f"{path.name} is in a format that FFmpeg has no decoder for; convert it to another.")
    return streams[0]


def probe(path: Path, kind: str) -> None:
    """Raise MediaError unless the file opens and has a stream of this kind ("audio" or "video"); decodes nothing."""
    with _container(path, "sound file" if kind == "audio" else "video") as container:
        stream = _stream(container, path, kind)
        if kind == "video":
            _check_size(path, stream.width, stream.height)


def _frames(
    container: av.container.InputContainer, stream: av.stream.Stream, damage: Damage
) -> Iterator[tuple[av.Packet, av.AudioFrame | av.VideoFrame]]:
    """Decoded frames, each with the packet that completed it. Packets that cannot be decoded are noted and passed."""
    failures = 0
    while failures < ATTEMPTS:
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.EOFError:
                    return
                except av.FFmpegError:
                    damage.note()
                    continue
                failures = 0
                for frame in frames:
                    yield packet, frame
            return
        except av.FFmpegError:
            # The file itself could not be read on; the next packet may be whole again.
            damage.note()
            failures += 1


def read_audio(path: Path, *, start: float = 0.0, seconds: float = 0.0) -> Audio:
    """Sound of a file as AUDIO: waveform [1, channels, samples] float32 in -1..1, and its sample rate.

    start: where to begin, in seconds; seconds: how much, 0 for all. No samples are left of a sound that is over before.
    Damaged parts are silence of their length, with a warning. A long sound is mapped from a temporary file.

    Raises MediaError (a ValueError) if the file cannot be read, has no sound, holds NaN, or is longer than 12 hours.
    """
    damage, store = Damage(), _Store()
    with _container(path, "sound file") as container:
        stream = _stream(container, path, "audio")
        rate = stream.rate
        if not rate:
            raise MediaError(f"{path.name} does not say its sample rate; convert it to another format.")
        first, last = round(start * rate), round((start + seconds) * rate) if seconds else None
        at = 0
        for part in _Sound(container, stream, damage).parts():
            if not np.isfinite(part).all():
                raise MediaError(f"{path.name} holds NaN or infinity at {at / rate:.2f} s; export the sound again.")
            store.add(part[:, max(first - at, 0) : None if last is None else max(last - at, 0)], path)
            at += part.shape[1]
            if last is not None and at >= last:
                break
        if not at:
            raise MediaError(f"{path.name} holds no sound samples; choose another file.")
        damage.report(path, "sound")
        return {"waveform": store.waveform(), "sample_rate": int(rate)}


class _Store:
    """Samples in the order in which they come; on disk from IN_MEMORY bytes on, so that hours of sound fit."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._file: object | None = None
        self._channels = 1
        self._count = 0

    def add(self, part: np.ndarray, path: Path) -> None:
        """Take samples [channels, n]."""
        self._channels = part.shape[0]
        self._count += part.shape[1]
        if self._count * self._channels > MOST_SAMPLES:
            hours = MOST_SAMPLES / 2 / 48000 / 3600
            raise MediaError(f"{path.name} is longer than {hours:.0f} hours of stereo; cut it into parts.")
        self._parts.append(part)
        if self._file is not None or self._count * self._channels * 4 > IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            # It lives as long as the sound that is mapped from it.
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            for part in self._parts:
                self._file.write(np.ascontiguousarray(part.T).data)
        except OSError as error:
            raise MediaError(
                f"A long sound is kept in {tempfile.gettempdir()} while it is used, where there is no room for it "
                f"({error.strerror}); free some, or set TMPDIR to another folder."
            ) from error
        self._parts.clear()

    def waveform(self) -> Tensor:
        """[1, channels, samples]."""
        if self._file is None:
            return torch.from_numpy(np.concatenate(self._parts, axis=1))[None]
        self._file.flush()
        # Copy on write: whoever changes the sound changes its own pages.
        mapped = np.memmap(self._file, dtype=np.float32, mode="c", shape=(self._count, self._channels))
        return torch.from_numpy(mapped).t()[None]


class _Sound:
    """The samples of a stream at the places that their time stamps say."""

    def __init__(self, container: av.container.InputContainer, stream: av.AudioStream, damage: Damage) -> None:
        self._container, self._stream, self._damage = container, stream, damage
        self._counted = container.format.name in COUNTED
        self._resampler: av.AudioResampler | None = None
        self._key: tuple[object, ...] = ()
        self._layout: str | None = None
        self._at = 0
        self._bytes = self._good = self._end = 0

    def parts(self) -> Iterator[np.ndarray]:
        """Samples [channels, n] float32, silence in gaps included."""
        for packet, frame in _frames(self._container, self._stream, self._damage):
            samples = self._floats(frame)
            gap = self._gap(packet, frame)
            self._damage.pending = False
            self._damage.filled += gap / self._stream.rate
            while gap > 0:
                silence = np.zeros((samples.shape[0], min(gap, self._stream.rate)), dtype=np.float32)
                self._at += silence.shape[1]
                gap -= silence.shape[1]
                yield silence
            self._at += samples.shape[1]
            yield samples

    def _floats(self, frame: av.AudioFrame) -> np.ndarray:
        key = (frame.format.name, frame.layout.name, frame.sample_rate)
        if key != self._key:
            self._layout = self._layout or frame.layout.name
            self._resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=self._stream.rate)
            self._key = key
        return np.concatenate([part.to_ndarray() for part in self._resampler.resample(frame)], axis=1)

    def _gap(self, packet: av.Packet, frame: av.AudioFrame) -> int:
        """Samples that are missing before this frame."""
        gap = self._lost_bytes(packet, frame) if self._counted else self._late(frame)
        least = 1 if self._damage.pending else LEAST_GAP * self._stream.rate
        return gap if least <= gap <= LONGEST_GAP * self._stream.rate else 0

    def _late(self, frame: av.AudioFrame) -> int:
        if frame.pts is None or self._stream.start_time is None:
            return 0
        seconds = float((frame.pts - self._stream.start_time) * self._stream.time_base)
        return round(seconds * self._stream.rate) - self._at

    def _lost_bytes(self, packet: av.Packet, frame: av.AudioFrame) -> int:
        """By the bytes between this packet and the last good one, in whole frames of their mean size."""
        if packet.pos is None or not packet.size:
            return 0
        missing, self._end = packet.pos - self._end if self._end else 0, packet.pos + packet.size
        mean = self._bytes / self._good if self._good else packet.size
        self._bytes, self._good = self._bytes + packet.size, self._good + 1
        return round(missing / mean) * frame.samples


def read_frames(path: Path) -> tuple[VideoInfo, Iterator[np.ndarray]]:
    """A video's data, its sides as stored, and its frames as shown, [height, width, 3] uint8, one by one.

    In place of damaged frames the one before them is shown, so that the sound stays beside its picture. Raises
    MediaError (a ValueError) if the file is no video, or has frames of more than 67 million pixels.
    """
    with _container(path, "video") as container:
        stream = _stream(container, path, "video")
        _check_size(path, stream.width, stream.height)
        fps = float(stream.average_rate or stream.base_rate or 1)
        duration = float(container.duration or 0) / av.time_base
        frames = stream.frames or round(duration * fps)
        info = VideoInfo(fps=fps, frames=frames, width=stream.width, height=stream.height, duration=duration)
    return info, _shown(path, fps)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > LARGEST_FRAME:
        raise MediaError(f"{path.name} has frames of {width}x{height}, more than can be taken; scale it down.")


def _shown(path: Path, fps: float) -> Iterator[np.ndarray]:
    damage, count, size = Damage(), 0, None
    last = None
    with _container(path, "video") as container:
        stream = _stream(container, path, "video")
        stream.codec_context.options = {"max_pixels": str(LARGEST_FRAME)}
        for _, frame in _frames(container, stream, damage):
            _check_size(path, frame.width, frame.height)
            size = size or (frame.width, frame.height)
            # RGB has no matrix, but PyAV 14 reads the frame's only if it is told one that differs.
            colors = {"src_colorspace": frame.colorspace, "dst_colorspace": BT601}
            rgb = frame.reformat(*size, format="rgb24", **colors)
            # Phones film lying down and note how to turn the picture.
            image = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90 % 4))
            missing = _missing(frame, stream, fps, count) if damage.pending else 0
            damage.pending, damage.filled = False, damage.filled + missing / fps
            count += missing + 1
            for _ in range(missing):
                yield image if last is None else last
            last = image
            yield image
        damage.report(path, "picture")
        if last is None and damage.packets:
            raise MediaError(f"{path.name} has no frame that can be decoded; choose another video.")


def _missing(frame: av.VideoFrame, stream: av.VideoStream, fps: float, count: int) -> int:
    """Frames that should lie before this one, by its time stamp."""
    if frame.pts is None:
        return 0
    missing = round(float((frame.pts - (stream.start_time or 0)) * stream.time_base) * fps) - count
    return missing if 0 < missing <= LONGEST_GAP * fps else 0

