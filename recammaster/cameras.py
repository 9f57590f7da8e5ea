"""Paths of a camera, and how ReCamMaster reads them.

Poses are camera-to-world matrices [4, 4] in centimetres, with the axes of Unreal Engine: x forward, y right, z up.
Source: KwaiVGI/ReCamMaster, whose ten test paths `path` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Pose = np.ndarray

CENTER = (3390.0, 1380.0, 240.0)
FRAMES = 81
# The authors' paths would end half a frame behind their last one.
SPAN = 80.5
PAN, TILT, ARC = 20.0, 10.0, 30.0
FORWARD, UPWARD = 200.0, 100.0
# How far away what `translate` and `arc` look at is.
DISTANCE = 400.0


class View(NamedTuple):
    """Place of a camera from CENTER in centimetres, and where it looks: yaw and pitch in degrees."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0


def _upward(height: float) -> View:
    """Above or below CENTER, looking at what is ahead of CENTER."""
    return View(z=height, pitch=math.degrees(math.atan2(-height, DISTANCE)))


def _sideward(part: float) -> View:
    """On the chord of an arc around what is ahead of CENTER, looking at that."""
    x = abs(part) * DISTANCE * (1 - math.cos(math.radians(ARC)))
    y = part * DISTANCE * math.sin(math.radians(ARC))
    return View(x=x, y=y, yaw=math.degrees(math.atan2(-y, DISTANCE - x)))


PATHS: Mapping[str, Callable[[float], View]] = {
    "pan_right": lambda part: View(yaw=PAN * part),
    "pan_left": lambda part: View(yaw=-PAN * part),
    "tilt_up": lambda part: View(pitch=TILT * part),
    "tilt_down": lambda part: View(pitch=-TILT * part),
    "zoom_in": lambda part: View(x=FORWARD * part),
    "zoom_out": lambda part: View(x=-FORWARD * part),
    "translate_up": lambda part: _upward(UPWARD * part),
    "translate_down": lambda part: _upward(-UPWARD * part),
    "arc_left": lambda part: _sideward(-part),
    "arc_right": lambda part: _sideward(part),
}


def path(name: str, frames: int) -> np.ndarray:
    """Every fourth pose [n, 4, 4] of the first `frames` of a path, in six digits as the authors give them.

    Raises ValueError for a video that is longer than their paths.
    """
    if frames > FRAMES:
        raise ValueError(
            f"The camera paths of ReCamMaster have {FRAMES} frames but the source video {frames}: shorten it, or use "
            "WanVideoReCamMasterGenerateOrbitCamera."
        )
    poses = np.stack([_pose(PATHS[name](frame / SPAN)) for frame in range(0, frames, 4)])
    return np.vectorize(lambda number: float(f"{number:.6g}"))(poses)


def orbit(frames: int, degrees: float) -> np.ndarray:
    """Every fourth pose [n, 4, 4] of a camera that turns by `degrees`, at a radius of one centimetre around CENTER."""
    angles = [math.radians(frame * degrees / max(frames - 1, 1)) for frame in range(0, frames, 4)]
    views = (View(x=-math.cos(a), y=-math.sin(a), yaw=math.degrees(a)) for a in angles)
    return np.stack([_pose(view) for view in views])


def _pose(view: View) -> Pose:
    """Columns: forward, right, up, place."""
    yaw, pitch = math.radians(view.yaw), math.radians(view.pitch)
    forward = (math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch))
    right = (-math.sin(yaw), math.cos(yaw), 0.0)
    up = (-math.cos(yaw) * math.sin(pitch), -math.sin(yaw) * math.sin(pitch), math.cos(pitch))
    place = (CENTER[0] + view.x, CENTER[1] + view.y, CENTER[2] + view.z)
    matrix = np.eye(4)
    matrix[:3] = np.column_stack((forward, right, up, place))
    return matrix


def viewed(pose: Pose) -> Pose:
    """With the axes of computer vision: right, down, forward."""
    turned = pose[:, [1, 2, 0, 3]].copy()
    turned[:3, 1] *= -1
    return turned


def relative_poses(poses: Sequence[Pose]) -> np.ndarray:
    """What the model reads [n, 12] float32: rotation and place in metres, by row, relative to the first camera."""
    cameras = np.stack([viewed(np.asarray(pose, dtype=np.float64)) for pose in poses])
    cameras[:, :3, 3] /= 100
    return (np.linalg.inv(cameras[0]) @ cameras)[:, :3].reshape(len(cameras), -1).astype(np.float32)
