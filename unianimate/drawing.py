"""Pictures of poses, in the colors of OpenPose, as UniAnimate was trained on: sticks, dots and hands on black.

Source: ali-vilab/UniAnimate-DiT (dwpose/util). Shapes are OpenCV's but for single pixels at their edges.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..fantasyportrait.drawing import disc
from ..wanvideo.onnx_models import Array
from .keypoints import LEFT_HAND, RIGHT_HAND, Pose

Color = tuple[int, int, int]
Place = tuple[int, int]

TRUNK = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13))
HEAD = ((1, 0), (0, 14), (14, 16), (0, 15), (15, 17))
FEET = ((13, 18), (10, 19))
LIMBS = (*TRUNK, *HEAD, *FEET)
# Of limbs and points by their numbers.
COLORS: tuple[Color, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85), (170, 255, 255), (255, 255, 0),
)  # fmt: skip
# Sticks are darker than dots.
SHADE = 0.6
FINGERS = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21))
FINGER_COLORS = tuple(
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number / len(FINGERS), 1, 1))
    for number in range(len(FINGERS))
)
HAND_DOTS: Color = (0, 0, 255)


@dataclass(frozen=True)
class Style:
    """What is drawn, and sizes in pixels: half the width of sticks, radius of dots (0: none)."""

    stick: int = 4
    body_dots: int = 4
    hand_dots: int = 4
    body: bool = True
    head: bool = True
    feet: bool = True
    hands: bool = True

    def draw(self, pose: Pose, width: int, height: int) -> NDArray[np.uint8]:
        """A picture [height, width, 3] of what is visible of the pose."""
        picture = Image.new("RGB", (width, height))
        pen = ImageDraw.Draw(picture)
        places = [(int(x), int(y)) for x, y in pose.points * (width, height)]
        groups = ((self.body, TRUNK), (self.head, HEAD), (self.feet, FEET))
        limbs = {limb for is_drawn, group in groups if is_drawn for limb in group}
        for limb, color in zip(LIMBS, COLORS, strict=False):
            if limb in limbs and pose.visible[list(limb)].all():
                ends = pose.points[list(limb)] * (width, height)
                pen.polygon(_ellipse(ends, self.stick), fill=tuple(int(SHADE * part) for part in color))
        for point in sorted({point for limb in limbs for point in limb}):
            if pose.visible[point]:
                _dot(pen, places[point], self.body_dots, COLORS[point])
        if self.hands:
            for hand in (LEFT_HAND, RIGHT_HAND):
                self._draw_hand(pen, places[hand], pose.visible[hand])
        return np.array(picture)

    def _draw_hand(self, pen: ImageDraw.ImageDraw, places: list[Place], visible: NDArray[np.bool_]) -> None:
        for (start, end), color in zip(FINGERS, FINGER_COLORS, strict=True):
            if visible[start] and visible[end]:
                # OpenCV's lines of thickness 2 are three pixels wide, with round ends.
                pen.line((places[start], places[end]), fill=color, width=3)
                for joint in (start, end):
                    _dot(pen, places[joint], 1, color)
        for place, is_visible in zip(places, visible, strict=True):
            if is_visible:
                _dot(pen, place, self.hand_dots, HAND_DOTS)


def _dot(pen: ImageDraw.ImageDraw, place: Place, radius: int, color: Color) -> None:
    if radius:
        pen.point([(place[0] + x, place[1] + y) for x, y in disc(radius)], fill=color)


def _ellipse(ends: Array, stick: int) -> list[Place]:
    """The outline of an ellipse from end to end, by whole pixels and degrees as OpenCV has it."""
    (ax, ay), (bx, by) = ends
    middle, half = ((int((ax + bx) / 2)), int((ay + by) / 2)), int(math.dist(*ends) / 2)
    angle = math.radians(int(math.degrees(math.atan2(ay - by, ax - bx))))
    turn = np.radians(np.arange(360))
    along, across = half * np.cos(turn), stick * np.sin(turn)
    x = middle[0] + along * math.cos(angle) - across * math.sin(angle)
    y = middle[1] + along * math.sin(angle) + across * math.cos(angle)
    return list(zip(x.round().astype(int).tolist(), y.round().astype(int).tolist(), strict=True))
