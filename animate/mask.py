"""The face of one person of a video as a mask, from keypoints in OpenPose's form.

Keypoints are doubtful where a detector lost the face: such frames get an empty mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Points = NDArray[np.float64]

# The first points of a face go along its outline, from ear to ear.
OUTLINE = 17
# Pixels at the edge, where a detector puts what it does not see.
MARGIN, MOST_IN_CORNER = 5, 3
# Parts of the picture: the longest side of a face, and its least and largest area.
LONGEST, SMALLEST, LARGEST = 0.8, 0.001, 0.5


class Face(NamedTuple):
    """points [n, 2] in pixels, and their mean."""

    points: Points
    center: Points


def face_masks(frames: Sequence[Mapping[str, object]], person: int) -> Tensor:
    """[frames, height, width] float32, 1 inside the outline of the face.

    frames: POSE_KEYPOINT, with canvas_width, canvas_height and people. person: whose face, counted among those that
    have one in the first frame; later frames take the face next to the last one seen. Without any frame the mask is
    empty, 64x64.
    """
    masks, center = [], None
    for number, frame in enumerate(frames):
        faces = _faces(frame)
        face = None
        if faces and number == 0:
            face = faces[person] if person < len(faces) else faces[0]
        elif faces:
            face = faces[0] if center is None else min(faces, key=lambda f: float(np.linalg.norm(f.center - center)))
        center = None if face is None else face.center
        masks.append(_mask(face, int(frame["canvas_width"]), int(frame["canvas_height"])))
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(1, 64, 64)


def _faces(frame: Mapping[str, object]) -> list[Face]:
    faces = []
    for person in frame["people"]:
        points = np.asarray(person.get("face_keypoints_2d") or (), dtype=np.float64)
        points = points[: len(points) // 3 * 3].reshape(-1, 3)[:, :2]
        if len(points) and points.any() and np.isfinite(points.mean(axis=0)).all():
            faces.append(Face(points, points.mean(axis=0)))
    return faces


def _mask(face: Face | None, width: int, height: int) -> NDArray[np.float32]:
    canvas = Image.new("L", (width, height))
    if face is not None and len(face.points) >= OUTLINE and _is_seen(face.points):
        whole = face.points.astype(np.int32).clip(0, (width - 1, height - 1))
        outline = whole[:OUTLINE]
        size = np.ptp(outline, axis=0) / (width, height)
        if size.max() <= LONGEST and SMALLEST <= _area(outline) / (width * height) <= LARGEST:
            ImageDraw.Draw(canvas).polygon([tuple(map(int, point)) for point in outline], fill=255, outline=255)
    return np.asarray(canvas, dtype=np.float32) / 255


def _is_seen(points: Points) -> bool:
    in_corner = (points < MARGIN).all(axis=1).sum()
    return bool((points >= 0).all() and in_corner <= MOST_IN_CORNER)


def _area(outline: NDArray[np.int32]) -> float:
    """Of a polygon, by the shoelace formula."""
    x, y = outline.astype(np.float64).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
