"""Steps of this package's own solvers against float64 forms of what was published, on random latents and velocities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from wanvideo_wrapper.wanvideo.schedulers import Schedule, ScheduleSpec, make_schedule

Array = np.ndarray
SHAPE = (3, 2, 5, 4)
# A whole schedule, those that start late or near the end, and noise levels of one's own, which begin and end anywhere.
PARTS = [
    {"steps": 7}, {"steps": 30}, {"steps": 12, "start_step": 5}, {"steps": 30, "start_step": 28},
    {"steps": 9, "end_step": 6}, {"steps": 9, "sigmas": torch.tensor([0.97, 0.9, 0.6, 0.55, 0.2, 0.11, 0.03])},
]  # fmt: skip


class Recorded:
    """A run of a schedule along random velocities: start, the velocity and the noise of each step, the latents."""

    def __init__(self, schedule: Schedule) -> None:
        self.sigmas, self.total = schedule.sigmas.double().tolist(), schedule.total
        seed = int(torch.randint(2**31, ()))
        generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
        latents = torch.randn(SHAPE)
        self.start, self.velocities, self.found, self.noise = latents.double().numpy(), [], [], []
        for index in range(len(schedule)):
            velocity = torch.randn(SHAPE)
            latents = schedule.step(velocity, index, latents, generator)
            self.velocities.append(velocity.double().numpy())
            self.found.append(latents.double().numpy())
            self.noise.append(torch.randn(SHAPE, generator=again).double().numpy())

    def check(self, expected: Callable[[Recorded], Iterator[Array]]) -> None:
        for got, want in zip(self.found, expected(self), strict=True):
            assert float(np.abs(got - want).max()) < 3e-6 * max(1.0, float(np.abs(want).max()))


def recorded(name: str, steps: int, **options) -> Recorded:
    return Recorded(make_schedule(ScheduleSpec(name=name, steps=steps, shift=5.0, **options)))


def res(run: Recorded) -> Iterator[Array]:
    """The paper's second-order multistep scheme, with its phi functions and c2, over lambda = -log(sigma)."""
    x, before = run.start, None
    for v, sigma, after in zip(run.velocities, run.sigmas, run.sigmas[1:], strict=False):
        clean = x - sigma * v
        if after == 0:
            x = clean
        elif before is None:
            h = math.log(sigma) - math.log(after)
            x = math.exp(-h) * x + (1 - math.exp(-h)) * clean
        else:
            h, (old_sigma, old) = math.log(sigma) - math.log(after), before
            phi1 = (math.exp(-h) - 1) / -h
            phi2 = (math.exp(-h) + h - 1) / h**2
            c2 = (math.log(sigma) - math.log(old_sigma)) / h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * clean + phi2 / c2 * old)
        before = sigma, clean
        yield x


def phi(ratio: Array | float) -> Array | float:
    return ratio * (np.exp(ratio**0.3) + 10)


def er_sde(run: Recorded) -> Iterator[Array]:
    """The paper's VP solver of third order over lambda = sigma / alpha, with its integrals as sums of 100,000 parts."""
    x, past = run.start, []
    for v, z, s, t in zip(run.velocities, run.noise, run.sigmas, run.sigmas[1:], strict=False):
        clean, alpha = x - s * v, 1 - t
        if t == 0:
            yield clean
            return
        end, slope = t / alpha, 0.0
        if s == 1:
            # Its limit: lambda is infinite, so that no noise is kept and no slope counts.
            start, x = math.inf, alpha * clean + t * z
        else:
            start = s / (1 - s)
            r = phi(end) / phi(start)
            new = alpha / (1 - s) * r * x + alpha * (1 - r) * clean
            parts = np.geomspace(end, start, 100_001)
            if past:
                slope = (clean - past[-1][1]) / (start - past[-1][0])
                new = new + alpha * (end - start + phi(end) * np.trapezoid(1 / phi(parts), parts)) * slope
            if len(past) > 1:
                bend = (slope - past[-1][2]) / ((start - past[-2][0]) / 2)
                integral = np.trapezoid((parts - start) / phi(parts), parts)
                new = new + alpha * ((end - start) ** 2 / 2 + phi(end) * integral) * bend
            x = new + alpha * math.sqrt(end**2 - start**2 * r**2) * z
        past.append((start, clean, slope))
        yield x


def stable(run: Recorded) -> Iterator[Array]:
    """Adams-Bashforth with the order, the smoothing and the mean that belong to a noise level."""
    x, smooth = run.start, None
    for index, (sigma, after) in enumerate(zip(run.sigmas, run.sigmas[1:], strict=False)):
        v = [run.velocities[place] for place in range(index, max(index - 3, -1), -1)]
        many = run.total > 8
        mixed = v[0]
        if len(v) > 1:
            mixed = (3 * v[0] - v[1]) / 2
        if len(v) > 2 and many and 0.15 < sigma <= 0.7:
            mixed = (23 * v[0] - 16 * v[1] + 5 * v[2]) / 12
        if many and sigma < 0.15 and smooth is not None:
            mixed = 0.8 * smooth + 0.2 * mixed
        smooth = mixed
        if many and sigma < 0.05 and len(v) == 3:
            mixed = sigma / 0.05 * mixed + (1 - sigma / 0.05) * (v[0] + v[1] + v[2]) / 3
        x = x + (after - sigma) * mixed
        yield x


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "expected"), [("res_multistep", res), ("er_sde", er_sde), ("sa_ode_stable", stable)])
def test_steps_equal_the_published_form(name: str, expected: Callable, part: dict) -> None:
    recorded(name, **part).check(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rcm_steps_are_those_of_its_angles(steps: int) -> None:
    """The paper works with x = cos(t) clean + sin(t) noise; latents of flow matching are that over cos(t) + sin(t)."""
    angles = [math.atan(120), 1.5, 1.4, 1.0][:steps]

    def expected(run: Recorded) -> Iterator[Array]:
        x = run.start * (math.cos(angles[0]) + math.sin(angles[0]))
        for v, z, t, after in zip(run.velocities, run.noise, angles, [*angles[1:], 0.0], strict=True):
            size = math.cos(t) + math.sin(t)
            clean = x / size - math.sin(t) / size * v
            x = math.cos(after) * clean + math.sin(after) * z
            yield x / (math.cos(after) + math.sin(after))

    recorded("rcm", steps).check(expected)


def test_the_orders_of_the_solvers_are_seen() -> None:
    """Clean latents that are a line over the logarithm of the noise level are followed exactly; a solver of first
    order is far off."""
    slope, offset = torch.randn(2, *SHAPE, dtype=torch.float64)

    def clean(sigma: float) -> torch.Tensor:
        return offset - slope * math.log(sigma)

    def error(name: str) -> float:
        schedule = make_schedule(ScheduleSpec(name=name, steps=30, shift=5.0, end_step=25))
        sigmas = schedule.sigmas.double().tolist()
        x = torch.randn(SHAPE, dtype=torch.float64)
        for index, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            before, x = x, schedule.step((x - clean(sigma)) / sigma, index, x, torch.Generator()).double()
            # d x / d lambda = clean - x with lambda = -log(sigma), whose solution is clean - slope + c exp(-lambda).
            c = (before - clean(sigma) + slope) / sigma
            if index:
                worst = (x - (clean(after) - slope + c * after)).abs().max()
                assert name == "euler" or worst < 1e-5
        return float(worst)

    assert error("res_multistep") < 1e-5 < 1e-3 < error("euler")
