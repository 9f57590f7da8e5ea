"""Finding faces and their 222 landmarks, by the two ONNX models that FantasyPortrait is published with.

Detection is NanoDet's (distances to the four sides as distributions); landmarks come from a crop around the face, which
is cut three times, each time around the landmarks that were seen. Source: Fantasy-AMAP/fantasy-portrait (face_det,
face_align). Pictures are uint8 [H, W, 3] in the order blue, green, red, which the models were trained on. Points are
[n, 2] (x, y), boxes (left, top, right, bottom), all in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..wanvideo.onnx_models import Array, OnnxModels, Session
from .warping import inverse, moved, warp

Picture = NDArray[np.uint8]

MODELS = OnnxModels(
    "The face detector",
    ("face_det.onnx", "face_landmark.onnx"),
    "what the authors publish beside FantasyPortrait (acvlab/FantasyPortrait)",
)
# The detector reads pictures of this width and height.
DETECTOR_SIZE = (160, 272)
STRIDES = (8, 16, 32)
DISTANCES = 8
MEAN, DEVIATION = np.array([103.53, 116.28, 123.675]), np.array([57.375, 57.12, 58.395])
LEAST_SCORE, MOST_OVERLAP = 0.4, 0.3
CROP_SIZE = 128
# Share of the crop that is left around the face.
MARGIN = 0.15
CUTS = 3
EYE_CORNERS = (74, 96)


class Face(NamedTuple):
    """Landmarks of a face, how sure the model is, and where the head turns: pitch and yaw in degrees."""

    points: Array
    score: float
    pitch: float
    yaw: float


class FaceModels:
    """Both models, on the device that the node asks for."""

    def __init__(self, folder: Path, device: str) -> None:
        self._detector, self._landmarks = MODELS.open(folder, device)

    def boxes(self, picture: Picture) -> list[Array]:
        """Boxes of all faces, the surest first."""
        height, width = picture.shape[:2]
        wide, high = DETECTOR_SIZE
        scale = high / height if width / height < wide / high else wide / width
        matrix = np.array([[scale, 0, (wide - scale * width) / 2], [0, scale, (high - scale * height) / 2]])
        seen = (warp(picture, matrix, (high, wide)).astype(np.float32) - MEAN) / DEVIATION
        outputs = _run(self._detector, seen)
        boxes, scores = _decoded(outputs[: len(STRIDES)], outputs[len(STRIDES) :])
        corners = moved(boxes.reshape(-1, 2), inverse(matrix)).clip(0, (width, height))
        return list(_surest(np.trunc(corners).reshape(-1, 4), boxes, scores))

    def landmarks(self, picture: Picture, around: Array, angle: float = 0.0) -> Face:
        """Of the face that has these points, or two corners of its box; angle: of its eyes, in radians."""
        face = None
        for _ in range(CUTS):
            matrix = crop_matrix(around if face is None else face.points, angle)
            crop = warp(picture, matrix, (CROP_SIZE, CROP_SIZE))
            points, turned, score = _run(self._landmarks, crop.astype(np.float32) / 255)
            inside = points[0].reshape(2, -1).T.astype(np.float64) * CROP_SIZE
            # As the authors do: of the eyes within the crop, which is turned upright already.
            angle = eye_angle(inside)
            pitch, yaw = np.rad2deg(turned[0, :2])
            face = Face(moved(inside, inverse(matrix)), float(np.ravel(score)[0]), float(pitch), float(yaw))
        return face


def _run(session: Session, picture: Array) -> list[Array]:
    image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], dtype=np.float32)
    return session.run(None, {session.get_inputs()[0].name: image})


def eye_angle(points: Array) -> float:
    """Of the line through the outer corners of the eyes, in radians."""
    left, right = (points[place] for place in EYE_CORNERS)
    return float(np.arctan2(right[1] - left[1], right[0] - left[0] + 1e-8))


def crop_matrix(points: Array, angle: float) -> Array:
    """[2, 3]: from the picture to a crop in which the points, turned upright, fill all but the margin of a side."""
    cos, sin = np.cos(angle), np.sin(angle)
    upright = np.array([[cos, sin], [-sin, cos]])
    turned = points @ upright.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    scale = CROP_SIZE * (1 - MARGIN) / (high - low).max()
    offset = CROP_SIZE / 2 - scale * (low + high) / 2
    return np.concatenate((scale * upright, offset[:, None]), axis=1)


def _decoded(scores: list[Array], distributions: list[Array]) -> tuple[Array, Array]:
    """Boxes [n, 4] in the detector's picture, and scores [n]."""
    wide, high = DETECTOR_SIZE
    boxes = []
    for stride, values in zip(STRIDES, distributions, strict=True):
        y, x = np.mgrid[0 : -(-high // stride), 0 : -(-wide // stride)] * stride
        centers = np.stack((x.ravel(), y.ravel()), axis=1)
        logits = values.reshape(-1, 4, DISTANCES).astype(np.float64)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        sides = shares @ np.arange(DISTANCES) * stride
        boxes.append(np.concatenate((centers - sides[:, :2], centers + sides[:, 2:]), axis=1))
    return np.concatenate(boxes), np.concatenate([score.ravel() for score in scores])


def _surest(result: Array, boxes: Array, scores: Array) -> Array:
    """The results whose boxes are sure enough and lie over no surer one too much."""
    order = [place for place in np.argsort(-scores, kind="stable") if scores[place] > LEAST_SCORE]
    chosen: list[int] = []
    for place in order:
        if all(overlap(boxes[place], boxes[other]) <= MOST_OVERLAP for other in chosen):
            chosen.append(place)
    return result[chosen]


def overlap(one: Array, other: Array) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    union = np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared
    return float(shared / union) if shared > 0 else 0.0
