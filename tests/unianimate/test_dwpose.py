"""Finding people and their keypoints: boxes, crops, order and alignment against closed forms."""

import math

import numpy as np
import pytest
import torch
from wanvideo_wrapper.fantasyportrait.warping import inverse, moved
from wanvideo_wrapper.unianimate.alignment import Alignment
from wanvideo_wrapper.unianimate.keypoints import LEFT_HAND, RIGHT_HAND, Pose, crop_matrix, decoded, ordered
from wanvideo_wrapper.unianimate.people import letterbox, surest_person

rng = np.random.default_rng
COCO = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle", "left big toe", "left small toe", "left heel", "right big toe", "right small toe", "right heel",
)  # fmt: skip
OPENPOSE = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip
AT = {name: number for number, name in enumerate(OPENPOSE)} | {"left foot": 18, "right foot": 19}


def test_letterbox():
    """A ramp that is doubled stays a ramp; blue comes first, and grey fills what is left."""
    pictures = torch.zeros(2, 200, 320, 3, dtype=torch.uint8)
    pictures[1, ..., 0] = torch.arange(0, 400, 2)[:, None].clamp(max=240)
    boxed, scale = letterbox(pictures)
    assert boxed.shape == (2, 3, 640, 640) and boxed.dtype == np.float32 and scale == 2
    rows = np.arange(1, 200)
    np.testing.assert_allclose(boxed[1, 2, rows, 7], 2 * ((rows + 0.5) / 2 - 0.5), atol=0.51)
    assert not boxed[1, :2, :400].any() and (boxed[:, :, 400:] == 114).all()
    tall, scale = letterbox(torch.zeros(1, 1280, 100, 3, dtype=torch.uint8))
    assert scale == 0.5 and not tall[0, :, :, :50].any() and (tall[0, :, :, 50:] == 114).all()


