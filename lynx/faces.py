"""The two crops of a face that Lynx reads, by five landmarks (eyes, nose, corners of the mouth).

Source of the template: ArcFace (insightface); bytedance/lynx (modules/common/face_utils) for the wider crop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Where the landmarks of an aligned face lie in 112x112 pixels.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TEMPLATE_SIZE = 112
IP_SIZE, REF_SIZE = 112, 256
# The wider crop: lower, and smaller around the middle.
WIDE_SHIFT, WIDE_RATIO = 10.0, 0.8
DETECTOR_SIZE = (640, 640)


class Crops(NamedTuple):
    """ip [112, 112, 3] for the identity, ref [256, 256, 3] for the picture; 0..1."""

    ip: Tensor
    ref: Tensor


def landmarks_of(picture: Tensor) -> NDArray[np.floating]:
    """Landmarks [5, 2] of the largest face of a picture [H, W, 3] in 0..1, by insightface.

    Raises ValueError where the package is missing, or no face is found.
    """
    try:
        from insightface.app import FaceAnalysis
    except ImportError:
        raise ValueError(
            "Lynx InsightFace Crop needs the package insightface, which is not installed: install it, or crop the face "
            "by hand to 112x112 for ip_image and 256x256 for ref_image."
        ) from None
    detector = FaceAnalysis()
    detector.prepare(ctx_id=0, det_size=DETECTOR_SIZE)
    faces = detector.get((picture.cpu().numpy() * 255).astype(np.uint8))
    if not faces:
        raise ValueError("No face was found in the picture: choose one that shows it from the front.")
    return max(faces, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1])).kps


def crops(picture: Tensor, landmarks: NDArray[np.floating]) -> Crops:
    """Both crops of a picture [H, W, 3] in 0..1, turned upright and stretched to the whole range of brightness."""
    wide = (TEMPLATE + [0.0, WIDE_SHIFT] - TEMPLATE_SIZE / 2) * WIDE_RATIO + TEMPLATE_SIZE / 2
    # 256 is a multiple of 128, whose template is that of 112 with eight pixels to the left.
    ratio = REF_SIZE / 128
    return Crops(
        _aligned(picture, landmarks, TEMPLATE, IP_SIZE),
        _aligned(picture, landmarks, wide * ratio + [8.0 * ratio, 0.0], REF_SIZE),
    )


def _aligned(picture: Tensor, landmarks: NDArray[np.floating], target: NDArray[np.floating], size: int) -> Tensor:
    from skimage.transform import warp

    turn, shift = _similarity(np.asarray(landmarks, dtype=np.float64), target)
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag], [0, 0, 1]])
    pixels = picture.cpu().double().numpy()
    face = torch.from_numpy(warp(pixels, np.linalg.inv(matrix), output_shape=(size, size), order=1)).float()
    low, high = face.min(), face.max()
    return (face - low) / (high - low).clamp(min=1 / 255)


def _similarity(points: NDArray[np.floating], target: NDArray[np.floating]) -> tuple[complex, complex]:
    """Turn and scale, and shift, that bring points [n, 2] nearest to the target: w = turn * z + shift."""
    z, w = (p[:, 0] + 1j * p[:, 1] for p in (points, target))
    away = z - z.mean()
    turn = (away.conj() * (w - w.mean())).sum() / (abs(away) ** 2).sum()
    return turn, w.mean() - turn * z.mean()
