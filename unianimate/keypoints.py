"""Keypoints of the surest person in pictures, by DWPose, in the order of OpenPose.

Source: IDEA-Research/DWPose (onnxdet, onnxpose, wholebody; Apache-2.0) and mmpose, whose crops these are; the feet as
ali-vilab/UniAnimate-DiT has them (run_align_pose).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..fantasyportrait.warping import inverse, moved, warp
from ..wanvideo.onnx_models import Array, OnnxModels, Session
from .people import COLUMNS, letterbox, surest_person

MODELS = OnnxModels(
    "WanVideo UniAnimate DWPose Detector",
    ("yolox_l.onnx", "dw-ll_ucoco_384.onnx"),
    "the files of these names that yzd-v/DWPose publishes on Hugging Face",
)
# Width and height of a crop, and how much wider than the person's box it is.
CROP = np.array((288, 384))
PADDING = 1.25
# Of red, green and blue, in 0..255.
MEAN, DEVIATION = np.array((123.675, 116.28, 103.53)), np.array((58.395, 57.12, 57.375))
# Places that the network tells apart in one pixel of the crop.
PLACES = 2
WHOLE_BODY = 133
# Points of COCO-WholeBody whose mean each of these points is. OpenPose's body begins with nose, neck, right arm.
_ARMS = ((0,), (5, 6), (6,), (8,), (10,), (5,), (7,), (9,))
_LEGS = ((12,), (14,), (16,), (11,), (13,), (15,))
_HEAD = ((2,), (1,), (4,), (3,))
# The left and the right foot, between the toes.
_FEET = ((17, 18), (20, 21))
_HANDS = tuple((place,) for place in range(91, WHOLE_BODY))
SOURCES = (*_ARMS, *_LEGS, *_HEAD, *_FEET, *_HANDS)
BODY, LEFT_HAND, RIGHT_HAND = slice(0, 20), slice(20, 41), slice(41, 62)


class Pose(NamedTuple):
    """Body with feet, left and right hand of a person: points [62, 2] (x, y) as shares of the picture's width and
    height, and which of them are visible [62]. Those that are not have the network's guess.
    """

    points: Array
    visible: NDArray[np.bool_]


class PoseModels:
    """Both models. threshold: the score above which a point is visible."""

    def __init__(self, folder: Path, device: str, threshold: float) -> None:
        self._threshold = threshold
        self._people, self._keypoints = MODELS.open(folder, device, required=False)

    def poses(self, images: Tensor) -> list[Pose | None]:
        """The surest person of every image [N, H, W, 3] in 0..1; None where nobody is."""
        pictures = (images[..., :3].float().cpu() * 255).round().clamp(0, 255).byte()
        boxed, scale = letterbox(pictures)
        (predictions,) = _run(self._people, boxed, ((8400, COLUMNS),))
        boxes = [surest_person(prediction, scale) for prediction in predictions]
        people = [place for place, box in enumerate(boxes) if box is not None]
        poses: list[Pose | None] = [None] * len(boxes)
        if not people:
            return poses
        matrices = [crop_matrix(boxes[place]) for place in people]
        crops = [_crop(pictures[place].numpy(), matrix) for place, matrix in zip(people, matrices, strict=True)]
        sides = tuple((WHOLE_BODY, PLACES * int(side)) for side in CROP)
        across, down = _run(self._keypoints, np.stack(crops), sides)
        size = np.array((images.shape[2], images.shape[1]))
        for place, matrix, x, y in zip(people, matrices, across, down, strict=True):
            points, scores = decoded(x, y)
            poses[place] = ordered(moved(points, inverse(matrix)) / size, scores, self._threshold)
        return poses


def _run(session: Session, pictures: Array, shapes: tuple[tuple[int, int], ...]) -> list[Array]:
    """Outputs of these shapes for every picture; one by one where the network has a fixed batch."""
    port = session.get_inputs()[0]
    count = 1 if isinstance(port.shape[0], int) else len(pictures)
    parts = [session.run(None, {port.name: pictures[at : at + count]}) for at in range(0, len(pictures), count)]
    outputs = [np.concatenate(values) for values in zip(*parts, strict=True)]
    if tuple(output.shape[1:] for output in outputs) != shapes:
        raise ValueError(
            f"{MODELS.owner}: a model gave {[output.shape[1:] for output in outputs]} instead of {list(shapes)}, so "
            f"that {' or '.join(MODELS.names)} is another one: put there {MODELS.source}."
        )
    return outputs


def crop_matrix(box: Array) -> Array:
    """[2, 3]: from the picture to a crop around the middle of the box, which fits in with some room around it."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * PADDING
    scale = (CROP / size).min()
    return np.concatenate((scale * np.eye(2), (CROP / 2 - scale * middle)[:, None]), axis=1)


def _crop(picture: NDArray[np.uint8], matrix: Array) -> NDArray[np.float32]:
    crop = (warp(picture, matrix, (int(CROP[1]), int(CROP[0]))) - MEAN) / DEVIATION
    return crop.transpose(2, 0, 1).astype(np.float32)


def decoded(across: Array, down: Array) -> tuple[Array, Array]:
    """Points [133, 2] in pixels of the crop and scores [133], from how likely each column and each row is."""
    points = np.stack((across.argmax(axis=1), down.argmax(axis=1)), axis=1) / PLACES
    return points, np.minimum(across.max(axis=1), down.max(axis=1))


def ordered(points: Array, scores: Array, threshold: float) -> Pose:
    """The pose that 133 points of COCO-WholeBody show; a mean is visible where all of its points are."""
    means = np.array([points[list(source)].mean(axis=0) for source in SOURCES])
    return Pose(means, np.array([(scores[list(source)] > threshold).all() for source in SOURCES]))
