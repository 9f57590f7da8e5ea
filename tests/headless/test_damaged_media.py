"""Damage costs its own length, claims of size cost nothing, and formats that read other files are not opened."""

import base64

import av
import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper.headless import media, picture_file
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.media import Encoding, read_audio, read_frames, write_video
from wanvideo_wrapper.headless.picture_file import check_picture, read_picture
from wanvideo_wrapper.headless.video_file import FORMATS
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

RATE = 44100


def write_sound(path, samples, codec, *, rate=RATE, form="fltp"):
    """samples: [channels, n] in -1..1."""
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=form, layout=layout, rate=rate)
        for start in range(0, samples.shape[1], 65536):
            part = np.ascontiguousarray(samples[:, start : start + 65536], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            for made in resampler.resample(frame):
                container.mux(stream.encode(made))
        container.mux(stream.encode(None))


def speech(seconds=3.0):
    """Noise in bursts: its envelope tells the time."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(int(seconds * 1000)).uniform(-1, 1, len(time))
    return (noise * (np.sin(2 * np.pi * 1.7 * time) > 0.3) * 0.6)[None]


def lag(wanted, got):
    """By how many samples `got` is late."""
    size = 2 ** int(np.ceil(np.log2(len(wanted) + len(got))))
    cross = np.fft.irfft(np.fft.rfft(got, size) * np.conj(np.fft.rfft(wanted, size)))
    peak = int(cross.argmax())
    return peak - size if peak > size // 2 else peak


@pytest.mark.parametrize(("ending", "codec"), [("mp3", "libmp3lame"), ("m4a", "aac"), ("ogg", "libopus")])
def test_speech_after_a_damaged_part_stays_in_time(ending, codec, tmp_path, caplog):
    rate = 48000 if codec == "libopus" else RATE
    whole, damaged = tmp_path / f"whole.{ending}", tmp_path / f"damaged.{ending}"
    write_sound(whole, speech(8.0), codec, rate=rate, form="flt" if codec == "libopus" else "fltp")
    data = bytearray(whole.read_bytes())
    rng = np.random.default_rng(7)
    middle = len(data) // 2
    data[middle : middle + 2000] = rng.integers(0, 256, 2000, dtype=np.uint8).tobytes()
    damaged.write_bytes(data)
    sound, again = (read_audio(path)["waveform"][0, 0].numpy() for path in (whole, damaged))
    assert not any("damaged" in record.message and "whole" in record.message for record in caplog.records)
    last = len(sound) * 3 // 4
    assert abs(lag(sound[last:], again[last:])) <= 2
    assert abs(len(again) - len(sound)) <= 2 * 1152


def test_a_lost_part_of_sound_is_silence_of_its_length(tmp_path, caplog, monkeypatch):
    path = tmp_path / "a.flac"
    write_sound(path, np.random.default_rng(1).uniform(-1, 1, (1, 3 * RATE)), "flac", form="s16")
    whole = read_audio(path)["waveform"]
    frames = media._frames

    def lossy(container, stream, damage):
        for number, (packet, frame) in enumerate(frames(container, stream, damage)):
            if number in (4, 5):
                damage.note()
            else:
                yield packet, frame

    monkeypatch.setattr(media, "_frames", lossy)
    again = read_audio(path)["waveform"]
    lost = (whole != again).any(dim=1)[0].nonzero()[:, 0]
    assert whole.shape == again.shape and not again[..., lost[0] : lost[-1] + 1].any()
    assert 4096 < len(lost) <= 2 * 4608 + 50
    assert "a.flac is damaged: 2 parts of its sound cannot be decoded" in caplog.text


def test_lost_frames_are_the_one_before(tmp_path, monkeypatch, caplog):
    path = tmp_path / "v.mp4"
    write_video(path, torch.linspace(0, 1, 10)[:, None, None, None].expand(10, 32, 32, 3), Encoding(fps=10, crf=1))
    whole = np.stack(list(read_frames(path)[1])).astype(int)
    frames = media._frames

    def lossy(container, stream, damage):
        for number, pair in enumerate(frames(container, stream, damage)):
            if number in (3, 4):
                damage.note()
            else:
                yield pair

    monkeypatch.setattr(media, "_frames", lossy)
    again = np.stack(list(read_frames(path)[1])).astype(int)
    assert again.shape == whole.shape
    assert np.array_equal(again, whole[[0, 1, 2, 2, 2, 5, 6, 7, 8, 9]])
    assert "0.20 s are filled by time stamp" in caplog.text


def test_long_sound_waits_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    write_sound(path, np.concatenate((speech(), -speech())), "flac", form="s16")
    small = read_audio(path)["waveform"]
    monkeypatch.setattr(media, "IN_MEMORY", 1000)
    mapped = read_audio(path)["waveform"]
    assert torch.equal(small, mapped) and mapped.shape[1] == 2
    mapped *= 2
    assert torch.equal(read_audio(path)["waveform"], small)
    monkeypatch.setattr(media, "MOST_SAMPLES", 10000)
    with pytest.raises(ValueError, match=r"a\.flac is longer than"):
        read_audio(path)


def test_nan_in_sound_is_named_with_its_time(tmp_path):
    samples = speech()
    samples[0, RATE] = np.nan
    write_sound(tmp_path / "a.wav", samples, "pcm_f32le", form="flt")
    with pytest.raises(ValueError, match=r"a\.wav holds NaN or infinity at (0\.9|1\.0)"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"),
        ("list.txt", "ffconcat version 1.0\nfile '{}'\n"),
        ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"),
    ],
)
def test_playlists_and_scripts_are_not_followed(name, text, tmp_path):
    write_sound(tmp_path / "secret.wav", speech(0.5), "pcm_s16le", form="s16")
    (tmp_path / name).write_text(text.format(tmp_path / "secret.wav"))
    with pytest.raises(ValueError, match=f"{name} is no sound file that can be read"):
        read_audio(tmp_path / name)


class Address:
    """What FFmpeg would take for an address."""

    name = "address"

    def __init__(self, text):
        self._text = text

    def __str__(self):
        return self._text


def test_only_files_are_opened(tmp_path):
    write_sound(tmp_path / "a.wav", speech(0.5), "pcm_s16le", form="s16")
    text = base64.b64encode((tmp_path / "a.wav").read_bytes()).decode()
    for address in (f"data:audio/wav;base64,{text}", f"concat:{tmp_path / 'a.wav'}", f"subfile:{tmp_path / 'a.wav'}"):
        with pytest.raises(ValueError, match="address is no sound file that can be read"):
            read_audio(Address(address))
    assert read_audio(Address(str(tmp_path / "a.wav")))["waveform"].shape[2] == RATE // 2


def test_frames_larger_than_memory_are_refused_and_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "v.mp4"
    write_video(path, FRAMES, Encoding(fps=10))
    monkeypatch.setattr(media, "LARGEST_FRAME", 64 * 96 - 1)
    for read in (read_frames, lambda path: media.probe(path, "video")):
        with pytest.raises(ValueError, match=r"v\.mp4 has frames of 96x64, more than can be taken"):
            read(path)
    # A frame in the middle may be larger than the header says: the decoder has the limit, too.
    monkeypatch.setattr(media, "_check_size", lambda *size: None)
    with pytest.raises(ValueError, match=r"v\.mp4 has no frame that can be decoded"):
        list(read_frames(path)[1])


def test_pictures_larger_than_memory_are_refused_by_their_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (13000, 13000)).save(path)
    with pytest.raises(ValueError, match=r"bomb\.png has 13000x13000 pixels, of which at most 67 million"):
        check_picture(path)
    pages = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(6)]
    pages[0].save(tmp_path / "long.gif", save_all=True, append_images=pages[1:])
    assert len(read_picture(tmp_path / "long.gif")[0]) == 6
    monkeypatch.setattr(picture_file, "LARGEST_ANIMATION", 5 * 64 * 64)
    with pytest.raises(ValueError, match=r"long\.gif has too many frames"):
        read_picture(tmp_path / "long.gif")


def test_formats_that_start_programs_are_no_pictures(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"a\.eps is no picture that can be read"):
        read_picture(tmp_path / "a.eps")


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    set_host(host)
    yield host
    set_host(before)


FRAMES = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 64, 96, 3)
CODECS = {"video/h264-mp4": "h264", "video/h265-mp4": "hevc", "video/webm": "vp9", "video/ProRes": "prores"}


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_written_and_read_back(name, host, tmp_path, caplog):
    sound = {"waveform": torch.rand(1, 1, 8000) - 0.5, "sample_rate": 16000}
    node = NODES["VHS_VideoCombine"]()
    shown = node.combine_video(FRAMES, 12.0, 0, "clip", name, False, True, sound)["ui"]["videos"]
    if name in CODECS:
        (path,) = shown
        with av.open(path) as container:
            assert container.streams.video[0].codec_context.name == CODECS[name]
            assert container.streams.video[0].average_rate == 12
            levels = [frame.to_ndarray(format="rgb24").mean() / 255 for frame in container.decode(video=0)]
        assert read_audio(tmp_path / "out" / path)["waveform"].abs().max() > 0.05
    elif name == "video/8bit-png":
        assert [path.rsplit("_", 1)[1] for path in shown] == [f"00001.{n:03d}.png" for n in range(1, 7)]
        levels = [np.asarray(Image.open(path)).mean() / 255 for path in shown]
    else:
        images, _ = read_picture(tmp_path / "out" / shown[0])
        levels = [float(image.mean()) for image in images]
        opened = Image.open(shown[0])
        opened.load()
        assert opened.info["duration"] in (80, 83) and opened.info["loop"] == 0
        assert "holds no sound" in caplog.text
    assert levels == pytest.approx([n / 5 for n in range(6)], abs=0.03)
    assert not list((tmp_path / "out").glob(".*"))
    again = node.combine_video(FRAMES, 12.0, 0, "clip", name, False, True)["ui"]["videos"]
    assert not set(shown) & set(again)


def test_h265_refuses_frames_that_its_encoder_cannot_hold(host):
    node = NODES["VHS_VideoCombine"]()
    with pytest.raises(ValueError, match="64x64 or more, these are 48x64: choose video/h264-mp4"):
        node.combine_video(FRAMES[:, :, :48], 12.0, 0, "clip", "video/h265-mp4", False, True)
