"""Sound and video files through PyAV."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

Audio = dict[str, object]

AAC_RATE = 48000
# FFmpeg's numbers (ITU-T H.273) of BT.709 primaries, transfer and matrix, of limited range, and of the BT.601 matrix.
BT709, LIMITED_RANGE = 1, 1
BT601 = 5


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds."""

    fps: float
    frames: int
    width: int
    height: int
    duration: float


def read_audio(path: Path, *, start: float = 0.0, seconds: float = 0.0) -> Audio:
    """Sound of a file as AUDIO: waveform [1, channels, samples] float32 in -1..1, and its sample rate.

    start: where to begin, in seconds; seconds: how much, 0 for all. No samples are left of a sound that is over before.

    Raises ValueError if the file cannot be read or has no sound.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"{path.name} has no sound; choose a file that has.")
            stream = container.streams.audio[0]
            rate = stream.rate
            span = slice(round(start * rate), round((start + seconds) * rate) if seconds else None)
            parts = list(_samples(container, stream, span))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} is no sound file that can be read ({error}); choose another.") from error
    if not parts:
        raise ValueError(f"{path.name} holds no sound samples; choose another file.")
    return {"waveform": torch.from_numpy(np.concatenate(parts, axis=1))[None], "sample_rate": int(rate)}


def _samples(container: av.container.InputContainer, stream: av.AudioStream, span: slice) -> Iterator[np.ndarray]:
    """What lies in the span of samples, [channels, n] each; decoding ends where the span does."""
    resampler = av.AudioResampler(format="fltp", rate=stream.rate)
    at = 0
    for frame in container.decode(stream):
        for part in resampler.resample(frame):
            samples = part.to_ndarray()
            first, last = span.start - at, None if span.stop is None else max(span.stop - at, 0)
            at += samples.shape[1]
            yield samples[:, max(first, 0) : last]
        if span.stop is not None and at >= span.stop:
            return


def read_frames(path: Path) -> tuple[VideoInfo, Iterator[np.ndarray]]:
    """A video's data, its sides as stored, and its frames as shown, [height, width, 3] uint8, one by one.

    Raises ValueError if the file is no video.
    """
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} is no video that can be read ({error}); choose another.") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path.name} has no picture; choose a video.")
    stream = container.streams.video[0]
    fps = float(stream.average_rate or stream.base_rate or 1)
    duration = float(container.duration or 0) / av.time_base
    frames = stream.frames or round(duration * fps)
    info = VideoInfo(fps=fps, frames=frames, width=stream.width, height=stream.height, duration=duration)

    def decoded() -> Iterator[np.ndarray]:
        with container:
            for frame in container.decode(stream):
                # RGB has no matrix, but PyAV 14 reads the frame's only if it is told one that differs.
                rgb = frame.reformat(format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=BT601)
                # Phones film lying down and note how to turn the picture.
                yield np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90 % 4))

    return info, decoded()


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a video is written: frames a second, quality (CRF, lower is better), pixel format, text fields."""

    fps: float
    crf: int = 19
    pixel_format: str = "yuv420p"
    metadata: Mapping[str, str] | None = None


def write_video(path: Path, images: Tensor, encoding: Encoding, audio: Audio | None = None) -> None:
    """Write IMAGE frames [n, H, W, 3] in 0..1 as H.264 in BT.709 colours, with AAC sound, in an MP4 file.

    An odd side loses its last row or column, which 4:2:0 colour cannot hold. The sound keeps its own length. The file
    appears complete or not at all. Raises ValueError if there are no frames.
    """
    if not len(images):
        raise ValueError(f"There are no frames to write into {path.name}; check the node that makes them.")
    height, width = (images.shape[1] // 2 * 2, images.shape[2] // 2 * 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
            container.metadata.update(encoding.metadata or {})
            stream = _add_picture(container, (width, height), encoding)
            # Streams must be declared before the first packet is written.
            heard = audio is not None and audio["waveform"].numel()
            packets = deque(_sound_packets(_add_sound(container, audio), audio) if heard else ())
            for index, image in enumerate(images):
                container.mux(stream.encode(_frame(image[:height, :width, :3], encoding.pixel_format)))
                # Sound goes beside its picture; players of a file in two halves must seek back and forth.
                while packets and packets[0].pts * packets[0].time_base <= index / encoding.fps:
                    container.mux(packets.popleft())
            container.mux(stream.encode())
            container.mux(packets)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add_picture(container: av.container.OutputContainer, size: tuple[int, int], encoding: Encoding) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=Fraction(encoding.fps).limit_denominator(1001))
    stream.width, stream.height = size
    stream.pix_fmt = encoding.pixel_format
    stream.options = {"crf": str(encoding.crf)}
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream


def _frame(image: Tensor, pixel_format: str) -> av.VideoFrame:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(format=pixel_format, dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)


def _add_sound(container: av.container.OutputContainer, audio: Audio) -> av.AudioStream:
    layout = "mono" if audio["waveform"].shape[1] == 1 else "stereo"
    return container.add_stream("aac", rate=AAC_RATE, layout=layout)


def _sound_packets(stream: av.AudioStream, audio: Audio) -> list[av.Packet]:
    samples = audio["waveform"][0][:2].float().clamp(-1, 1).cpu().numpy()
    layout = "mono" if samples.shape[0] == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate, frame.pts = int(audio["sample_rate"]), 0
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=AAC_RATE)
    parts = [*resampler.resample(frame), *resampler.resample(None), None]
    return [packet for part in parts for packet in stream.encode(part)]
