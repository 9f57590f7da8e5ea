"""Drawn poses: ellipses against their equation, dots, hands, colors of OpenPose, and what options leave out."""

import colorsys
import math

import numpy as np
import pytest
from wanvideo_wrapper.unianimate.drawing import Style
from wanvideo_wrapper.unianimate.keypoints import LEFT_HAND, RIGHT_HAND, Pose

WIDTH, HEIGHT = 150, 120
NOSE, NECK, KNEE, ANKLE, FOOT = 0, 1, 12, 13, 18
NO_DOTS = {"body_dots": 0, "hand_dots": 0}


def pose(**places):
    """Points at pixels, by number; no others are visible."""
    points, visible = np.full((62, 2), -1.0), np.zeros(62, dtype=bool)
    for number, place in places.items():
        number = int(number[1:])
        points[number], visible[number] = (np.array(place) + 0.5) / (WIDTH, HEIGHT), True
    return Pose(points, visible)


def drawn(pose, **options):
    return Style(**options).draw(pose, WIDTH, HEIGHT).astype(int)


def colors(picture):
    return {tuple(color) for color in picture.reshape(-1, 3).tolist()} - {(0, 0, 0)}


@pytest.mark.parametrize("ends", [((20, 30), (120, 90)), ((120, 30), (30, 100)), ((70, 10), (70, 110))])
def test_a_limb_is_an_ellipse(ends):
    (ax, ay), (bx, by) = ends
    picture = drawn(pose(p12=ends[0], p13=ends[1]), stick=6, **NO_DOTS)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    length = math.dist(*ends)
    along = ((x - (ax + bx) / 2) * (bx - ax) + (y - (ay + by) / 2) * (by - ay)) / length
    across = ((x - (ax + bx) / 2) * (by - ay) - (y - (ay + by) / 2) * (bx - ax)) / length
    # Whole pixels, and whole degrees: a pixel at the ends.
    assert picture[(along / (length / 2 - 3)) ** 2 + (across / 4.5) ** 2 < 1].any(axis=1).all()
    assert not picture[(along / (length / 2 + 3)) ** 2 + (across / 8) ** 2 > 1].any()
    assert colors(picture) == {(0, int(0.6 * 85), int(0.6 * 255))}


def test_dots_lie_over_limbs():
    picture = drawn(pose(p12=(40, 40), p13=(100, 40), p18=(100, 80)), stick=2, body_dots=5)
    assert picture[40, 40].tolist() == [0, 0, 255] and picture[40, 45].tolist() == [0, 0, 255]
    assert picture[40, 70].tolist() == [0, 51, 153] and picture[40, 46].tolist() == [0, 51, 153]
    assert picture[40, 100].tolist() == [85, 0, 255], "the ankle"
    assert picture[80, 100].tolist() == [170, 255, 255], "the foot"
    assert picture[60, 100].tolist() == [153, 0, 51], "from ankle to foot"


def test_options_leave_out():
    whole = Pose(np.random.default_rng(0).uniform(0.1, 0.9, (62, 2)), np.ones(62, dtype=bool))
    body = {"head": False, "feet": False, "hands": False}
    assert len(colors(drawn(whole))) > 40
    assert len(colors(drawn(whole, stick=1, **body, **NO_DOTS))) == 12
    only = pose(p0=(40, 40), p1=(90, 40), p13=(40, 80), p18=(90, 80), p20=(20, 100), p21=(60, 100))
    head = {(0, 0, 153), (255, 0, 0), (255, 85, 0)}
    feet = {(153, 0, 51), (85, 0, 255), (170, 255, 255)}
    hands = {(255, 0, 0), (0, 0, 255)}
    nothing = {"body": False, **body}
    assert colors(drawn(only, **{**nothing, "head": True})) == head
    assert colors(drawn(only, **{**nothing, "feet": True})) == feet
    assert colors(drawn(only, **{**nothing, "hands": True})) == hands
    assert colors(drawn(only, **{**nothing, "hands": True, "hand_dots": 0})) == {(255, 0, 0)}
    # Neck and ankle belong to trunk and legs, too.
    assert colors(drawn(only, **body)) == {(255, 85, 0), (85, 0, 255)}
    assert not drawn(only, **nothing).any()


@pytest.mark.parametrize("hand", [LEFT_HAND, RIGHT_HAND])
def test_fingers_go_from_the_wrist_through_the_colors(hand):
    """Each of five fingers has four bones; their hues are those of the circle in twenty steps."""
    points, visible = np.zeros((62, 2)), np.zeros(62, dtype=bool)
    visible[hand] = True
    points[hand] = (10.5 / WIDTH, 60.5 / HEIGHT)
    for finger in range(5):
        for bone in range(4):
            points[hand.start + 1 + 4 * finger + bone] = ((40 + 25 * bone) / WIDTH, (15 + 22 * finger) / HEIGHT)
    picture = drawn(Pose(points, visible), hand_dots=0)
    for finger in range(5):
        for bone in range(1, 4):
            hue = np.array(colorsys.hsv_to_rgb((4 * finger + bone) / 20, 1, 1)) * 255
            assert abs(picture[15 + 22 * finger, 28 + 25 * bone] - hue).max() <= 1
        hue = np.array(colorsys.hsv_to_rgb(4 * finger / 20, 1, 1)) * 255
        assert abs(picture[(60 + 15 + 22 * finger) // 2, 25] - hue).max() <= 1
    assert (drawn(Pose(points, visible), hand_dots=3)[60, 13] == (0, 0, 255)).all()


def test_what_lies_outside_is_cut_off():
    picture = drawn(pose(p12=(-40, 60), p13=(40, 60)), stick=3, body_dots=2)
    assert picture[60, 0].any() and picture[60, 41].tolist() == [85, 0, 255]
    assert not drawn(pose(p12=(-90, 300), p13=(-40, 400))).any()
