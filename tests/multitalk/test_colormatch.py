"""Colour methods by what defines them."""

import numpy as np
import pytest
import torch
from wanvideo_wrapper.multitalk.colormatch import METHODS, hm, match_colors, reinhard


def picture(seed, shape=(40, 50, 3)):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(3, 3)) * 0.1 + np.eye(3) * 0.1
    return generator.normal(size=shape) @ mixing + generator.uniform(0.3, 0.7, 3)


@pytest.mark.parametrize("method", ["mkl", "mvgd"])
def test_mean_and_covariance(method):
    source, reference = picture(1), picture(2, (30, 20, 3))
    got = METHODS[method](source, reference).reshape(-1, 3)
    want = reference.reshape(-1, 3)
    np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-8)
    np.testing.assert_allclose(np.cov(got, rowvar=False), np.cov(want, rowvar=False), atol=1e-6)


def test_histograms():
    source, reference = np.random.default_rng(0).random((64, 64, 3)), np.random.default_rng(1).beta(2, 5, (64, 64, 3))
    got = hm(source, reference)
    for channel in range(3):
        np.testing.assert_allclose(
            np.sort(got[..., channel].ravel()), np.sort(reference[..., channel].ravel()), atol=0.02
        )


def test_reinhard_of_itself_is_itself():
    source = np.random.default_rng(5).uniform(0.2, 0.8, (32, 32, 3))
    np.testing.assert_allclose(reinhard(source, source), source, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_clipped_and_disabled_is_identity(method):
    images, reference = torch.rand(3, 16, 16, 3), torch.rand(16, 16, 3)
    got = match_colors(images, reference, method)
    assert got.shape == images.shape and got.isfinite().all() and got.min() >= 0 and got.max() <= 1
    assert match_colors(images, reference, "disabled") is images