def predictions(*people, seed=0):
    """YOLOX's 8400 rows for (box in its picture, stride, column, row, objectness, score, class)."""
    rows = rng(seed).uniform(0, 0.5, (8400, 85)).astype(np.float32)
    first = {8: 0, 16: 6400, 32: 8000}
    for (left, top, right, bottom), stride, column, row, sure, score, kind in people:
        values = rows[first[stride] + row * (640 // stride) + column]
        values[:2] = (left + right) / 2 / stride - column, (top + bottom) / 2 / stride - row
        values[2:4] = math.log((right - left) / stride), math.log((bottom - top) / stride)
        values[4], values[5:], values[5 + kind] = sure, 0, score
    return rows


@pytest.mark.parametrize(("stride", "column", "row"), [(8, 79, 3), (16, 5, 39), (32, 19, 10)])
def test_the_surest_person(stride, column, row):
    box = (100.0, 40.0, 260.0, 420.0)
    less = (104.0, 44.0, 262.0, 424.0)
    found = predictions(
        (less, 16, 7, 7, 0.9, 0.7, 0), (box, stride, column, row, 0.9, 0.8, 0), ((0, 0, 90, 90), 8, 1, 1, 1.0, 1.0, 16)
    )
    np.testing.assert_allclose(surest_person(found, 0.5), np.array(box) * 2, rtol=1e-5)
    assert surest_person(predictions((box, 8, 1, 1, 0.5, 0.58, 0)), 0.5) is None
    assert surest_person(np.full((8400, 85), np.nan, np.float32), 0.5) is None


@pytest.mark.parametrize("box", [(10, 20, 110, 420), (30, 5, 330, 105)])
def test_a_crop_has_the_person_and_a_quarter_more(box):
    box = np.array(box, dtype=float)
    matrix = crop_matrix(box)
    corners = moved(box.reshape(2, 2), matrix)
    np.testing.assert_allclose(corners.mean(axis=0), (144, 192))
    share = (corners[1] - corners[0]) / (288, 384)
    assert share.max() == pytest.approx(0.8) and share.min() < 0.8
    points = rng(1).uniform(0, 400, (133, 2))
    np.testing.assert_allclose(moved(moved(points, matrix), inverse(matrix)), points)


def test_points_are_the_peaks_of_both_sides():
    across, down = rng(2).uniform(-1, 0.1, (133, 576)), rng(3).uniform(-1, 0.1, (133, 768))
    x, y = rng(4).integers(0, 576, 133), rng(5).integers(0, 768, 133)
    high = rng(6).uniform(0.2, 1, (2, 133))
    across[np.arange(133), x], down[np.arange(133), y] = high
    points, scores = decoded(across, down)
    np.testing.assert_allclose(points, np.stack((x, y), axis=1) / 2)
    np.testing.assert_allclose(scores, high.min(axis=0))


def test_order_of_points():
    points, scores = rng(7).uniform(0, 1, (133, 2)), np.ones(133)
    of = {name: points[number] for number, name in enumerate(COCO)}
    of["neck"] = (of["left shoulder"] + of["right shoulder"]) / 2
    want = [of[name] for name in OPENPOSE]
    want += [(of[f"{side} big toe"] + of[f"{side} small toe"]) / 2 for side in ("left", "right")]
    pose = ordered(points, scores, 0.3)
    np.testing.assert_allclose(pose.points, [*want, *points[91:]])
    assert pose.visible.all()
    np.testing.assert_array_equal(pose.points[LEFT_HAND], points[91:112])
    np.testing.assert_array_equal(pose.points[RIGHT_HAND], points[112:])
    scores[[COCO.index("left shoulder"), COCO.index("right small toe"), 120]] = 0.3
    hidden = np.flatnonzero(~ordered(points, scores, 0.3).visible)
    assert hidden.tolist() == [AT["neck"], AT["left shoulder"], AT["right foot"], 41 + 120 - 112]


def person(seed):
    """Points anywhere, with shoulders and hips where people have them."""
    points = rng(seed).uniform(0.1, 0.9, (62, 2))
    points[AT["right shoulder"], 0], points[AT["left shoulder"], 0] = 0.3, 0.6 + seed / 50
    points[[AT["right hip"], AT["left hip"]], 1] = 0.95
    points[AT["neck"]] = (points[AT["right shoulder"]] + points[AT["left shoulder"]]) / 2
    return Pose(points, np.ones(62, dtype=bool))


def length(points, one, other):
    return np.linalg.norm(points[AT[one]] - points[AT[other]])


CHAINS = (
    ("neck", "nose", "left eye", "left ear"), ("neck", "nose", "right eye", "right ear"),
    ("neck", "left shoulder", "left elbow", "left wrist"), ("neck", "right shoulder", "right elbow", "right wrist"),
    ("left hip", "left knee", "left ankle"), ("right hip", "right knee", "right ankle"),
)  # fmt: skip


def test_alignment_is_a_sum_along_the_bones():
    """Every point is its root and the stretched bones to it, each as much longer as the reference's is."""
    first, later, reference = person(1), person(2), person(3)
    align = Alignment.between(first, reference)

    def middle(points, part):
        return (points[AT[f"left {part}"]] + points[AT[f"right {part}"]]) / 2

    wide = [p.points[AT["left shoulder"], 0] - p.points[AT["right shoulder"], 0] for p in (first, reference)]
    high = [(middle(p.points, "hip") - middle(p.points, "shoulder"))[1] for p in (first, reference)]
    scale = np.array((wide[1] / wide[0], high[1] / high[0]))
    offset = reference.points[AT["neck"]] - scale * first.points[AT["neck"]]
    for pose in (first, later):
        want, stretched = {}, pose.points * scale
        for chain in CHAINS:
            place = stretched[AT[chain[0]]] + offset
            want[chain[0]] = place
            for start, end in zip(chain, chain[1:], strict=False):
                ratio = length(reference.points, start, end) / length(first.points * scale, start, end)
                place = place + ratio * (stretched[AT[end]] - stretched[AT[start]])
                want[end] = place
        aligned = align(pose).points
        for name, place in want.items():
            np.testing.assert_allclose(aligned[AT[name]], place, err_msg=name)
        for joint, places in (("left wrist", LEFT_HAND), ("right wrist", RIGHT_HAND), ("left ankle", 18),
                              ("right ankle", 19)):  # fmt: skip
            np.testing.assert_allclose(
                aligned[places] - aligned[AT[joint]], stretched[places] - stretched[AT[joint]], atol=1e-12
            )
    np.testing.assert_allclose(align(first).points[AT["neck"]], reference.points[AT["neck"]])
    assert length(align(first).points, "neck", "nose") == pytest.approx(length(reference.points, "neck", "nose"))


def hide(pose, *names):
    visible = pose.visible.copy()
    visible[[AT[name] for name in names]] = False
    return pose._replace(visible=visible)


def test_hidden_bones_keep_their_length():
    first, reference = person(1), person(3)
    whole, part = Alignment.between(first, reference), Alignment.between(first, hide(reference, "left wrist"))
    bones = [np.diff(align(first).points[[AT["left elbow"], AT["left wrist"]]], axis=0) for align in (whole, part)]
    stretched = np.diff(first.points[[AT["left elbow"], AT["left wrist"]]] * part.scale, axis=0)
    np.testing.assert_allclose(bones[1], stretched)
    assert abs(bones[0] - stretched).max() > 0.01
    assert not part(hide(first, "nose")).visible[AT["nose"]]
    with pytest.raises(ValueError, match="both hips must be visible in reference_pose_image"):
        Alignment.between(first, hide(reference, "left hip"))
    flat = first.points.copy()
    flat[AT["left shoulder"], 0] = flat[AT["right shoulder"], 0]
    with pytest.raises(ValueError, match="side by side, .* visible in pose_images"):
        Alignment.between(first._replace(points=flat), reference)
