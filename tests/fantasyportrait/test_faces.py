"""Crops, detection and tracking of faces: known places, other libraries' interpolation, and the smoothing formula."""

import builtins
import logging
import math

import numpy as np
import pytest
from fantasy_models import landmarks_of_face, stand_in_detector
from scipy.ndimage import map_coordinates
from skimage.transform import SimilarityTransform
from wanvideo_wrapper.fantasyportrait.drawing import disc
from wanvideo_wrapper.fantasyportrait.faces import FaceModels, _decoded, _surest, crop_matrix, eye_angle, overlap
from wanvideo_wrapper.fantasyportrait.tracking import Smoother, Tracker, landmarks_of
from wanvideo_wrapper.fantasyportrait.warping import inverse, moved, similarity, warp

rng = np.random.default_rng


def turned(angle, scale=1.0, shift=(0.0, 0.0)):
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])


def test_bilinear_is_scipys():
    picture, matrix = rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8), turned(0.3, 0.7, (4.0, -3.0))
    y, x = np.mgrid[0:24, 0:32]
    places = moved(np.stack((x.ravel(), y.ravel()), 1).astype(float), inverse(matrix))
    got = warp(picture, matrix, (24, 32))
    for channel in range(3):
        want = map_coordinates(picture[..., channel].astype(float), places[:, ::-1].T, order=1, mode="grid-constant")
        assert np.abs(got[..., channel].ravel() - want).max() <= 0.51


def keys_cubic(values, place):
    """Cubic convolution of a row with a = -0.75, as OpenCV has it; black outside."""

    def weight(t):
        t, a = abs(t), -0.75
        if t < 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    base = math.floor(place)
    return sum(weight(place - i) * (values[i] if 0 <= i < len(values) else 0) for i in range(base - 1, base + 3))


def test_cubic_is_opencvs():
    picture = rng(1).integers(0, 256, (9, 12, 1), dtype=np.uint8)
    got = warp(picture, np.array([[1.6, 0, 0.4], [0, 1, 0]]), (9, 20), cubic=True)
    for x in range(20):
        want = [keys_cubic(row[:, 0].astype(float), (x - 0.4) / 1.6) for row in picture]
        assert np.abs(got[:, x, 0] - np.clip(want, 0, 255)).max() <= 0.51


def test_similarity_is_umeyamas():
    points, targets = rng(2).normal(size=(5, 2)) * 30, rng(3).normal(size=(5, 2)) * 20
    points[:, 0] += 90
    for target in (targets, moved(points, turned(0.4, 1.7, (5.0, 6.0))), targets * (-1, 1)):
        want = SimilarityTransform.from_estimate(points, target).params[:2]
        np.testing.assert_allclose(similarity(points, target), want, rtol=1e-9, atol=1e-9)


def test_a_crop_is_upright_and_filled_but_for_its_margin():
    upright = np.concatenate((rng(4).uniform(0, 1, (222, 2)), [[0, 0], [1, 1]])) * (60, 90)
    points = moved(upright, turned(0.5, 1.0, (300.0, 40.0)))
    seen = moved(points, crop_matrix(points, 0.5))
    low, high = seen.min(axis=0), seen.max(axis=0)
    np.testing.assert_allclose(low + high, (128, 128))
    np.testing.assert_allclose(high - low, np.array((60, 90)) * 128 * 0.85 / 90)
    # A box is its two corners.
    box = crop_matrix(np.array([[10.0, 20], [50, 60]]), 0)
    np.testing.assert_allclose(moved(np.array([[10.0, 30], [50, 50]]), box), [[9.6, 36.8], [118.4, 91.2]])
    eyes = np.zeros((222, 2))
    eyes[74], eyes[96] = (10, 10), (20, 20)
    assert eye_angle(eyes) == pytest.approx(math.pi / 4)


def test_decoded_boxes():
    """At stride 16, column 3 of row 2: a distribution with two equal peaks is their mean."""
    scores, values = [np.zeros((1, n, 1)) for n in (680, 170, 45)], [np.zeros((1, n, 32)) for n in (680, 170, 45)]
    place = 2 * 10 + 3
    values[1][0, place].reshape(4, 8)[[0, 1, 2, 3], [1, 2, 3, 5]] = 60
    values[1][0, place].reshape(4, 8)[3, 6] = 60
    scores[1][0, place] = 0.8
    boxes, found = _decoded(scores, values)
    assert boxes.shape == (895, 4) and found[680 + place] == 0.8
    np.testing.assert_allclose(boxes[680 + place], (48 - 16, 32 - 32, 48 + 48, 32 + 5.5 * 16))
    # Without a peak, all eight distances count alike.
    np.testing.assert_allclose(boxes[850], (-3.5 * 32, -3.5 * 32, 3.5 * 32, 3.5 * 32))


def test_the_surest_of_boxes_that_overlap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [40, 0, 50, 10]], dtype=float)
    chosen = _surest(np.arange(4), boxes, np.array([0.6, 0.9, 0.5, 0.4]))
    assert chosen.tolist() == [1, 2]
    assert overlap(boxes[0], boxes[1]) == pytest.approx(90 / 110) and overlap(boxes[0], boxes[2]) == 0


@pytest.fixture
def models(monkeypatch, tmp_path):
    stand_in_detector(monkeypatch, tmp_path)
    return FaceModels(tmp_path / "detection", "cpu")


