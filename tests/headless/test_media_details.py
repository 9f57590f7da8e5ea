"""Colours, interleaving, lengths and sizes of media, against their standards and the nodes stood in for."""

import re

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.core_nodes.pictures import next_file
from wanvideo_wrapper.headless.media import Encoding, read_audio, read_frames, write_video
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.whole_file import partial_file


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(models=tmp_path / "models", inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    (tmp_path / "in").mkdir()
    set_host(host)
    yield host
    set_host(before)


def ramp(seconds, rate=16000):
    """Sound whose loudness tells the time: 0 at the start, 1 at `seconds`."""
    time = torch.arange(int(seconds * rate)) / rate
    return {"waveform": (torch.sin(time * 2 * torch.pi * 440) * time / seconds)[None, None], "sample_rate": rate}


def seconds_of(audio):
    return audio["waveform"].shape[-1] / audio["sample_rate"]


@pytest.mark.parametrize("colour", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.5, 0.9)])
def test_colours_are_those_of_bt_709(colour, tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, torch.tensor(colour).expand(3, 32, 32, 3), Encoding(fps=25, crf=1))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        luma = frame.to_ndarray()[16, 16]
    red, green, blue = colour
    assert luma == pytest.approx(16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue), abs=1.5)
    back = next(read_frames(path)[1])[16, 16] / 255
    assert back == pytest.approx(np.array(colour), abs=0.02)


def test_sound_lies_beside_its_picture(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, torch.rand(8, 32, 32, 3).repeat(90, 1, 1, 1), Encoding(fps=30), ramp(24.0))
    with av.open(str(path)) as container:
        packets = [(p.pos, p.stream.type, float(p.pts * p.time_base)) for p in container.demux() if p.pts is not None]
    latest = {"video": 0.0, "audio": 0.0}
    for _, kind, time in sorted(packets):
        latest[kind] = max(latest[kind], time)
        # H.264 holds some frames back to order them.
        assert abs(latest["video"] - latest["audio"]) < 4
    assert min(latest.values()) > 23.9
    assert seconds_of(read_audio(path)) == pytest.approx(24.0, abs=0.05)


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_turned_videos_are_shown_upright(degrees, corner, tmp_path):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a turned video")
    picture = np.zeros((32, 64, 3), dtype=np.uint8)
    picture[:16, :32] = 255
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        # Counterclockwise, as FFmpeg's own player and converter turn it.
        stream.set_display_rotation(degrees)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (shown,) = read_frames(tmp_path / "v.mp4")[1]
    assert shown.shape == ((64, 32, 3) if degrees != 180 else (32, 64, 3))
    assert shown[corner].min() > 200 and shown.mean() == pytest.approx(255 / 4, abs=8)


def test_no_frames_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"no frames to write into v\.mp4"):
        write_video(tmp_path / "v.mp4", torch.zeros(0, 32, 32, 3), Encoding(fps=25))
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_sound(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, torch.rand(50, 32, 32, 3), Encoding(fps=25), ramp(2.0))
    part = read_audio(path, start=1.0, seconds=0.5)
    assert seconds_of(part) == pytest.approx(0.5)
    assert part["waveform"].abs().max() == pytest.approx(0.75, abs=0.05)
    assert seconds_of(read_audio(path, start=0.5)) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize(("start", "seconds"), [(0.0, 0.04), (0.7, 0.33), (1.2, 0.0), (1.9, 5.0)])
def test_a_part_equals_that_of_the_whole(start, seconds, tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, torch.rand(50, 32, 32, 3), Encoding(fps=25), ramp(2.0))
    whole, part = read_audio(path), read_audio(path, start=start, seconds=seconds)
    rate = whole["sample_rate"]
    stop = round((start + seconds) * rate) if seconds else None
    assert torch.equal(part["waveform"], whole["waveform"][..., round(start * rate) : stop])


def test_sound_that_is_over_before_its_start(tmp_path, host):
    path = tmp_path / "v.mp4"
    write_video(path, torch.rand(50, 32, 32, 3), Encoding(fps=25), ramp(0.5))
    late = read_audio(path, start=1.0)
    assert late["waveform"].shape[-1] == 0
    with av.open(combine(torch.rand(3, 32, 32, 3), late)) as container:
        assert not container.streams.audio


def combine(images, audio=None, **options):
    given = {"frame_rate": 25, "loop_count": 0, "filename_prefix": "clip", "format": "video/h264-mp4"}
    given |= {"pingpong": False, "save_output": True, **options}
    result = NODES["VHS_VideoCombine"]().combine_video(images, audio=audio, **given)
    return result["ui"]["videos"][0]


