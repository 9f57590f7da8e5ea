"""Writing videos: the formats of VideoHelperSuite that PyAV and Pillow can make, in BT.709 colors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import torch
from torch import Tensor

from ..wanvideo.whole_file import partial_file

log = logging.getLogger("wanvideo")

Audio = dict[str, object]

# FFmpeg's numbers (ITU-T H.273) of BT.709 primaries, transfer and matrix, and of limited range.
BT709, LIMITED_RANGE = 1, 1
# By the number of channels; of others, the first two are taken.
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
PRORES_PROFILES = ("lt", "standard", "hq", "4444", "4444xq")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of video file. container "": Pillow writes it. crf: its default, None where there is no such setting."""

    suffix: str
    container: str = ""
    codec: str = ""
    sound: str = ""
    pixel_formats: tuple[str, ...] = ()
    crf: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    tag: str = ""
    # libx265 4.1 writes past its buffers when a side is shorter than its coding unit.
    least_side: int = 2


H264 = Format(
    suffix=".mp4", container="mp4", codec="libx264", sound="aac", pixel_formats=("yuv420p", "yuv420p10le"), crf=19
)
FORMATS: dict[str, Format] = {
    "video/h264-mp4": H264,
    "video/h265-mp4": Format(
        suffix=".mp4", container="mp4", codec="libx265", sound="aac", pixel_formats=("yuv420p10le", "yuv420p"), crf=22,
        options={"x265-params": "log-level=quiet"}, tag="hvc1", least_side=64,
    ),
    "video/webm": Format(
        suffix=".webm", container="webm", codec="libvpx-vp9", sound="libopus", pixel_formats=("yuv420p", "yuva420p"),
        crf=20, options={"b": "0", "row-mt": "1"},
    ),
    "video/ProRes": Format(
        suffix=".mov", container="mov", codec="prores_ks", sound="pcm_s16le",
        pixel_formats=("yuv422p10le", "yuva444p10le"),
    ),
    "image/gif": Format(suffix=".gif"),
    "image/webp": Format(suffix=".webp"),
    "video/8bit-png": Format(suffix=".001.png"),
}  # fmt: skip


class Frames(Protocol):
    """Frames [height, width, channels] in 0..1: an IMAGE tensor, or pictures that are still in a folder."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> Tensor:
        """One of them."""


@dataclass(frozen=True)
class Video:
    """Frames, their rate and their sound, between CreateVideo and SaveVideo."""

    images: Frames
    fps: float
    audio: Audio | None


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a video is written: frames a second, quality (CRF, lower is better), pixel format, text fields.

    profile: of ProRes. loop: how often a GIF or WebP is shown, 0 for ever.
    """

    fps: float
    crf: int = 19
    pixel_format: str = "yuv420p"
    metadata: Mapping[str, str] | None = None
    format: Format = H264
    profile: str = "hq"
    loop: int = 0


def write_video(path: Path, images: Frames, encoding: Encoding, audio: Audio | None = None) -> None:
    """Write IMAGE frames [n, H, W, 3] in 0..1, with sound, under a name; a file that has it is replaced.

    An odd side loses its last row or column, which 4:2:0 color cannot hold. The sound keeps its own length. The file
    appears complete or not at all. Raises ValueError if there are no frames.
    """
    check_frames(images, path.name)
    with partial_file(path.parent, path.name) as partial:
        encode_video(partial, images, encoding, audio)
        partial.replace(path)


def check_frames(images: Frames, name: str) -> None:
    """Raise ValueError if there are none."""
    if not len(images):
        raise ValueError(f"There are no frames to write into {name}; check the node that makes them.")


def sound_beside(audio: Audio, frames: int, fps: float) -> Audio:
    """The sound that so many frames last; a frame's length or more that is cut off is told."""
    rate, length = audio["sample_rate"], audio["waveform"].shape[-1]
    samples = round(frames / fps * rate)
    if length - samples >= rate / fps:
        log.info("The video lasts %.2f s; its sound of %.2f s is cut off there.", frames / fps, length / rate)
    return {**audio, "waveform": audio["waveform"][..., :samples]}


def encode_video(path: Path, images: Frames, encoding: Encoding, audio: Audio | None = None) -> None:
    """As `write_video`, to a file that is broken after an error. Raises OSError if it cannot be written."""
    form = encoding.format
    try:
        if form.container:
            _encode(path, _Checked(images), encoding, audio)
        else:
            _save_animation(path, _Checked(images), encoding)
    except OSError as error:
        raise OSError(f"The video could not be written to {path.parent} ({error.strerror or error}).") from error


