"""Pictures, sounds and videos of the rarer kinds that people have are read right, or refused in a sentence."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.check import GraphError
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import load
from wanvideo_wrapper.headless.media import probe, read_audio, read_frames
from wanvideo_wrapper.headless.picture_file import read_picture
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.headless.video_file import Encoding, write_video
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

RATE = 16000
CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}


def noise(channels, seconds=1.0):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (channels, int(RATE * seconds))).astype(np.float32)


def write_sound(path, samples, codec, layout, *, cover=False):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        picture = container.add_stream("png", rate=1) if cover else None
        if cover:
            picture.width = picture.height = 16
            picture.pix_fmt = "rgb24"
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 99, np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=RATE)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def write_frames(path, codec, times, *, pix_fmt="yuv420p", base=10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=base)
        stream.width = stream.height = 64
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, base)
        for number, time in enumerate(times):
            pixels = np.full((64, 64, 4), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_cmyk_and_turned_photographs(tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 40)).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    image = read_picture(tmp_path / "print.jpg")[0]
    assert image.shape == (1, 8, 8, 3)
    torch.testing.assert_close(image[0, 4, 4] * 255, torch.tensor([200.0, 30.0, 40.0]), atol=4, rtol=0)
    picture = Image.new("RGB", (32, 16), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 16, 16))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "phone.jpg", exif=exif, quality=100)
    image = read_picture(tmp_path / "phone.jpg")[0][0]
    assert image.shape == (32, 16, 3) and image[4, 8, 2] > 0.8 and image[28, 8, 0] > 0.8


@pytest.mark.parametrize(("channels", "layout", "codec"), [(6, "5.1", "pcm_s24le"), (2, "stereo", "pcm_s24le")])
def test_sound_of_six_channels_and_24_bits(channels, layout, codec, tmp_path):
    samples = noise(channels)
    write_sound(tmp_path / "a.wav", samples, codec, layout)
    sound = read_audio(tmp_path / "a.wav")
    assert sound["waveform"].shape == (1, channels, RATE)
    assert np.abs(sound["waveform"][0].numpy() - samples).max() < 2**-22


def test_speech_in_the_middle_of_six_channels_is_heard_in_the_video(tmp_path):
    waveform = torch.zeros(1, 6, RATE)
    waveform[0, 2] = torch.from_numpy(noise(1)[0])
    write_video(tmp_path / "v.mp4", torch.rand(10, 32, 32, 3), Encoding(fps=10),
                {"waveform": waveform, "sample_rate": RATE})  # fmt: skip
    heard = read_audio(tmp_path / "v.mp4")["waveform"]
    assert heard.shape[1] == 2 and (heard[0].std(dim=1) > 0.05).all()


def test_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    write_sound(path, noise(1), "libmp3lame", "mono", cover=True)
    with av.open(str(path)) as container:
        assert container.streams.video
    assert read_audio(path)["waveform"].shape[2] == pytest.approx(RATE, abs=2400)
    with pytest.raises(ValueError, match=r"song\.mp3 has no picture"):
        probe(path, "video")


def test_lengths_that_headers_get_wrong(tmp_path, caplog):
    path = tmp_path / "a.wav"
    write_sound(path, noise(1), "pcm_s16le", "mono")
    data = path.read_bytes()
    place = data.index(b"data") + 4
    # What programs write that do not know the length yet.
    path.write_bytes(data[:place] + b"\xff" * 4 + data[place + 4 :])
    assert read_audio(path)["waveform"].shape[2] == RATE
    path.write_bytes(data[: place + 4])
    with pytest.raises(ValueError, match=r"a\.wav (holds no sound|is no sound file)"):
        read_audio(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.wav is no sound file that can be read"):
        read_audio(path)


def test_videos_of_uneven_times_and_cut_ones(tmp_path):
    write_frames(tmp_path / "uneven.mp4", "libx264", (0, 1, 2, 3, 13, 14, 15, 25))
    info, frames = read_frames(tmp_path / "uneven.mp4")
    frames = list(frames)
    assert len(frames) == 8 and len(frames) / info.fps == pytest.approx(info.duration, rel=0.15)
    whole = (tmp_path / "uneven.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4 has no picture; choose a video"):
        read_frames(tmp_path / "cut.mp4")


@pytest.mark.parametrize(("codec", "pix_fmt"), [("prores_ks", "yuva444p10le"), ("qtrle", "argb")])
def test_videos_with_alpha_have_three_colors(codec, pix_fmt, tmp_path):
    write_frames(tmp_path / "v.mov", codec, range(4), pix_fmt=pix_fmt)
    _, frames = read_frames(tmp_path / "v.mov")
    frames = list(frames)
    assert len(frames) == 4 and all(frame.shape == (64, 64, 3) for frame in frames)
    assert [frame.mean() for frame in frames] == pytest.approx([0, 20, 40, 60], abs=4)


@pytest.fixture
def run(tmp_path):
    before = get_host()
    host = StandaloneHost(models=tmp_path, inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    (tmp_path / "in").mkdir()
    set_host(host)

    def go(**nodes):
        path = tmp_path / "w.json"
        path.write_text(json.dumps({k: {"class_type": c, "inputs": i} for k, (c, i) in nodes.items()}))
        return Runner(load(path, CLASSES), CLASSES, host).run()

    yield go
    set_host(before)


def test_names_of_any_script(run, tmp_path):
    name = "\u753b\u50cf e\u0301 \U0001f600 'x' $HOME;.png"
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "in" / name)
    run(l=("LoadImage", {"image": name}),
        s=("SaveImage", {"images": ["l", 0], "filename_prefix": "\u89c6\u9891/\U0001f600 a"}))  # fmt: skip
    (saved,) = (tmp_path / "out").rglob("*.png")
    assert Image.open(saved).getpixel((3, 3)) == (9, 99, 199) and saved.parent.name == "\u89c6\u9891"


def test_links_out_of_the_input_folder_are_named(run, tmp_path):
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret" / "a.png")
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret" / "a.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "secret")
    for name in ("a.png", "folder/a.png"):
        with pytest.raises(GraphError, match=rf"'{name}' lies outside the input and output folders"):
            run(l=("LoadImage", {"image": name}), s=("PreviewImage", {"images": ["l", 0]}))


def test_a_disk_that_is_full_in_the_middle_of_a_video(run, tmp_path):
    resource = pytest.importorskip("resource")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger than a frame, smaller than the video of them.
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, hard))
    try:
        with pytest.raises(OSError, match="could not be written to") as caught:
            run(l=("LoadImage", {"image": "a.png"}), r=("RepeatImageBatch", {"image": ["l", 0], "amount": 12}),
                v=("VHS_VideoCombine", {"images": ["r", 0], "frame_rate": 5, "format": "video/ProRes"}))  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = (tmp_path / "out").glob("rescued_*")
    assert str(folder) in caught.value.__notes__[0] and len(list(folder.glob("frame_*.png"))) == 12
    assert not list((tmp_path / "out").glob("*.mov")) and not list((tmp_path / "out").glob(".*"))
