"""Colours of a picture made to match a reference, between the windows of a long video.

Sources: Reinhard et al. 2001 (statistics in the l-alpha-beta space); Pitie and Kokaram 2007 (mkl, the linear
Monge-Kantorovitch map); hm, histogram matching.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.float64]
Method = Callable[[Pixels, Pixels], Pixels]

TINY = 1e-8
LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
ALPHA_BETA = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]])


def _statistics(pixels: Pixels) -> tuple[Pixels, Pixels]:
    flat = pixels.reshape(-1, 3)
    return flat.mean(axis=0), np.cov(flat, rowvar=False) + TINY * np.eye(3)


def _root(matrix: Pixels) -> Pixels:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def mkl(source: Pixels, reference: Pixels) -> Pixels:
    """The linear map of least displacement that gives the reference's mean and covariance."""
    (source_mean, source_cov), (mean, cov) = _statistics(source), _statistics(reference)
    root = _root(source_cov)
    inverse = np.linalg.inv(root)
    transfer = inverse @ _root(root @ cov @ root) @ inverse
    return (source - source_mean) @ transfer.T + mean


def reinhard(source: Pixels, reference: Pixels) -> Pixels:
    """Mean and deviation of each channel of the l-alpha-beta space."""
    moved, target = (_to_alpha_beta(pixels) for pixels in (source, reference))
    axes = (0, 1)
    scale = target.std(axis=axes) / (moved.std(axis=axes) + TINY)
    return _from_alpha_beta((moved - moved.mean(axis=axes)) * scale + target.mean(axis=axes))


def _to_alpha_beta(rgb: Pixels) -> Pixels:
    return np.log10(np.maximum(rgb @ LMS.T, 1 / 255)) @ ALPHA_BETA.T


def _from_alpha_beta(values: Pixels) -> Pixels:
    return (10 ** (values @ np.linalg.inv(ALPHA_BETA).T)) @ np.linalg.inv(LMS).T


def reinhard_torch(source: Pixels, reference: Pixels) -> Pixels:
    """Mean and deviation of each channel of CIE L*a*b* (SkyReels V3's choice)."""
    from skimage.color import lab2rgb, rgb2lab

    moved, target = rgb2lab(source), rgb2lab(reference)
    axes = (0, 1)
    scale = target.std(axis=axes) / np.maximum(moved.std(axis=axes), TINY)
    return lab2rgb((moved - moved.mean(axis=axes)) * scale + target.mean(axis=axes))


def hm(source: Pixels, reference: Pixels) -> Pixels:
    """The histogram of each channel."""
    from skimage.exposure import match_histograms

    return match_histograms(source, reference, channel_axis=-1)


def _chain(*methods: Method) -> Method:
    def run(source: Pixels, reference: Pixels) -> Pixels:
        for method in methods:
            source = method(source, reference)
        return source

    return run


# mvgd is mkl, as node packs get it from the package color-matcher, whose own solution of it they never reach.
METHODS: dict[str, Method] = {
    "mkl": mkl,
    "hm": hm,
    "reinhard": reinhard,
    "reinhard_torch": reinhard_torch,
    "mvgd": mkl,
    "hm-mvgd-hm": _chain(hm, mkl, hm),
    "hm-mkl-hm": _chain(hm, mkl, hm),
}


def match_colors(images: Tensor, reference: Tensor, method: str) -> Tensor:
    """Images [n, H, W, 3] in 0..1, each matched to one reference [h, w, 3]; clipped. "disabled" changes nothing."""
    if method == "disabled":
        return images
    transfer = METHODS[method]
    target = reference.double().numpy()
    matched = [transfer(image.double().numpy(), target) for image in images]
    return torch.from_numpy(np.clip(np.stack(matched), 0, 1)).to(images.dtype)
