"""`wanvideo demo --speech FILE --portrait FILE`."""

import av
import numpy as np
import pytest
from wanvideo_wrapper.demo import portrait
from wanvideo_wrapper.headless.cli import main

RATE, SECONDS = 44100, 0.8
SHORT = (
    "WanVideoSampler.steps=1", "WanVideoImageToVideoMultiTalk.width=64", "WanVideoImageToVideoMultiTalk.height=64"
)  # fmt: skip


@pytest.fixture
def speech(tmp_path):
    """Stereo FLAC at 44.1 kHz in a folder of its own."""
    path = tmp_path / "my sounds" / "voice.flac"
    path.parent.mkdir()
    time = np.arange(int(RATE * SECONDS)) / RATE
    sound = np.random.default_rng(np.random.randint(2**31)).normal(size=time.size) * np.abs(np.sin(9 * time)) * 0.1
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="stereo")
        samples = (np.repeat(sound, 2).clip(-1, 1) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.slow
def test_makes_a_video_as_long_as_the_speech(speech, tmp_path, capsys):
    picture, out = tmp_path / "my faces" / "me.png", tmp_path / "out"
    portrait.save(picture, seed=12, size=300)
    options = ["--device", "cpu", "--out", str(out), *(part for value in SHORT for part in ("--set", value))]
    assert main(["demo", "--speech", str(speech), "--portrait", str(picture), *options]) == 0
    (path,) = out.glob("*.mp4")
    assert capsys.readouterr().out.split() == [str(path)]
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == round(25 * SECONDS)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--speech", b"no sound", "cannot be read as sound"),
        ("--portrait", b"no picture", "cannot be read as a picture"),
    ],
)
def test_says_what_is_wrong_with_a_file(option, content, message, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert main(["demo", option, str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_says_that_a_file_is_not_there(tmp_path, capsys):
    assert main(["demo", "--speech", str(tmp_path / "none.wav"), "--out", str(tmp_path)]) == 2
    assert "none.wav" in capsys.readouterr().err
