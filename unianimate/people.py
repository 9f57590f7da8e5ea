"""Where the surest person of a picture is, by YOLOX.

Source: Megvii-BaseDetection/YOLOX (letterbox, grid of three strides), in the form that IDEA-Research/DWPose publishes.
Pictures are uint8 [N, H, W, 3], red first; the network reads 0..255, blue first, as it was trained.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..wanvideo.onnx_models import Array

SIDE, GREY = 640, 114
STRIDES = (8, 16, 32)
LEAST_SCORE = 0.3
# Columns of a prediction: middle, logarithm of the size, objectness, and COCO's 80 classes, people first.
OBJECT, PERSON, COLUMNS = 4, 5, 85


def letterbox(pictures: Tensor) -> tuple[NDArray[np.float32], float]:
    """[N, 3, 640, 640] with the pictures at the upper left, and how much smaller they are there."""
    height, width = pictures.shape[1:3]
    scale = min(SIDE / height, SIDE / width)
    size = max(int(height * scale), 1), max(int(width * scale), 1)
    small = F.interpolate(pictures.permute(0, 3, 1, 2).float(), size, mode="bilinear", align_corners=False).round()
    boxed = F.pad(small.flip(1), (0, SIDE - size[1], 0, SIDE - size[0]), value=GREY)
    return boxed.contiguous().numpy(), scale


def surest_person(predictions: Array, scale: float) -> Array | None:
    """Box (left, top, right, bottom) in pixels from predictions [8400, 85] of one picture; None if nobody is there.

    Suppression of overlapping boxes begins with the surest one and always keeps it. As no other box is read, it is the
    result without that.
    """
    scores = predictions[:, OBJECT] * predictions[:, PERSON]
    best = int(scores.argmax())
    if not scores[best] > LEAST_SCORE:
        return None
    column, row, stride = _cells()[best]
    middle = (predictions[best, :2] + (column, row)) * stride
    half = np.exp(predictions[best, 2:4].astype(np.float64)) * stride / 2
    return np.concatenate((middle - half, middle + half)) / scale


@cache
def _cells() -> NDArray[np.int64]:
    """Column, row and stride of every prediction."""
    cells = []
    for stride in STRIDES:
        rows, columns = np.mgrid[: SIDE // stride, : SIDE // stride]
        cells.append(np.stack((columns.ravel(), rows.ravel(), np.full(rows.size, stride)), axis=1))
    return np.concatenate(cells)
