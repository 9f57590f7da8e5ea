"""Poses of people in a video: what detectors give (socket NLFPRED), and pictures of it.

A detector gives {"joints3d_nonparam": [frames]}, each frame [people, 24, 3] in mm in front of the camera; the motion
tokenizer gives [frames, 24, 3]. The pictures follow DINGYANB/MTVCrafter (draw_pose) and, in the other style, SCAIL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .joints import JOINTS

# What NLF assumes of the camera, in degrees over the longer side.
FIELD_OF_VIEW = 55
# Sides of a stick in pixels for every so many pixels of height.
STICK_HEIGHT = 350
SEGMENTS = 72
Color = tuple[int, int, int]

# Limbs and their colors; joints of SMPL.
_LIMBS = (
    (15, 12), (12, 16), (16, 18), (18, 20), (20, 22), (12, 17), (17, 19), (19, 21), (21, 23), (12, 9), (9, 6), (6, 3),
    (3, 0), (0, 1), (1, 4), (4, 7), (7, 10), (0, 2), (2, 5), (5, 8), (8, 11),
)  # fmt: skip
_LIMB_COLORS: tuple[Color, ...] = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 85, 255), (255, 175, 0),
    (0, 0, 255), (255, 85, 0), (0, 255, 85), (255, 0, 255), (255, 0, 0), (0, 175, 255), (255, 255, 0), (0, 0, 255),
    (0, 255, 0),
)  # fmt: skip
_JOINT_COLORS: tuple[Color, ...] = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (255, 255, 0), (85, 255, 0), (0, 75, 255), (0, 255, 85),
    (0, 255, 170), (170, 0, 255), (85, 0, 255), (0, 85, 255), (0, 255, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170),
)  # fmt: skip
_HIDDEN = (13, 14)
_SCAIL: tuple[tuple[int, int, Color], ...] = (
    (15, 12, (180, 180, 180)), (12, 16, (0, 200, 255)), (16, 18, (0, 120, 255)), (18, 20, (0, 60, 255)),
    (20, 22, (60, 0, 255)), (12, 17, (255, 0, 0)), (17, 19, (255, 100, 0)), (19, 21, (255, 180, 0)),
    (21, 23, (255, 255, 0)), (12, 1, (30, 27, 160)), (1, 4, (73, 27, 177)), (4, 7, (145, 27, 194)),
    (12, 2, (200, 255, 100)), (2, 5, (54, 201, 52)), (5, 8, (30, 176, 85)),
)  # fmt: skip


def frames_of(poses: object) -> list[Tensor]:
    """[people, 24, 3] float32 on the CPU for every frame.

    Raises ValueError for what is no poses of 24 joints.
    """
    found = poses
    if isinstance(poses, Mapping):
        found = (poses.get("joints3d_nonparam") or [None])[0]
    if not isinstance(found, Tensor | Sequence) or isinstance(found, str) or not len(found):
        raise ValueError("These are no poses of an NLF model: connect the pose_results of NLF Predict.")
    frames = [torch.as_tensor(frame).detach().float().cpu() for frame in found]
    frames = [frame[None] if frame.dim() == 2 else frame for frame in frames]
    wrong = next((frame for frame in frames if frame.shape[0] and tuple(frame.shape[1:]) != (JOINTS, 3)), None)
    if wrong is not None:
        raise ValueError(f"Poses have {JOINTS} joints in three dimensions, but these have the shape {wrong.shape}.")
    return frames


def first_person(poses: object) -> Tensor:
    """[frames, 24, 3] of the first person. Raises ValueError, naming the frame, where nobody is there."""
    frames = frames_of(poses)
    empty = next((number for number, frame in enumerate(frames) if not frame.shape[0]), None)
    if empty is not None:
        raise ValueError(f"Nobody was found in frame {empty} of the pose video: trim it, or choose another.")
    return torch.stack([frame[0] for frame in frames])


def draw(
    poses: object, width: int, height: int, *, stick_width: float, point_radius: int, style: str
) -> Tensor:
    """Pictures [frames, height, width, 3] in 0..1 of the first person on black; black where nobody is."""
    stick = int(height / STICK_HEIGHT * stick_width)
    pictures = []
    for frame in frames_of(poses):
        picture = Image.new("RGB", (width, height))
        if frame.shape[0]:
            places = projected(frame[0], width, height).tolist()
            paint = _sticks if style == "scail" else _limbs
            paint(ImageDraw.Draw(picture), [(int(x), int(y)) for x, y in places], stick, point_radius)
        pictures.append(torch.from_numpy(np.array(picture)).float() / 255)
    return torch.stack(pictures)


def projected(joints: Tensor, width: int, height: int) -> Tensor:
    """Joints [24, 3] in front of the camera -> pixels [24, 2] of a picture of this size."""
    focal = max(width, height) / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    depth = torch.where(joints[:, 2:].abs() < 1e-6, 1e-6, joints[:, 2:])
    return joints[:, :2] * focal / depth + torch.tensor([width / 2, height / 2])


def _limbs(brush: ImageDraw.ImageDraw, places: Sequence[tuple[int, int]], stick: int, radius: int) -> None:
    """Joints as dots, and limbs as ellipses over them."""
    for number, place in enumerate(places):
        if number not in _HIDDEN:
            _dot(brush, place, radius, _JOINT_COLORS[number % len(_JOINT_COLORS)])
    for number, (one, other) in enumerate(_LIMBS):
        outline = _ellipse(places[one], places[other], stick)
        brush.polygon(outline, fill=_LIMB_COLORS[number % len(_LIMB_COLORS)])


def _sticks(brush: ImageDraw.ImageDraw, places: Sequence[tuple[int, int]], stick: int, radius: int) -> None:
    """Limbs as lines, and joints as dots in the color of their first limb over them."""
    colors: dict[int, Color] = {}
    for one, other, color in _SCAIL:
        brush.line((places[one], places[other]), fill=color, width=max(stick, 1))
        colors.setdefault(one, color)
        colors.setdefault(other, color)
    for joint, color in colors.items():
        _dot(brush, places[joint], radius, color)


def _dot(brush: ImageDraw.ImageDraw, place: tuple[int, int], radius: int, color: Color) -> None:
    x, y = place
    brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _ellipse(one: tuple[int, int], other: tuple[int, int], stick: int) -> list[tuple[float, float]]:
    """The outline of an ellipse from point to point, `stick` pixels to either side."""
    (ax, ay), (bx, by) = one, other
    half, angle = math.dist(one, other) / 2, math.atan2(by - ay, bx - ax)
    cos, sin = math.cos(angle), math.sin(angle)
    outline = []
    for step in range(SEGMENTS):
        turn = 2 * math.pi * step / SEGMENTS
        along, across = half * math.cos(turn), stick * math.sin(turn)
        outline.append(((ax + bx) / 2 + along * cos - across * sin, (ay + by) / 2 + along * sin + across * cos))
    return outline