@pytest.mark.parametrize(
    ("sound", "options", "frames", "seconds"),
    [
        (3.0, {}, 25, 1.0),
        (1.03, {}, 25, 1.0),
        (0.4, {}, 25, 0.4),
        (0.4, {"trim_to_audio": True}, 10, 0.4),
        (3.0, {"loop_count": 1}, 50, 2.0),
        (3.0, {"pingpong": True}, 48, 1.92),
    ],
)
def test_lengths_of_picture_and_sound(sound, options, frames, seconds, host, caplog):
    caplog.set_level("INFO", "wanvideo")
    path = combine(torch.rand(25, 32, 32, 3), ramp(sound), **options)
    with av.open(path) as container:
        assert sum(1 for _ in container.decode(video=0)) == frames
    assert seconds_of(read_audio(path)) == pytest.approx(seconds, abs=0.05)
    # Less than a frame is what rounding leaves.
    cut = f"The video lasts {seconds:.2f} s; its sound of {sound:.2f} s is cut off there."
    assert (cut in caplog.text) == (sound - seconds > 0.04) and caplog.text.count("is cut off") == (cut in caplog.text)


def test_a_saved_video_tells_of_sound_that_it_cuts_off(host, caplog):
    caplog.set_level("INFO", "wanvideo")
    (video,) = NODES["CreateVideo"]().create(torch.rand(5, 32, 32, 3), 10.0, ramp(2.0))
    (path,) = NODES["SaveVideo"]().save(video, "clip", "auto", "auto")["ui"]["videos"]
    assert seconds_of(read_audio(path)) == pytest.approx(0.5, abs=0.05)
    assert "The video lasts 0.50 s; its sound of 2.00 s is cut off there." in caplog.text


def test_no_metadata_where_none_is_wanted_or_known(host):
    for options in ({"save_metadata": False, "prompt": {"1": {}}}, {"prompt": None, "extra_pnginfo": {}}):
        with av.open(combine(torch.rand(2, 32, 32, 3), **options)) as container:
            assert not {"prompt", "workflow"} & set(container.metadata)


def test_results_that_are_not_saved_are_temporary(host):
    assert combine(torch.rand(2, 32, 32, 3), save_output=False).startswith(str(host.temp_dir()))


def test_numbers_go_on_whatever_the_name(host, tmp_path):
    base = tmp_path / "out"
    base.mkdir()
    for prefix in ("plain", "a[1]b", "q?*"):
        (base / f"{prefix}_00003.mp4").touch()
        (base / f"{prefix}_00007.png").touch()
        (base / f"{prefix}_more_00009.mp4").touch()
        assert next_file(base, prefix, ".mp4").name == f"{prefix}_00004.mp4"


def test_dates_in_names(host, tmp_path):
    name = next_file(tmp_path / "out", "%date:yyyy-MM-dd%/v_%date:hhmmss%_%year%", ".mp4")
    found = re.fullmatch(r"(\d{4})-\d\d-\d\d/v_\d{6}_(\d{4})_00001\.mp4", str(name.relative_to(tmp_path / "out")))
    assert found and found[1] == found[2]


@pytest.mark.parametrize("prefix", ["", ".", "sub/..", "..", "/"])
def test_a_prefix_names_a_file(prefix, host, tmp_path):
    with pytest.raises(ValueError, match="names no file|lies outside"):
        next_file(tmp_path / "out", prefix, ".mp4")


def test_names_that_no_file_can_have(host, tmp_path):
    for name in ("a\0.png", "\ud800.png"):
        with pytest.raises(ValueError, match=r"has characters that no file name can have: take them out\.$"):
            host.readable_file(name)
        with pytest.raises(ValueError, match="has characters that no file name can have"):
            host.find_file("vae", name)
    with pytest.raises(ValueError, match="is longer than the 255 bytes"):
        host.writable_folder("sub/" + "a" * 256)
    long = "é" * 125 + ".png"
    (tmp_path / "in" / long).write_text("x")
    assert host.readable_file(long).read_text() == "x"


def test_a_prefix_leaves_room_for_what_is_added(host, tmp_path):
    with pytest.raises(ValueError, match="longer than 150 bytes"):
        next_file(tmp_path / "out", "sub/" + "é" * 76, ".mp4")
    name = next_file(tmp_path / "out", "sub/" + "é" * 75, ".mp4")
    with partial_file(name.parent, name.name) as partial:
        partial.write_text("x")


def test_names_that_tell_their_folder(host, tmp_path):
    for folder, ending in (("in", "input"), ("out", "output"), ("out/temp", "temp")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "p.png").write_text(ending)
        assert host.readable_file(f"p.png [{ending}]").read_text() == ending
    with pytest.raises(ValueError, match="lies outside"):
        host.readable_file("../../p.png [output]")


