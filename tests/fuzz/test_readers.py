"""Mutated files end in a sentence (ValueError, OSError) or in a right result; never in another exception, never late.

FUZZ_EXAMPLES sets how many cases each reader gets (default: a short run; `make fuzz`: 10,000).
"""

import io
import os

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import limited
from PIL import Image
from wanvideo_wrapper.headless.media import read_audio, read_frames
from wanvideo_wrapper.headless.picture_file import read_picture
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
run = settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 1000)


def encoded(form, codec, kind):
    """A small file of this format."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8000 if kind == "audio" else 5)
        if kind == "audio":
            stream.layout = "mono"
            samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 8000)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            resampler = av.AudioResampler(format=stream.codec_context.format.name, layout="mono", rate=8000)
            frames = [*resampler.resample(frame), *resampler.resample(None)]
        else:
            stream.width = stream.height = 32
            pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
            frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pixels]
            stream.pix_fmt = "yuv420p"
        for frame in (*frames, None):
            container.mux(stream.encode(frame))
    return file.getvalue()


def picture(form, mode="RGB"):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format=form)
    return file.getvalue()


STILLS = (("PNG",), ("PNG", "P"), ("JPEG",), ("WEBP",), ("GIF", "P"), ("BMP",), ("TIFF",))
PICTURES = [picture(*kind) for kind in STILLS]
SOUNDS = [
    encoded(*kind, "audio")
    for kind in (("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("mp4", "aac"))
]
VIDEOS = [
    encoded(*kind, "video")
    for kind in (("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"))
]


@st.composite
def mutated(draw, seeds):
    """A file with bytes changed, cut out, doubled or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at : at + length] = draw(st.binary(min_size=1, max_size=length))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                del data[max(at, 1) :]
    return bytes(data)


def tried(read, path):
    """The result, None where the file is refused in a sentence."""
    with limited(path):
        try:
            return read(path)
        except (ValueError, OSError) as error:
            assert path.name in str(error) and len(str(error)) < 1000, error
            return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    before = get_host()
    folder = tmp_path_factory.mktemp("fuzz")
    set_host(StandaloneHost(models=folder, inputs=folder, outputs=folder / "out", device="cpu"))
    yield folder
    set_host(before)


@run
@given(data=mutated(PICTURES))
def test_pictures(data, folder):
    path = folder / "picture.bin"
    path.write_bytes(data)
    result = tried(read_picture, path)
    if result is not None:
        images, masks = result
        assert images.dim() == 4 and images.shape[-1] == 3 and masks.dim() == 3
        assert images.min() >= 0 and images.max() <= 1


@run
@given(data=mutated(SOUNDS))
def test_sounds(data, folder):
    path = folder / "sound.bin"
    path.write_bytes(data)
    sound = tried(read_audio, path)
    if sound is not None:
        assert sound["waveform"].dim() == 3 and torch.isfinite(sound["waveform"]).all() and sound["sample_rate"] > 0


@run
@given(data=mutated(VIDEOS))
def test_videos(data, folder):
    path = folder / "video.bin"
    path.write_bytes(data)

    def read(path):
        info, frames = read_frames(path)
        return info, [frame for frame, _ in zip(frames, range(50), strict=False)]

    result = tried(read, path)
    assert result is None or all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in result[1])
