"""Faces as masks: whose, where, and which keypoints are not believed."""

import math

import numpy as np
import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N

WIDTH, HEIGHT = 100, 80


def face(x, y, radius=10.0, points=20):
    """Keypoints around a center: an outline of 17, then more."""
    angles = [2 * math.pi * i / 17 for i in range(points)]
    return [value for a in angles for value in (x + radius * math.cos(a), y + radius * math.sin(a), 1.0)]


def frame(*people):
    return {"canvas_width": WIDTH, "canvas_height": HEIGHT, "people": [{"face_keypoints_2d": p} for p in people]}


def masks(*frames, person=0):
    (mask,) = N["FaceMaskFromPoseKeypoints"]().createmask(list(frames), person)
    return mask


def center(mask):
    return mask.nonzero().double().mean(dim=0).flip(0).tolist()


def test_the_inside_of_the_outline():
    (mask,) = masks(frame(face(40, 30)))
    assert mask.shape == (HEIGHT, WIDTH) and set(mask.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(center(mask), (39.5, 29.5), atol=1)
    assert abs(mask.sum().item() - math.pi * 100) < 40


def test_the_person_is_followed():
    left, right = face(25, 40), face(70, 40)
    first, second, lost, again = masks(
        frame(left, right), frame(face(66, 42), face(28, 40)), frame(), frame(right, left), person=1
    )
    assert center(first)[0] > 60 and center(second)[0] > 60 and not lost.any() and center(again)[0] > 60
    assert center(masks(frame(left, right), person=7)[0])[0] < 30
    assert center(masks(frame(None, right), person=0)[0])[0] > 60


@pytest.mark.parametrize(
    "points",
    [
        None, [], [0.0] * 60, face(40, 30, points=16), face(40, 30)[:-3] + [math.nan, 1.0, 1.0],
        face(40, 30)[:-3] + [-1.0, 30.0, 1.0], face(40, 30, points=17) + [1.0, 1.0, 1.0] * 4,
        face(50, 40, radius=45), face(40, 30, radius=1),
    ],
)  # fmt: skip
def test_doubtful_faces_are_left_out(points):
    assert not masks(frame(points)).any()


def test_without_frames_the_mask_is_empty():
    assert torch.equal(masks(), torch.zeros(1, 64, 64))