def test_sixteen_bit_and_moving_pictures(host):
    grey = np.random.default_rng(3).integers(0, 65535, (6, 8), dtype=np.uint16)
    Image.fromarray(grey).save(host.input_dir() / "deep.png")
    image, mask = NODES["LoadImage"]().load_image("deep.png")
    want = torch.from_numpy(grey.astype(np.float32) / 65535)
    torch.testing.assert_close(image[0], want[..., None].expand(-1, -1, 3), atol=1 / 200, rtol=0)
    assert mask.shape == (1, 64, 64) and not mask.any()
    frames = [Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(host.input_dir() / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    image, mask = NODES["LoadImage"]().load_image("moving.webp")
    assert image.shape == (3, 6, 8, 3) and len(mask) == 3
    assert (image[:, 0, 0, 0] * 255).round().tolist() == [0, 100, 200]


def test_a_truncated_picture_is_named(host):
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(host.input_dir() / "cut.png")
    whole = (host.input_dir() / "cut.png").read_bytes()
    (host.input_dir() / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is no picture"):
        NODES["LoadImage"]().load_image("cut.png")


@pytest.fixture
def video(host):
    """40 frames at 20 a second, 50 high and 100 wide: black on the left, white in the middle, black on the right."""
    image = torch.zeros(50, 100, 3)
    image[:, 25:75] = 1
    write_video(host.input_dir() / "v.mp4", image.expand(40, -1, -1, -1), Encoding(fps=20, crf=1), ramp(2.0))
    return lambda *a, **k: NODES["VHS_LoadVideo"]().load_video("v.mp4", *a, **k)


def test_two_custom_sides_cut_the_middle_out(video):
    images = video(0, 50, 50, 1, 0, 1, format="None")[0]
    assert images.shape == (1, 50, 50, 3) and images.mean() > 0.95


@pytest.mark.parametrize(
    ("form", "sides", "size", "frames"),
    [
        ("None", (0, 0), (50, 100), 40),
        ("AnimateDiff", (0, 0), (48, 104), 40),
        ("Wan", (0, 0), (48, 104), 37),
        ("Wan", (60, 0), (32, 64), 37),
        ("LTXV", (0, 64), (64, 128), 33),
        ("Mochi", (0, 0), (48, 96), 37),
    ],
)
def test_formats_round_sides_and_frames(form, sides, size, frames, video):
    images, count, _, info = video(0, *sides, 0, 0, 1, format=form)
    assert images.shape == (frames, *size, 3) and count == frames
    assert (info["loaded_height"], info["loaded_width"]) == size and info["source_frame_count"] == 40


def test_videos_larger_than_memory_are_refused(video, monkeypatch):
    monkeypatch.setattr("wanvideo_wrapper.wanvideo.footage._main_memory", lambda: 20 * 50 * 100 * 3 * 5)
    assert video(0, 0, 0, 20, 0, 1, format="None")[1] == 20
    with pytest.raises(ValueError, match=r"21 frames of 100x50 take .* load fewer with frame_load_cap, or smaller"):
        video(0, 0, 0, 0, 0, 1, format="None")


def test_sound_belongs_to_the_frames(video):
    *_, sound, info = video(10, 0, 0, 5, 10, 1, format="None")
    assert info["loaded_fps"] == 10 and seconds_of(sound) == pytest.approx(0.5)
    assert sound["waveform"].abs().max() == pytest.approx(0.75, abs=0.05)
    *_, sound, info = video(0, 0, 0, 5, 0, 4, format="None")
    assert info["loaded_fps"] == 5 and seconds_of(sound) == pytest.approx(1.0)


@pytest.mark.parametrize("step", [2, 16, 7])
@pytest.mark.parametrize("mode", ["stretch", "resize", "pad", "crop", "total_pixels"])
def test_sides_divide(mode, step, host):
    image, mask = torch.rand(2, 50, 100, 3), torch.rand(2, 50, 100)
    resize = NODES["ImageResizeKJv2"]().resize
    result, width, height, masks = resize(image, 90, 75, "bicubic", mode, "0, 0, 0", "center", step, mask=mask)
    assert width % step == 0 and height % step == 0
    assert result.shape == (2, height, width, 3) and masks.shape == (2, height, width)


def test_a_mask_of_another_size_follows_its_picture(host):
    image, mask = torch.rand(1, 40, 80, 3), torch.zeros(1, 20, 40)
    mask[:, :, 20:] = 1
    *_, masks = NODES["ImageResizeKJv2"]().resize(image, 40, 40, "lanczos", "crop", "0", "right", 2, mask=mask)
    assert masks.shape == (1, 40, 40) and masks.mean() > 0.95


def test_a_wrong_pad_colour_is_named(host):
    for colour in ("#ffffff", "red", "1, 2", ""):
        with pytest.raises(ValueError, match="is no pad_color"):
            NODES["ImageResizeKJv2"]().resize(torch.rand(1, 8, 16, 3), 8, 8, "area", "pad", colour, "center", 2)
