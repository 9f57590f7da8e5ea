"""`--gpus 2` runs a whole workflow, from files to a video, and the ranks agree with one process."""

import av
import numpy as np
import pytest
from wanvideo_wrapper.headless import several
from wanvideo_wrapper.headless.cli import main

SHORT = (
    "MultiTalkWav2VecEmbeds.num_frames=13", "WanVideoSampler.steps=1",
    "WanVideoImageToVideoMultiTalk.width=64", "WanVideoImageToVideoMultiTalk.height=64",
)  # fmt: skip


def frames(folder, *options):
    sets = [part for value in SHORT for part in ("--set", value)]
    assert main(["demo", "--device", "cpu", "--out", str(folder), *sets, *options]) == 0
    with av.open(next(folder.glob("*.mp4"))) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(float)


@pytest.mark.slow
def test_two_ranks_make_the_same_video(tmp_path):
    # Files are compared, not what is printed: ranks print where their fork server did when an earlier test began it.
    one, two = frames(tmp_path / "one"), frames(tmp_path / "two", "--gpus", "2")
    assert one.shape == two.shape and one.std() > 10
    assert np.abs(one - two).mean() < 0.5


def test_more_gpus_than_attention_heads_are_refused_before_a_process_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(several, "launch", None)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path), "--gpus", "64"]) == 2
    assert "attention heads, which 64 GPUs cannot share: use --gpus " in capsys.readouterr().err
