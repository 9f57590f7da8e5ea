"""Paths of a camera as poses of CameraCtrl, one a frame (AnimateDiff-Evolved).

A pose: time, fx, fy, cx, cy (shares of width and height), width and height of the picture that these are for, and the
three rows of a world-to-camera matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...node_tools import Inputs

Poses = list[list[float]]

# Angles and shift in FRAMES frames at speed 1.
FRAMES, ANGLE, SHIFT = 16, math.pi / 3, 1.5
LENS = (0.0, 0.474812461, 0.844111024, 0.5, 0.5, 1280, 720)
STATIC = "Static"
# Rotation about and shift along the axes to the right, down and into the picture.
MOTIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    STATIC: ((0, 0, 0), (0, 0, 0)),
    "Pan Up": ((0, 0, 0), (0, 1, 0)),
    "Pan Down": ((0, 0, 0), (0, -1, 0)),
    "Pan Left": ((0, 0, 0), (1, 0, 0)),
    "Pan Right": ((0, 0, 0), (-1, 0, 0)),
    "Zoom In": ((0, 0, 0), (0, 0, -2)),
    "Zoom Out": ((0, 0, 0), (0, 0, 2)),
    "Roll Clockwise": ((0, 0, -1), (0, 0, 0)),
    "Roll Anticlockwise": ((0, 0, 1), (0, 0, 0)),
    "Tilt Down": ((1, 0, 0), (0, 0, 0)),
    "Tilt Up": ((-1, 0, 0), (0, 0, 0)),
    "Tilt Left": ((0, 1, 0), (0, 0, 0)),
    "Tilt Right": ((0, -1, 0), (0, 0, 0)),
}
MOTION = (list(MOTIONS), {"default": STATIC})
SPEED = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})
LENGTH = ("INT", {"default": 16, "min": 1})
FOLLOWS = {"optional": {"prev_poses": ("CAMERACTRL_POSES",)}}


class CameraPoseBasic:
    """A camera that moves in one way, behind another path where there is one (ADE_CameraPoseBasic)."""

    FUNCTION = "camera_pose_basic"
    RETURN_TYPES = ("CAMERACTRL_POSES",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"motion_type": MOTION, "speed": SPEED, "frame_length": LENGTH}, **FOLLOWS}

    def camera_pose_basic(
        self, motion_type: str, speed: float, frame_length: int, prev_poses: Poses | None = None
    ) -> tuple[Poses]:
        """A pose a frame; those of prev_poses come first."""
        return (_path([motion_type], speed, frame_length, prev_poses or []),)


class CameraPoseCombo:
    """A camera that moves in up to six ways at once (ADE_CameraPoseCombo)."""

    FUNCTION = "camera_pose_combo"
    RETURN_TYPES = ("CAMERACTRL_POSES",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        motions = {f"motion_type{number}": MOTION for number in range(1, 7)}
        return {"required": {**motions, "speed": SPEED, "frame_length": LENGTH}, **FOLLOWS}

    def camera_pose_combo(
        self, speed: float, frame_length: int, prev_poses: Poses | None = None, **motions: str
    ) -> tuple[Poses]:
        """A pose a frame; those of prev_poses come first."""
        return (_path(list(motions.values()), speed, frame_length, prev_poses or []),)


def _path(names: Sequence[str], speed: float, frames: int, before: Poses) -> Poses:
    """Poses of the sum of the motions; from the last pose of `before` on, if there is one, seen from where it is."""
    turn, shift = (torch.tensor([MOTIONS[name][part] for name in names]).double().sum(0) for part in (0, 1))
    poses = [*before]
    for frame in range(frames):
        share = frame / FRAMES * speed
        rotation, place = _rotation(turn * share * ANGLE), shift * share * SHIFT
        if before:
            last = torch.tensor(before[-1][7:], dtype=torch.float64).view(3, 4)
            rotation = rotation @ last[:, :3]
            place = place + rotation @ last[:, :3].T @ last[:, 3]
        poses.append([*LENS, *torch.cat((rotation, place[:, None]), dim=1).flatten().tolist()])
    return poses


def _rotation(angles: Tensor) -> Tensor:
    """About the first axis, then the second, then the third."""
    x, y, z = (torch.stack([angle.cos(), angle.sin()]).tolist() for angle in angles)
    about_x = torch.tensor([[1, 0, 0], [0, x[0], -x[1]], [0, x[1], x[0]]], dtype=torch.float64)
    about_y = torch.tensor([[y[0], 0, y[1]], [0, 1, 0], [-y[1], 0, y[0]]], dtype=torch.float64)
    about_z = torch.tensor([[z[0], -z[1], 0], [z[1], z[0], 0], [0, 0, 1]], dtype=torch.float64)
    return about_z @ about_y @ about_x


NODE_CLASS_MAPPINGS = {"ADE_CameraPoseBasic": CameraPoseBasic, "ADE_CameraPoseCombo": CameraPoseCombo}
