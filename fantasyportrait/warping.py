"""Pictures and points under affine maps: crops of faces.

A map is a matrix [2, 3]: (x, y) of the picture -> (x, y) of the result, both counted in pixels from the middle of the
first one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[np.floating]


def inverse(matrix: Array) -> Array:
    """The map back."""
    back = np.linalg.inv(matrix[:, :2])
    return np.concatenate((back, -back @ matrix[:, 2:]), axis=1)


def moved(points: Array, matrix: Array) -> Array:
    """Points [n, 2] under the map."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warp(picture: NDArray[np.uint8], matrix: Array, size: tuple[int, int], *, cubic: bool = False) -> NDArray[np.uint8]:
    """The picture [H, W, C] under the map, as [height, width, C]; black outside. cubic: a smoother interpolation."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    places = moved(np.stack((x.ravel(), y.ravel()), axis=1), inverse(matrix))
    # grid_sample counts in halves of the picture's sides, from the outer edges of its pixels.
    grid = (2 * places + 1) / (width, height) - 1
    values = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).double()[None]
    mode = "bicubic" if cubic else "bilinear"
    sampled = F.grid_sample(values, torch.from_numpy(grid.reshape(1, *size, 2)), mode=mode, align_corners=False)
    return sampled[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def similarity(points: Array, targets: Array) -> Array:
    """The map of turning, one scale and a shift that brings points [n, 2] nearest to the targets, in least squares.

    Source: Umeyama 1991; in the plane it is one complex number.
    """
    middle, target = points.mean(axis=0), targets.mean(axis=0)
    z, w = ((p - m) @ (1, 1j) for p, m in ((points, middle), (targets, target)))
    factor = (z.conj() @ w) / (z.conj() @ z).real
    turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.concatenate((turn, (target - turn @ middle)[:, None]), axis=1)
