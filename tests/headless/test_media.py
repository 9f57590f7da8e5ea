"""Files in and out: pictures, sound, video; and folders that workflows may not leave."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.core_nodes.pictures import fit
from wanvideo_wrapper.headless.media import Encoding, read_audio, read_frames, write_video
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(models=tmp_path / "models", inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    (tmp_path / "in").mkdir()
    set_host(host)
    yield host
    set_host(before)


def moving(frames, height, width):
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return torch.stack([torch.stack((across, down, across.roll(f, 1)), -1) for f in range(frames)])


def tone(seconds, rate=16000, channels=1):
    wave = torch.sin(torch.arange(int(seconds * rate)) * 2 * torch.pi * 440 / rate) * 0.5
    return {"waveform": wave.expand(1, channels, -1), "sample_rate": rate}


@pytest.mark.parametrize(("fps", "size"), [(25, (48, 64)), (16, (33, 47)), (23.976, (32, 32))])
def test_video_round_trip(fps, size, tmp_path):
    images, path = moving(12, *size), tmp_path / "v.mp4"
    write_video(path, images, Encoding(fps=fps, metadata={"workflow": "{}"}), tone(12 / fps))
    info, frames = read_frames(path)
    got = np.stack(list(frames))
    height, width = size[0] // 2 * 2, size[1] // 2 * 2
    assert got.shape == (12, height, width, 3)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    want = images[:, :height, :width].numpy()
    assert np.abs(got / 255 - want).mean() < 0.05
    sound = read_audio(path)
    assert sound["waveform"].shape[-1] / sound["sample_rate"] == pytest.approx(12 / fps, abs=0.05)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_survives(channels, tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, moving(25, 32, 32), Encoding(fps=25), tone(1.0, channels=channels))
    sound = read_audio(path)
    assert sound["waveform"].shape[1] == channels
    spectrum = np.abs(np.fft.rfft(sound["waveform"][0, 0].numpy()))
    peak = spectrum.argmax() * sound["sample_rate"] / sound["waveform"].shape[-1]
    assert peak == pytest.approx(440, abs=3)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises((ValueError, RuntimeError)):
        write_video(tmp_path / "v.mp4", moving(2, 32, 32), Encoding(fps=25, pixel_format="nonsense"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["text.mp3", "empty.wav"])
def test_what_is_no_sound_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"" if name == "empty.wav" else b"words, not sound" * 50)
    with pytest.raises(ValueError, match=name):
        read_audio(tmp_path / name)


def test_combine_numbers_files_and_keeps_the_workflow(host):
    node = NODES["VHS_VideoCombine"]()
    for number in (1, 2):
        result = node.combine_video(
            moving(5, 32, 32), 25, 0, "sub/clip", "video/h264-mp4", False, True, tone(0.2), {"1": {}},
            {"workflow": {"nodes": [1]}}, crf=23, pix_fmt="yuv420p", save_metadata=True,
        )  # fmt: skip
        path = host.output_dir() / "sub" / f"clip_{number:05d}.mp4"
        assert result["ui"] == {"videos": [str(path)]} and path.is_file()
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["workflow"]) == {"nodes": [1]}
    with pytest.raises(ValueError, match="outside"):
        node.combine_video(moving(5, 32, 32), 25, 0, "../../clip", "video/h264-mp4", False, True)
    with pytest.raises(ValueError, match="'video/nvenc_h264-mp4' is written by ComfyUI only"):
        node.combine_video(moving(5, 32, 32), 25, 0, "clip", "video/nvenc_h264-mp4", False, True)


def test_load_video_selects_frames(host):
    write_video(host.input_dir() / "v.mp4", moving(20, 32, 48), Encoding(fps=20))
    load = NODES["VHS_LoadVideo"]().load_video
    images, count, sound, info = load("v.mp4", 0, 0, 0, 0, 0, 1)
    assert images.shape == (20, 32, 48, 3) and count == 20 and sound is None and info["source_fps"] == 20
    assert load("v.mp4", 10, 0, 0, 0, 0, 1)[1] == 10
    assert load("v.mp4", 0, 24, 0, 6, 4, 2)[0].shape == (6, 16, 24, 3)
    assert load("v.mp4", 0, 0, 0, 0, 0, 1, format="Wan")[1] == 17
    with pytest.raises(ValueError, match="no frames after skipping 99"):
        load("v.mp4", 0, 0, 0, 0, 99, 1)


def test_pictures_with_transparency(host):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(host.input_dir() / "p.png")
    image, mask = NODES["LoadImage"]().load_image("p.png")
    assert torch.equal(image, torch.from_numpy(pixels[None, ..., :3]).float() / 255)
    torch.testing.assert_close(mask[0], 1 - torch.from_numpy(pixels[..., 3]).float() / 255)
    (host.input_dir() / "t.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"t\.png is no picture"):
        NODES["LoadImage"]().load_image("t.png")


OUTSIDE = ("../secret.png", "/etc/hostname", "sub/../../secret.png", "..\\secret.png", "link.png")


@pytest.mark.parametrize("name", OUTSIDE)
def test_workflows_cannot_leave_their_folders(name, host, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="lies outside"):
        host.readable_file(name)
    allowed = StandaloneHost(inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu", allowed=(tmp_path,))
    if "secret" in name or "link" in name:
        assert allowed.readable_file(name).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("mode", "position", "want"),
    [
        ("stretch", "center", ((0, 0, 100, 50), (40, 40), (0, 0, 0, 0))),
        ("resize", "center", ((0, 0, 100, 50), (40, 20), (0, 0, 0, 0))),
        ("crop", "center", ((25, 0, 50, 50), (40, 40), (0, 0, 0, 0))),
        ("crop", "left", ((0, 0, 50, 50), (40, 40), (0, 0, 0, 0))),
        ("pad", "center", ((0, 0, 100, 50), (40, 20), (0, 0, 10, 10))),
        ("pad", "top", ((0, 0, 100, 50), (40, 20), (0, 0, 0, 20))),
        ("total_pixels", "center", ((0, 0, 100, 50), (56, 28), (0, 0, 0, 0))),
    ],
)
def test_how_pictures_fit(mode, position, want):
    assert fit((100, 50), (40, 40), mode, position) == want


def test_resize_node(host):
    node, image = NODES["ImageResizeKJv2"](), torch.rand(2, 50, 100, 3)
    result, width, height, mask = node.resize(image, 40, 40, "lanczos", "crop", "0, 0, 0", "center", 16)
    assert result.shape == (2, 32, 32, 3) and (width, height) == (32, 32) and mask.shape == (2, 32, 32)
    padded, *_, mask = node.resize(image, 40, 40, "bilinear", "pad", "255, 0, 0", "center", 2)
    assert padded.shape == (2, 40, 40, 3) and torch.equal(padded[:, 0, 0], torch.tensor([1.0, 0, 0]).expand(2, 3))
    assert mask[:, :10].min() == 1 and mask[:, 10:30].max() == 0


def test_batches(host):
    images = torch.rand(5, 4, 6, 3)
    pick = NODES["GetImageRangeFromBatch"]().imagesfrombatch
    assert torch.equal(pick(1, 2, images)[0], images[1:3]) and torch.equal(pick(-1, 2, images)[0], images[3:])
    with pytest.raises(ValueError, match="past the last of 5"):
        pick(7, 1, images)
    (joined,) = NODES["ImageConcatMulti"]().combine(2, images, "left", False, image_2=images[:1])
    assert joined.shape == (5, 4, 12, 3) and torch.equal(joined[:, :, 6:], images)
    assert torch.equal(joined[4, :, :6], images[0])
    assert NODES["GetImageSizeAndCount"]().getsize(images)[1:] == (6, 4, 5)
