"""Filters against loops over frequencies in Python floats; mixing against Fourier sums written out in float64."""

import math

import pytest
import torch
from wanvideo_wrapper.freeinit.frequencies import FILTERS, low_pass, mixed

FORMS = {
    "gaussian": lambda d2, s, n: math.exp(-d2 / (2 * s * s)),
    "butterworth": lambda d2, s, n: 1 / (1 + (d2 / (s * s)) ** n),
    "ideal": lambda d2, s, n: 1.0 if d2 <= 2 * s else 0.0,
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("spatial", "temporal", "order"), [(1.0, 1.0, 4), (0.25, 0.25, 4), (0.3, 0.7, 2)])
def test_filters(name, spatial, temporal, order):
    frames, height, width = 5, 6, 8
    mask = low_pass((frames, height, width), name, order=order, spatial=spatial, temporal=temporal)
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                where = (spatial / temporal * (2 * t / frames - 1), 2 * h / height - 1, 2 * w / width - 1)
                want = FORMS[name](sum(x * x for x in where), spatial, order)
                assert mask[t, h, w].item() == pytest.approx(want, rel=1e-6, abs=1e-30), (t, h, w)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("cutoffs", [(0.0, 1.0), (1.0, 0.0)])
def test_a_cutoff_of_zero_lets_nothing_through(name, cutoffs):
    assert not low_pass((3, 4, 4), name, order=4, spatial=cutoffs[0], temporal=cutoffs[1]).any()


def dft(size):
    """exp(-2 pi i k n / size) for the frequencies k - size // 2, in the order of a shifted spectrum."""
    k, n = torch.arange(size).double() - size // 2, torch.arange(size).double()
    return torch.exp(-2j * math.pi * torch.outer(k, n) / size)


@pytest.mark.parametrize("sizes", [(3, 4, 6), (5, 3, 4)])
def test_mixing(sizes):
    generator = torch.Generator().manual_seed(1)
    low, high = (torch.randn(2, *sizes, generator=generator) for _ in range(2))
    mask = torch.rand(sizes, generator=generator)
    axes = [dft(size) for size in sizes]

    def spectrum(video):
        return torch.einsum("ctij,at,bi,dj->cabd", video.to(torch.complex128), *axes)

    both = spectrum(low) * mask.double() + spectrum(high) * (1 - mask.double())
    want = torch.einsum("cabd,at,bi,dj->ctij", both, *(m.conj() for m in axes)) / math.prod(sizes)
    torch.testing.assert_close(mixed(low, high, mask).double(), want.real, rtol=1e-5, atol=1e-5)
    assert (mixed(low, high, mask) - low).abs().max() > 0.1
