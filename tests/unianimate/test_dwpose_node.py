"""The pose detector on networks of fixed answers, which find known points by the colors of what they are shown."""

import logging
import sys
import types

import numpy as np
import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.unianimate.alignment import Alignment
from wanvideo_wrapper.unianimate.drawing import Style
from wanvideo_wrapper.unianimate.keypoints import PoseModels, ordered

WIDTH, HEIGHT = 120, 90
FILES = ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
# By number: boxes of people in pixels, and their 133 points.
BOXES = {1: (20, 12, 100, 84), 2: (40, 10, 90, 80), 3: (16, 30, 110, 70)}
STEP = 40


def truth(number):
    left, top, right, bottom = BOXES[number]
    points = np.random.default_rng(number).uniform((left, top), (right, bottom), (133, 2))
    points[[5, 6], 0] = right - 5, left + 5
    points[[11, 12], 1] = bottom
    return points


def images(*numbers):
    """Red and green tell the place of a pixel, blue who is there: 0 nobody."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    frames = [torch.stack((2 * x, 2 * y, torch.full_like(x, STEP * number)), dim=-1) for number in numbers]
    return torch.stack(frames).float() / 255


class Session:
    """Both networks. calls: how many pictures each call had."""

    calls = {name: [] for name in FILES}

    def __init__(self, path, providers):
        self.name = path.rsplit("/", 1)[-1]
        self.calls[self.name].clear()

    def get_inputs(self):
        return [types.SimpleNamespace(name="pictures", shape=[1 if self.name == FILES[0] else "batch", 3, None, None])]

    def run(self, outputs, inputs):
        pictures = inputs["pictures"]
        assert pictures.dtype == np.float32
        self.calls[self.name].append(len(pictures))
        results = [self.people(picture) if self.name == FILES[0] else self.points(picture) for picture in pictures]
        return [np.stack(values) for values in zip(*results, strict=True)]

    def people(self, picture):
        """One box in the middle cell of the last stride, of a picture of 640 pixels, blue first."""
        number, rows = round(picture[0, 9, 9] / STEP), np.zeros((8400, 85), np.float32)
        if number:
            box = np.array(BOXES[number]) * 640 / WIDTH
            row = rows[8000 + 10 * 20 + 10]
            row[:2] = (box[:2] + box[2:]) / 64 - 10
            row[2:4] = np.log((box[2:] - box[:2]) / 32)
            row[4:6] = 0.9
        return (rows,)

    def points(self, crop):
        """Peaks where red and green are those of the points; every seventh point is doubtful."""
        red, green, blue = crop * np.reshape((58.395, 57.12, 57.375), (3, 1, 1)) + np.reshape(
            (123.675, 116.28, 103.53), (3, 1, 1)
        )
        across, down = np.zeros((133, 576), np.float32), np.zeros((133, 768), np.float32)
        for place, (x, y) in enumerate(truth(round(blue[192, 144] / STEP))):
            score = 0.2 if place % 7 == 4 else 0.8
            across[place, 2 * abs(red[192] - 2 * x).argmin()] = score
            down[place, 2 * abs(green[:, 144] - 2 * y).argmin()] = score
        return across, down


class Bar:
    """A progress bar that keeps what it was told."""

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        pass

    def update(self, done, **more):
        self.done.append(done)


class Host(StandaloneHost):
    def progress(self, total, label=""):
        self.bar = Bar()
        self.bar.total, self.bar.done = total, []
        return self.bar


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    before = get_host()
    package = types.ModuleType("onnxruntime")
    package.InferenceSession, package.get_available_providers = Session, lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    (tmp_path / "detection").mkdir()
    for name in FILES:
        (tmp_path / "detection" / name).touch()
    set_host(Host(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


def models(host, threshold=0.3):
    return PoseModels(host.models_dir("detection"), "cpu", threshold)


def detect(video, **options):
    options = {"score_threshold": 0.3, "stick_width": 3, **options}
    return N["WanVideoUniAnimateDWPoseDetector"]().process(video, **options)


def picture(pose, **options):
    return torch.from_numpy(Style(stick=3, **options).draw(pose, WIDTH, HEIGHT)).float() / 255


def test_points_are_where_they_were_in_the_picture(host):
    """Letterbox, box, crop and the way back, within a pixel; one pass for all crops, but one by one for people."""
    poses = models(host).poses(images(2, 0, 1, 3))
    assert poses[1] is None and Session.calls == {FILES[0]: [1, 1, 1, 1], FILES[1]: [3]}
    for pose, number in zip((poses[0], *poses[2:]), (2, 1, 3), strict=True):
        scores = np.where(np.arange(133) % 7 == 4, 0.2, 0.8)
        want = ordered(truth(number) / (WIDTH, HEIGHT), scores, 0.3)
        assert (abs(pose.points - want.points) * (WIDTH, HEIGHT)).max() < 1
        np.testing.assert_array_equal(pose.visible, want.visible)
        assert not pose.visible.all()
    assert models(host, threshold=0.1).poses(images(1))[0].visible.all()


def test_the_node_is_its_parts(host):
    numbers = (1, 2, 3, 3, 2, 1, 2, 3, 1, 2)
    people = dict(zip((1, 2, 3), models(host, 0.1).poses(images(1, 2, 3)), strict=True))
    plain, none = detect(images(*numbers), score_threshold=0.1)
    assert host.bar.total == 10 and host.bar.done[-1] == 10 and len(host.bar.done) > 1
    assert none.shape == (1, 64, 64, 3) and not none.any()
    assert torch.equal(plain, torch.stack([picture(people[number]) for number in numbers]))
    align = Alignment.between(people[1], people[2])
    poses, reference = detect(images(*numbers), score_threshold=0.1, reference_pose_image=images(2, 0))
    assert torch.equal(poses, torch.stack([picture(align(people[number])) for number in numbers]))
    assert torch.equal(reference, picture(people[2])[None]) and not torch.equal(poses, plain)
    swapped = detect(images(1), score_threshold=0.1, reference_pose_image=images(2), colorspace="BGR")
    assert torch.equal(swapped[0], poses[:1].flip(-1)) and torch.equal(swapped[1], reference.flip(-1))
    options = {"draw_body": False, "draw_feet": False, "draw_hands": False, "draw_head": True, "body_keypoint_size": 2}
    (part, *_), _ = detect(images(1), score_threshold=0.1, **options)
    assert torch.equal(part, picture(people[1], body=False, feet=False, hands=False, body_dots=2))
    (part, *_), _ = detect(images(1), score_threshold=0.1, draw_head=False, hand_keypoint_size=1)
    assert torch.equal(part, picture(people[1], head=False, hand_dots=1))


def test_images_without_a_person(caplog):
    with caplog.at_level(logging.WARNING):
        empty, _ = detect(images(0, 1, 0, 2))
        repeated, _ = detect(images(0, 1, 0, 2), handle_not_detected="repeat")
    assert "2 of 4 images show no person; they are black" in caplog.text and "repeat the pose before" in caplog.text
    assert [bool(frame.any()) for frame in empty] == [False, True, False, True]
    assert torch.equal(repeated[2], empty[1]) and torch.equal(repeated[[0, 1, 3]], empty[[0, 1, 3]])
    # Aligned once, not twice.
    repeated, _ = detect(
        images(1, 0), score_threshold=0.1, handle_not_detected="repeat", reference_pose_image=images(2)
    )
    assert torch.equal(repeated[0], repeated[1])
    with pytest.raises(ValueError, match="No person was found in any of the 2 pose_images"):
        detect(images(0, 0))
    with pytest.raises(ValueError, match="No person was found in reference_pose_image"):
        detect(images(1), reference_pose_image=images(0))


def test_files_that_are_missing_or_others(host, monkeypatch):
    monkeypatch.setattr(Session, "people", lambda self, picture: (np.zeros((8400, 6), np.float32),))
    with pytest.raises(ValueError, match=r"gave \[\(8400, 6\)\] instead of \[\(8400, 85\)\], .* put there the files"):
        detect(images(1))
    (host.models_dir("detection") / FILES[0]).unlink()
    with pytest.raises(ValueError, match=r"needs yolox_l.onnx in .*detection: .* yzd-v/DWPose publishes"):
        detect(images(1))