def test_a_face_in_a_wide_picture(models):
    """The stand-in's box is 128 of the detector's 160 pixels wide, and reaches over the ends above and below."""
    picture = np.zeros((400, 600, 3), np.uint8)
    (box,) = models.boxes(picture)
    np.testing.assert_allclose(box, (0, 0, 480, 400), atol=1)
    face = models.landmarks(picture, np.array([[100.0, 100.0], [300.0, 300.0]]))
    np.testing.assert_allclose(face.points, 100 + (landmarks_of_face() - 0.075) / 0.85 * 200, atol=1e-3)
    assert (face.score, face.pitch, face.yaw) == (1.0, 0.0, 0.0)


def smoothed(new, old, strength, speed):
    """The 1 euro filter with its period and both its slopes at `strength`."""
    share = 2 * math.pi * strength / (2 * math.pi * strength + 1)
    speed = share * (new - old) / strength + (1 - share) * speed
    rate = 2 * math.pi * strength * (1 + strength * np.abs(speed))
    return old + rate / (rate + 1) * (new - old), speed


@pytest.mark.parametrize(("step", "chin", "nose"), [(0.1, 0.01, 0.01), (1.0, 0.05 + 0.25 / 3, None), (9.0, 0.3, 0.7)])
def test_smoothing_follows_the_formula(step, chin, nose):
    """A face of 100 pixels that moves aside; strengths of its outline and its nose at that motion."""
    smoother, start = Smoother(), rng(5).uniform(0, 100, (222, 2))
    assert np.array_equal(smoother(start, 100.0), start)
    nose = 0.03 + 0.67 * (0.01 - 0.003) / 0.017 if nose is None else nose
    moved_once, speeds = smoother(start + (step, 0), 100.0), {}
    for places, strength in ((slice(0, 33), chin), (slice(33, 48), nose)):
        want, speeds[strength] = smoothed((start + (step, 0))[places], start[places], strength, 0.0)
        np.testing.assert_allclose(moved_once[places], want)
    still = smoother(moved_once.copy(), 100.0)
    assert np.array_equal(still, moved_once), "what does not move stays where it is, and has no speed"


def test_tracking_holds_one_face(models):
    tracker, picture = Tracker(models), np.zeros((300, 200, 3), np.uint8)
    for _ in range(3):
        assert tracker.largest(picture) is tracker.tracks[0] and len(tracker.tracks) == 1
    assert tracker.tracks[0].points.shape == (222, 2)


class Scripted:
    """Faces where the script says so: for every call of a detector, the boxes of a picture."""

    def __init__(self, script):
        self.script = script

    def boxes(self, picture):
        return [np.array(box, dtype=float) for box in self.script[int(picture[0, 0, 0])]]

    def landmarks(self, picture, around, angle=0.0):
        low, high = around.min(axis=0), around.max(axis=0)
        points = low + (landmarks_of_face() - 0.075) / 0.85 * (high - low)
        score = 1.0 if self.script[int(picture[0, 0, 0])] else 0.0
        return type("Seen", (), dict(points=points, score=score, pitch=0.0, yaw=0.0))


def test_frames_without_a_face_have_the_one_before(caplog):
    large, small, tiny = (0, 0, 200, 200), (300, 0, 420, 120), (500, 0, 590, 90)
    script = [[], [tiny, small, large], [small], [], [small]]
    pictures = [np.full((4, 4, 3), number, np.uint8) for number in range(5)]
    steps = []
    with caplog.at_level(logging.WARNING):
        boxes, points = landmarks_of(Scripted(script), pictures, lambda: steps.append(1))
    assert len(steps) == 10 and "2 of 5 images have no face" in caplog.text
    np.testing.assert_allclose(np.array(boxes), [large, large, large, large, small], atol=1e-6)
    assert np.array_equal(points[0], points[1]) and np.array_equal(points[3], points[2])
    with pytest.raises(ValueError, match="No face of at least 96 pixels was found in any of the 2 images"):
        landmarks_of(Scripted([[], [tiny]]), pictures[:2], lambda: None)


def test_missing_files_and_packages_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="needs face_det.onnx and face_landmark.onnx in .*detection: put there"):
        FaceModels(tmp_path / "detection", "cpu")
    stand_in_detector(monkeypatch, tmp_path, providers=("CPUExecutionProvider",))
    with pytest.raises(ValueError, match="has no CUDA: choose device 'cpu'"):
        FaceModels(tmp_path / "detection", "cuda")
    (tmp_path / "detection/face_det.onnx").unlink()
    with pytest.raises(ValueError, match=r"needs face_det.onnx in "):
        FaceModels(tmp_path / "detection", "cpu")
    (tmp_path / "detection/face_det.onnx").touch()
    monkeypatch.delitem(__import__("sys").modules, "onnxruntime")
    real = builtins.__import__

    def without(name, *rest):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="needs the package onnxruntime, which is not installed"):
        FaceModels(tmp_path / "detection", "cpu")


@pytest.mark.parametrize(("radius", "rows"), [(1, (0, 1, 0)), (2, (0, 1, 2, 1, 0)), (3, (0, 2, 2, 3, 2, 2, 0))])
def test_dots_are_opencvs(radius, rows):
    """Half widths of the rows that cv2.circle fills."""
    want = {(x, y - radius) for y, half in enumerate(rows) for x in range(-half, half + 1)}
    assert set(disc(radius)) == want and len(disc(radius)) == len(want)
