"""The quality bench: its figures on clips whose answer is known, and what it does with a talker."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper.demo.quality import bench, command, heldout
from wanvideo_wrapper.demo.quality.metrics import (
    correlation,
    cross_talk,
    lip_sync,
    mouth_opening,
    near_joins,
    psnr,
    ssim,
)
from wanvideo_wrapper.demo.sounds import FPS
from wanvideo_wrapper.demo.train import RECORDINGS


class TrueTalker:
    """Hands out the clips as they were drawn; another setting than the first adds noise."""

    def __init__(self, setting):
        if setting.attention != "sdpa":
            raise ValueError("this GPU has no such kernel")
        self.noise = 0.0 if setting == bench.Setting() else 0.05
        self.cases = {}

    def make(self, portrait, sounds, *, prompt, seed, masks=None):
        (case,) = [case for case in CASES if case.portrait is portrait]
        video = case.truth + np.float32(self.noise) * np.random.normal(size=case.truth.shape)
        return np.concatenate((case.portrait.numpy()[None], video[1:])).astype(np.float32), 1.5

    def reconstruct(self, video):
        return video + 0.01


CASES = [heldout.single(0), heldout.single(9)]


@pytest.fixture(scope="module")
def pair():
    return heldout.pair(1)


def test_a_true_clip_is_in_sync_and_follows_no_other_voice(pair):
    for case in CASES:
        assert len(case.truth) == len(case.levels[0]) == 5 * FPS
        mouth = mouth_opening(case.truth, case.boxes[0])
        found = lip_sync(mouth, case.levels[0])
        assert found.correlation > 0.95 and found.lag == 0
    for person in (0, 1):
        mouth = mouth_opening(pair.truth, pair.boxes[person])
        assert lip_sync(mouth, pair.levels[person]).correlation > 0.9
        assert abs(cross_talk(mouth, pair.levels[person], pair.levels[1 - person])) < 0.2


def test_a_late_mouth_is_found_and_a_shut_one_counts_nothing():
    case = CASES[0]
    mouth = mouth_opening(case.truth, case.boxes[0])
    assert lip_sync(np.roll(mouth, 2), case.levels[0]).lag == 2
    assert lip_sync(np.roll(mouth, 30), case.levels[0]).correlation < 0.6
    assert lip_sync(np.full_like(mouth, 0.3), case.levels[0]).correlation == 0


def test_silence_is_silent_and_masks_cover_the_mouths(pair):
    silent = heldout.silent(3)
    assert not silent.levels[0].any() and len(silent.truth) == 4 * FPS
    side = pair.portrait.shape[0]
    for mask, (left, top, right, bottom) in zip(pair.masks, pair.boxes, strict=True):
        rows, columns = (
            slice(int((a + 1) / 2 * side), int((b + 1) / 2 * side)) for a, b in ((top, bottom), (left, right))
        )
        assert mask[rows, columns].mean() > 0.95
    assert not (pair.masks[0] * pair.masks[1]).any()


def test_unseen_voices_are_not_among_the_training_voices():
    seen = {path.stem for path in (RECORDINGS / "training").glob("*.opus")}
    unseen = {name.rpartition("_")[0] for name, _ in heldout.voices()}
    assert len(seen) > 10 and len(unseen) >= 8 and not seen & unseen


def test_figures_have_their_usual_meaning():
    a = np.random.default_rng(np.random.randint(2**31)).random((2, 32, 32, 3))
    assert psnr(a, a) == 99 and ssim(a, a) == pytest.approx(1)
    assert psnr(a, a + 0.1) == pytest.approx(20)
    assert ssim(a, 1 - a) < 0
    assert correlation(a[0].ravel(), -a[0].ravel()) == pytest.approx(-1)
    assert near_joins(40, [20]).nonzero()[0].tolist() == list(range(12, 29)) and not near_joins(5, []).any()


def test_rows_compare_with_the_first(monkeypatch):
    monkeypatch.setattr(bench, "Talker", TrueTalker)
    first = bench.measure(bench.Setting(), CASES, None)
    other = bench.measure(bench.Setting(quantization="fp8_e4m3fn"), CASES, first)
    broken = bench.measure(bench.Setting(attention="sageattn"), CASES, first)
    assert first.lip_sync > 0.95 and first.psnr == 99 and first.vae_psnr == pytest.approx(40, abs=0.1)
    assert first.first_frame_psnr == 99 and first.seconds == 1.5
    assert other.psnr == pytest.approx(-20 * np.log10(0.05), abs=0.5) and other.ssim < first.ssim
    assert broken.reason == "this GPU has no such kernel" and broken.lip_sync is None


def test_the_command_writes_figures_and_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "Talker", TrueTalker)
    monkeypatch.setattr(command, "Talker", TrueTalker)
    monkeypatch.setattr(command, "extras", lambda row, talker: {"silence": 0.0})
    monkeypatch.setattr(command.heldout, "single", lambda number: CASES[number])
    options = Namespace(json=True, clips=2, settings="all", models=tmp_path, out=tmp_path, device="cpu")
    command.run(options)
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["lip_sync"] > 0.95 and found["silence"] == 0
    assert {"lip_sync", "psnr", "ssim", "vae_psnr", "first_frame_psnr", "seconds"} <= found["rows"][0].keys()
    assert any(row["reason"] for row in found["rows"]) and len(found["rows"]) > 10
    with Image.open(tmp_path / "quality" / "sheet_0.png") as sheet:
        assert sheet.size == (128 * 11, 128 * 2)
    assert (tmp_path / "quality" / "mouths_0.png").is_file()
    assert (tmp_path / "quality" / "quality.md").read_text().count("\n|") > 10
    options.clips = 0
    with pytest.raises(ValueError, match="--clips must be at least 1"):
        command.run(options)


def test_the_default_setting_is_the_first(monkeypatch):
    assert bench.Setting() not in command.settings() and bench.Setting().name == "disabled / sdpa / bf16"
    assert torch.is_tensor(CASES[0].portrait)