class _Checked:
    """Frames as they are, and one warning for those with NaN, which are black there."""

    def __init__(self, images: Frames) -> None:
        self._images = images
        self._warned = False

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self._images)):
            image = self._images[index]
            if not self._warned and not torch.isfinite(image).all():
                log.warning("Frame %d holds NaN or infinity and is black there; look at the node that made it.", index)
                self._warned = True
            yield image

    @property
    def first(self) -> Tensor:
        """The frame that tells the size."""
        return self._images[0]


def _encode(path: Path, images: _Checked, encoding: Encoding, audio: Audio | None) -> None:
    form = encoding.format
    height, width = images.first.shape[0] // 2 * 2, images.first.shape[1] // 2 * 2
    if min(height, width) < form.least_side:
        raise ValueError(too_small(form, width, height))
    options = {"movflags": "use_metadata_tags"} if form.container in ("mp4", "mov") else {}
    with av.open(str(path), "w", format=form.container, options=options) as container:
        container.metadata.update(encoding.metadata or {})
        stream = _add_picture(container, (width, height), encoding)
        # Streams must be declared before the first packet is written.
        heard = audio is not None and audio["waveform"].numel()
        packets = _sound_packets(_add_sound(container, audio, form), audio) if heard else iter(())
        waiting = next(packets, None)
        for index, image in enumerate(images):
            container.mux(stream.encode(_frame(image[:height, :width], stream.pix_fmt)))
            # Sound goes beside its picture; players of a file in two halves must seek back and forth.
            while waiting is not None and waiting.pts * waiting.time_base <= index / encoding.fps:
                container.mux(waiting)
                waiting = next(packets, None)
        container.mux(stream.encode())
        while waiting is not None:
            container.mux(waiting)
            waiting = next(packets, None)


def too_small(form: Format, width: object, height: object) -> str:
    """The sentence for frames that the format's encoder cannot hold."""
    return (
        f"{form.codec} writes frames of {form.least_side}x{form.least_side} or more, these are {width}x{height}: "
        "choose video/h264-mp4."
    )


def _add_picture(container: av.container.OutputContainer, size: tuple[int, int], encoding: Encoding) -> av.VideoStream:
    form = encoding.format
    stream = container.add_stream(form.codec, rate=Fraction(encoding.fps).limit_denominator(1001))
    stream.width, stream.height = size
    stream.pix_fmt = encoding.pixel_format
    stream.options = dict(form.options)
    if form.crf is not None:
        stream.options = {**form.options, "crf": str(encoding.crf)}
    context = stream.codec_context
    if form.codec == "prores_ks":
        wide = encoding.profile.startswith("4444")
        stream.pix_fmt = form.pixel_formats[wide]
        stream.options = {"profile": encoding.profile}
    if form.tag:
        context.codec_tag = form.tag
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream


def _frame(image: Tensor, pixel_format: str) -> av.VideoFrame:
    pixels = to_pixels(image if pixel_format.startswith("yuva") else image[..., :3])
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
    return frame.reformat(format=pixel_format, dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)


def to_pixels(image: Tensor) -> np.ndarray:
    """A frame in 0..1 as 8-bit [height, width, channels]; NaN is black."""
    pixels = (image.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(pixels)


def _add_sound(container: av.container.OutputContainer, audio: Audio, form: Format) -> av.AudioStream:
    layout = "mono" if audio["waveform"].shape[1] == 1 else "stereo"
    return container.add_stream(form.sound, rate=48000, layout=layout)


def _sound_packets(stream: av.AudioStream, audio: Audio) -> Iterator[av.Packet]:
    """Second by second, so that hours of sound take no more memory than it has."""
    waveform, rate = audio["waveform"][0], int(audio["sample_rate"])
    # The speech of films is in the third channel: mixed down to two, it is heard.
    layout = LAYOUTS.get(len(waveform), "stereo")
    waveform = waveform[: av.AudioLayout(layout).nb_channels]
    resampler = av.AudioResampler(
        format=stream.codec_context.format.name, layout=stream.layout.name, rate=stream.rate
    )
    for start in range(0, waveform.shape[1], rate):
        samples = waveform[:, start : start + rate].float().nan_to_num(0.0).clamp(-1, 1).cpu().numpy()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, start
        for part in resampler.resample(frame):
            yield from stream.encode(part)
    for part in (*resampler.resample(None), None):
        yield from stream.encode(part)


def _save_animation(path: Path, images: _Checked, encoding: Encoding) -> None:
    from PIL import Image

    pictures = (Image.fromarray(to_pixels(image)) for image in images)
    first = next(pictures)
    kind = encoding.format.suffix.removeprefix(".").upper()
    options = {"duration": round(1000 / encoding.fps), "loop": encoding.loop}
    if kind == "WEBP":
        # Lossy WebP smears thin edges at its default of 80.
        options |= {"quality": 90, "method": 4}
    first.save(path, format=kind, save_all=True, append_images=pictures, **options)
