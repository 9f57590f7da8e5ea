"""Colour methods against their published definitions, written out here a second time."""

import numpy as np
import pytest
import torch
from wanvideo_wrapper.multitalk.colormatch import METHODS, match_colors, reinhard


def colours(generator, shape=(48, 40, 3), low=0.25, high=0.75):
    """Smooth correlated colours well inside the cube, so that nothing is clipped."""
    mixed = generator.random(shape) @ (np.eye(3) + 0.5 * generator.random((3, 3)))
    mixed = (mixed - mixed.min()) / (mixed.max() - mixed.min())
    return low + mixed * (high - low)


@pytest.fixture
def pair():
    generator = np.random.default_rng(np.random.randint(2**31))
    return colours(generator), colours(generator, (30, 44, 3), 0.3, 0.6)


def alpha_beta(pixel):
    """Reinhard et al. 2001, equations 4 to 6, for one pixel."""
    red, green, blue = pixel
    long = np.log10(0.3811 * red + 0.5783 * green + 0.0402 * blue)
    middle = np.log10(0.1967 * red + 0.7244 * green + 0.0782 * blue)
    short = np.log10(0.0241 * red + 0.1288 * green + 0.8444 * blue)
    return (
        (long + middle + short) / np.sqrt(3),
        (long + middle - 2 * short) / np.sqrt(6),
        (long - middle) / np.sqrt(2),
    )


def test_reinhard_gives_mean_and_deviation_of_each_channel(pair):
    source, reference = pair
    got, want = (
        np.array([alpha_beta(pixel) for pixel in image.reshape(-1, 3)])
        for image in (reinhard(source, reference), reference)
    )
    np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-4)
    np.testing.assert_allclose(got.std(0), want.std(0), rtol=1e-3)


def affine_part(method, source, reference):
    """The matrix of an affine map, from where it puts black and the three primaries beside the source."""
    corners = np.concatenate((np.zeros((1, 3)), np.eye(3)))
    pixels = source.reshape(-1, 3)
    mapped = method(source, reference).reshape(-1, 3)
    design = np.concatenate((pixels, np.ones((len(pixels), 1))), axis=1)
    solution, residual, rank, _ = np.linalg.lstsq(design, mapped, rcond=None)
    assert rank == 4 and residual.max() < 1e-12 * len(pixels)
    placed = np.concatenate((corners, np.ones((4, 1))), axis=1) @ solution
    return (placed[1:] - placed[0]).T


@pytest.mark.parametrize("method", ["mkl", "mvgd"])
def test_gaussians_are_matched_by_the_symmetric_positive_map(method, pair):
    """mvgd, too: color-matcher 0.6.0 gave both alike when it was called as node packs call it."""
    matrix = affine_part(METHODS[method], *pair)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2).min() > 0


@pytest.mark.parametrize("method", ["hm", "hm-mvgd-hm", "hm-mkl-hm"])
def test_histogram_methods_end_with_the_reference_histogram(method, pair):
    source, reference = pair
    got = METHODS[method](source, reference)
    places = np.linspace(0.02, 0.98, 25)
    for channel in range(3):
        ours, theirs = (np.quantile(image[..., channel], places) for image in (got, reference))
        np.testing.assert_allclose(ours, theirs, atol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_frames_do_not_influence_each_other(method):
    images, reference = torch.rand(3, 20, 24, 3), torch.rand(16, 30, 3)
    together = match_colors(images, reference, method)
    alone = torch.cat([match_colors(image[None], reference, method) for image in images])
    assert torch.equal(together, alone) and not torch.equal(together, images)
    assert together.dtype == images.dtype


@pytest.mark.parametrize("method", METHODS)
def test_one_flat_colour_does_not_fail(method):
    flat = torch.full((1, 8, 8, 3), 0.4)
    got = match_colors(flat, torch.full((8, 8, 3), 0.6), method)
    torch.testing.assert_close(got, torch.full_like(flat, 0.6), atol=2e-3, rtol=0)
