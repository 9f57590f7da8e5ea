"""Sigma grids against closed forms and published schedulers; solvers on a flow whose solution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from scipy import integrate, special
from wanvideo_wrapper.wanvideo.schedulers import SCHEDULERS, ScheduleSpec, available, make_schedule

DETERMINISTIC = [
    "unipc", "unipc/beta", "dpm++", "dpm++/beta", "euler", "euler/beta", "deis", "flowmatch_pusa", "multitalk",
    "res_multistep", "sa_ode_stable",
]  # fmt: skip
FIRST_ORDER = [
    "euler", "euler/beta", "flowmatch_pusa", "multitalk", "lcm", "lcm/beta", "longcat_distill_euler",
    "flowmatch_causvid", "rcm", "vibt_unipc",
]  # fmt: skip
STOCHASTIC = {"dpm++_sde", "dpm++_sde/beta", "lcm", "lcm/beta", "er_sde", "rcm", "vibt_unipc"}
FIXED = {"flowmatch_distill", "flowmatch_causvid"}


def spec(name: str, steps: int = 8, **options) -> ScheduleSpec:
    return ScheduleSpec(**{"name": name, "steps": steps_of(name, steps), "shift": 5.0, **options})


def steps_of(name: str, steps: int) -> int:
    """Where these distilled models have no more."""
    return 4 if name in ("flowmatch_distill", "rcm") else steps


def shift_of(sigma: float, shift: float) -> float:
    return 1.0 / (1.0 + (1.0 / sigma - 1.0) / shift) if sigma > 0 else 0.0


def expected(name: str, steps: int, shift: float) -> list[float]:
    """Scalar float64 forms, written from the published definitions."""
    if name == "deis":
        return [shift_of(0.999 * (1 - i / steps), shift) for i in range(steps)]
    if name == "unipc" or name.startswith("dpm++"):
        return [shift_of(shift_of(0.999, shift) * (1 - i / steps), shift) for i in range(steps)]
    if name == "flowmatch_pusa":
        return [shift_of(1 - i / steps, shift) for i in range(steps)]
    if name == "multitalk":
        return [shift_of((1000 - 999 * i / max(steps - 1, 1)) / 1000, shift) for i in range(steps)]
    if name == "flowmatch_distill":
        return [shift_of(s, shift) for s in (0.999, 0.75, 0.5, 0.25)]
    if name == "flowmatch_causvid":
        return [t / 1000 for t in (999, 934, 862, 756, 603, 410, 250, 140, 74)[:steps]]
    if name == "rcm":
        return [tangent / (1 + tangent) for tangent in (120, math.tan(1.5), math.tan(1.4), math.tan(1))]
    if name in ("res_multistep", "er_sde"):
        return [shift_of(1 - round(1000 * i / steps) / 999 * (1 - 0.003 / 1.002), shift) for i in range(steps)]
    if name == "sa_ode_stable":
        parts = [i / steps for i in range(steps)]
        return [shift_of(1 - t if steps <= 10 else math.cos(math.pi * t / 2) ** 2, shift) for t in parts]
    if name == "vibt_unipc":
        return [(int(1000 * shift_of(0.999 * (1 - i / steps), shift) + 1e-9) + 1) / 1000 for i in range(steps)]
    if name == "longcat_distill_euler":
        return [shift_of((1000 - 20 * int(50 * i / steps)) / 1000, shift) for i in range(steps)]
    low = shift_of(0.001, shift)
    return [shift_of(1 - (1 - low) * i / max(steps - 1, 1), shift) for i in range(steps)]


def test_option_list_is_that_of_the_node() -> None:
    import json
    from pathlib import Path

    nodes = json.loads((Path(__file__).parents[1] / "data/node_interfaces.json").read_text())
    inputs = nodes["WanVideoSampler"]["inputs"]["required"]
    assert list(SCHEDULERS) == next(options for name, options, _ in inputs if name == "scheduler")
    assert available() == SCHEDULERS


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.endswith("/beta")])
@pytest.mark.parametrize(("steps", "shift"), [(7, 1.0), (9, 3.0), (7, 8.0)])
def test_sigmas_equal_the_published_form(name: str, steps: int, shift: float) -> None:
    steps = steps_of(name, steps)
    schedule = make_schedule(spec(name, steps, shift=shift))
    want = expected(name, steps, shift)
    np.testing.assert_allclose(schedule.sigmas.double().numpy(), [*want, 0.0], rtol=0, atol=6e-8)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == torch.float32
    whole = name in ("unipc", "deis") or name.startswith("dpm++")
    # A step of ViBT ends at its time, which other steps begin with.
    timesteps = [1000 * s - (name == "vibt_unipc") for s in want]
    if whole:
        # 0.9999999 and 1.0000001 of a whole number are the same sigma; both roundings of it are right.
        assert all(min(abs(t - math.floor(w + e)) for e in (-1e-9, 1e-9)) == 0
                   for t, w in zip(schedule.timesteps.tolist(), timesteps, strict=True))  # fmt: skip
    else:
        np.testing.assert_allclose(schedule.timesteps.double().numpy(), timesteps, rtol=1e-6)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_whole_timesteps_stay_whole(name: str) -> None:
    """0.999 in 32 bits lies above it, so that no timestep falls to the whole number below."""
    timesteps = make_schedule(spec(name, 9, shift=1.0)).timesteps
    assert timesteps.tolist() == [999 - 111 * i for i in range(9)]


def test_a_finer_tail_begins_at_half_of_the_whole_timesteps() -> None:
    whole = make_schedule(spec("unipc", 10, shift=2.0)).timesteps
    schedule = make_schedule(spec("unipc", 10, shift=2.0, enhance_hf=True))
    half = whole[0] / 2
    want = torch.cat([whole[whole > half], half * torch.tensor([1, 2 / 3, 1 / 3])])
    torch.testing.assert_close(schedule.timesteps, want)
    torch.testing.assert_close(schedule.sigmas[:-1], want / 1000)
    assert want[-1] % 1 > 0.01


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_more_steps_of_the_settling_solver_are_a_cosine(shift: float) -> None:
    sigmas = make_schedule(spec("sa_ode_stable", 23, shift=shift)).sigmas.double().numpy()
    np.testing.assert_allclose(sigmas[:-1], expected("sa_ode_stable", 23, shift), rtol=0, atol=6e-8)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.endswith("/beta")])
def test_beta_grids_invert_the_beta_distribution(name: str) -> None:
    steps, shift = 9, 5.0
    base = expected(name.removesuffix("/beta"), steps, shift)
    sigmas = make_schedule(spec(name, steps, shift=shift)).sigmas.double().numpy()[:-1]
    places = (sigmas - base[-1]) / (base[0] - base[-1])
    quantiles = special.betainc(0.6, 0.6, np.clip(places, 0, 1))
    np.testing.assert_allclose(quantiles, 1 - np.arange(steps) / (steps - 1), atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("beta", [False, True])
def test_euler_and_lcm_grids_equal_diffusers(steps: int, beta: bool) -> None:
    for name, published in (("euler", FlowMatchEulerDiscreteScheduler), ("lcm", FlowMatchLCMScheduler)):
        other = published(shift=6.0, use_beta_sigmas=beta)
        other.set_timesteps(steps)
        schedule = make_schedule(spec(name + "/beta" * beta, steps, shift=6.0))
        torch.testing.assert_close(schedule.sigmas, other.sigmas, rtol=0, atol=2e-7)
        torch.testing.assert_close(schedule.timesteps, other.timesteps, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("steps", "shift"), [(10, 5.0), (9, 1.0), (27, 1.0)])
def test_deis_grid_equals_diffusers(steps: int, shift: float) -> None:
    other = DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    other.set_timesteps(steps)
    schedule = make_schedule(spec("deis", steps, shift=shift))
    torch.testing.assert_close(schedule.sigmas[:-1], other.sigmas[:-1])
    assert schedule.timesteps.tolist() == other.timesteps.tolist()


def test_a_name_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'ddim' is not available.*unipc, unipc/beta, dpm.*vibt_unipc"):
        make_schedule(spec("ddim"))


# The probability flow from N(0, 1) noise to a Gaussian N(MEAN, SPREAD**2) target, x_sigma = (1 - sigma) x0 + sigma e,
# is x_sigma = (1 - sigma) MEAN + s(sigma) z with s**2 = (1 - sigma)**2 SPREAD**2 + sigma**2.
MEAN, SPREAD = 1.5, 0.4


def spread_at(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def gaussian_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    s = spread_at(sigma)
    growth = (sigma - (1 - sigma) * SPREAD**2) / s**2
    return -MEAN + growth * (x - (1 - sigma) * MEAN)


def test_the_flow_is_what_its_closed_form_says() -> None:
    z = 0.7

    def slope(sigma: float, x: np.ndarray) -> np.ndarray:
        return gaussian_velocity(torch.tensor(x), float(sigma)).numpy()

    moved = integrate.solve_ivp(slope, (1.0, 0.0), [z], rtol=1e-10, atol=1e-12)
    assert moved.y[0, -1] == pytest.approx(MEAN + SPREAD * z, abs=1e-7)


def run_flow(schedule, seed: int = 0, cells: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 2, cells, cells, generator=generator)
    first = float(schedule.sigmas[0])
    x = (1 - first) * MEAN + spread_at(first) * z
    for index in range(len(schedule)):
        x = schedule.step(gaussian_velocity(x, float(schedule.sigmas[index])), index, x, generator)
    return x, z


def flow_error(name: str, steps: int) -> float:
    x, z = run_flow(make_schedule(spec(name, steps)), cells=4)
    return float((x - (MEAN + SPREAD * z)).abs().max())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_solvers_converge_to_the_exact_solution(name: str) -> None:
    # What settles converges late: it lags behind by steps.
    steps = 160 if name == "sa_ode_stable" else 40
    coarse, fine = flow_error(name, steps), flow_error(name, 4 * steps)
    assert fine < 0.05 and fine < coarse / 2.5


@pytest.mark.parametrize("name", ["unipc", "dpm++", "deis", "res_multistep"])
def test_multistep_solvers_beat_euler(name: str) -> None:
    assert flow_error(name, 40) < flow_error("multitalk", 40) / 2


@pytest.mark.parametrize("name", ["dpm++_sde", "dpm++_sde/beta", "er_sde"])
def test_sde_solver_reaches_the_target_distribution(name: str) -> None:
    x, _ = run_flow(make_schedule(spec(name, 60)))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.08)


@pytest.mark.parametrize("name", ["lcm", "flowmatch_distill", "flowmatch_causvid", "rcm"])
def test_consistency_steps_land_on_the_prediction(name: str) -> None:
    """A velocity that always points at one clean video brings every start there, in any number of steps."""
    schedule = make_schedule(spec(name, 4))
    generator = torch.Generator().manual_seed(3)
    target, x = torch.randn(2, 3, 2, 4, 4, generator=generator).unbind(0)
    for index, sigma in enumerate(schedule.sigmas[:-1]):
        x = schedule.step((x - target) / sigma, index, x, generator)
    torch.testing.assert_close(x, target, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_comes_from_the_generator(name: str) -> None:
    schedule, start = make_schedule(spec(name, 6)), torch.randn(2, 2, 3, 3)

    def run(seed: int) -> torch.Tensor:
        plan, x, generator = schedule.fresh(), start, torch.Generator().manual_seed(seed)
        for index in range(len(plan)):
            x = plan.step(gaussian_velocity(x, float(plan.sigmas[index])), index, x, generator)
        return x

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_can_run_again_and_repeats(name: str) -> None:
    schedule = make_schedule(spec(name, 6))
    once, _ = run_flow(schedule, seed=5, cells=2)
    with pytest.raises(ValueError, match="fresh"):
        schedule.step(once, 0, once, torch.Generator())
    again, _ = run_flow(schedule.fresh(), seed=5, cells=2)
    assert torch.isfinite(once).all()
    torch.testing.assert_close(once, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "part",
    [{"denoise_strength": 0.5}, {"start_step": 1, "end_step": 3}, {"start_step": 0.9, "end_step": 0.3},
     {"enhance_hf": True}],
)  # fmt: skip
def test_every_schedule_runs_in_part(name: str, part: dict) -> None:
    """The velocity always points away from one video: nothing else is left where the noise ends."""
    whole, schedule = make_schedule(spec(name)), make_schedule(spec(name, **part))
    if "enhance_hf" not in part:
        first, last = schedule.first_index, schedule.first_index + len(schedule)
        assert len(schedule) < len(whole) and torch.equal(schedule.sigmas, whole.sigmas[first : last + 1])
    clean, x = torch.randn(2, 2, 2, 8, 8).unbind(0)
    for index, sigma in enumerate(schedule.sigmas[:-1].tolist()):
        x = schedule.step((x - clean) / sigma, index, x, torch.Generator().manual_seed(index))
    assert x.isfinite().all() and float((x - clean).std()) < 4 * float(schedule.sigmas[-1]) + 1e-5


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("boundary", [3, 0.8])
def test_split_run_equals_single_run(name: str, boundary: float) -> None:
    start = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))

    def run(schedules) -> torch.Tensor:
        x, generator = start, torch.Generator().manual_seed(2)
        for schedule in schedules:
            for index in range(len(schedule)):
                x = schedule.step(gaussian_velocity(x, float(schedule.sigmas[index])), index, x, generator)
        return x

    whole = make_schedule(spec(name))
    first = make_schedule(spec(name, end_step=boundary))
    second = make_schedule(spec(name, start_step=boundary))
    assert len(first) > 0 and len(second) > 0 and len(first) + len(second) == len(whole)
    assert second.first_index == len(first) and first.sigmas[-1] == second.sigmas[0]
    assert first.total == second.total == len(whole)
    torch.testing.assert_close(run([first, second]), run([whole]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "deis", "res_multistep", "sa_ode_stable"])
def test_multistep_split_stays_close(name: str) -> None:
    """History starts anew at the split, which costs accuracy there but nothing else."""
    start = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    x = start
    for options in ({"end_step": 60}, {"start_step": 60}):
        schedule = make_schedule(spec(name, 160, **options))
        for index in range(len(schedule)):
            x = schedule.step(gaussian_velocity(x, float(schedule.sigmas[index])), index, x, torch.Generator())
    torch.testing.assert_close(x, MEAN + SPREAD * start, rtol=0, atol=0.03)


@pytest.mark.parametrize(("strength", "steps", "start"), [(0.5, 10, 4), (0.99, 10, 0), (0.3, 20, 13), (0.0, 6, 5)])
def test_denoise_strength_starts_later(strength: float, steps: int, start: int) -> None:
    schedule = make_schedule(spec("euler", steps, denoise_strength=strength))
    assert schedule.first_index == start and len(schedule) == steps - start and schedule.total == steps


def test_denoise_strength_needs_start_zero() -> None:
    with pytest.raises(ValueError, match="start_step must be 0"):
        make_schedule(spec("euler", denoise_strength=0.5, start_step=2))


@pytest.mark.parametrize(
    "options", [{"start_step": 4, "end_step": 4}, {"start_step": 9}, {"end_step": 0}, {"end_step": 1.0}]
)
def test_empty_ranges_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="start_step must come before end_step"):
        make_schedule(spec("unipc", **options))
    with pytest.raises(ValueError, match=r"^denoise_strength 0.5 begins at step 3 of 8, behind end_step 2: raise one"):
        make_schedule(spec("unipc", 8, denoise_strength=0.5, end_step=2))


def test_a_sampler_above_a_noise_level_that_its_sigmas_never_reach_has_no_steps() -> None:
    """Of two that share a boundary, the other one runs all of them."""
    low = torch.tensor([0.8, 0.4, 0.0])
    with pytest.raises(ValueError, match="No steps are left"):
        make_schedule(spec("euler", sigmas=low, end_step=0.9))
    assert torch.equal(make_schedule(spec("euler", sigmas=low, start_step=0.9)).sigmas, low)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - FIXED))
def test_custom_sigmas_are_taken_as_they_are(name: str) -> None:
    sigmas = torch.tensor([1.0, 0.94, 0.83, 0.6, 0.3, 0.0])
    schedule = make_schedule(spec(name, 30, sigmas=sigmas))
    torch.testing.assert_close(schedule.sigmas, sigmas)
    assert (schedule.timesteps - 1000 * sigmas[:-1]).abs().max() < 1 + 1e-3 and len(schedule) == schedule.total == 5
    x, z = run_flow(schedule, cells=2)
    assert torch.isfinite(x).all()


def test_custom_sigmas_may_stop_early() -> None:
    schedule = make_schedule(spec("euler", sigmas=torch.tensor([0.9, 0.5, 0.2])))
    x = torch.ones(1, 1, 2, 2)
    for index in range(2):
        x = schedule.step(torch.ones_like(x), index, x, torch.Generator())
    torch.testing.assert_close(x, torch.full_like(x, 1 - 0.7))


@pytest.mark.parametrize(
    "sigmas", [[14.6, 7.0, 0.0], [0.5], [0.2, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, -0.1], [1.0, float("nan"), 0.0]]
)
def test_unusable_sigmas_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="Custom sigmas"):
        make_schedule(spec("unipc", sigmas=torch.tensor(sigmas)))


@pytest.mark.parametrize(
    ("name", "steps", "allowed"),
    [("longcat_distill_euler", 51, "50 steps at most"), ("flowmatch_distill", 8, "4 steps only"),
     ("flowmatch_causvid", 10, "9 steps at most"), ("rcm", 5, "4 steps at most"), ("er_sde", 1001, "1000 steps at mo"),
     ("res_multistep", 1001, "1000 steps at most")],
)  # fmt: skip
def test_more_steps_than_there_are_noise_levels(name: str, steps: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' works with {allowed}.* not {steps}"):
        make_schedule(ScheduleSpec(name=name, steps=steps, shift=5.0))


@pytest.mark.parametrize("name", sorted(FIXED))
def test_distilled_schedules_are_fixed(name: str) -> None:
    with pytest.raises(ValueError, match="disconnect 'sigmas'"):
        make_schedule(spec(name, sigmas=torch.tensor([1.0, 0.0])))


def test_models_of_another_width_have_noise_levels_of_their_own() -> None:
    """CausVid of 14B and of 1.3B; no other schedule knows the model."""
    whole = make_schedule(spec("flowmatch_causvid", 4, start_step=1))
    small = whole.for_width(1536)
    assert whole.for_width(5120) is whole
    assert whole.all_sigmas.tolist() == pytest.approx([0.999, 0.934, 0.862, 0.756, 0.0])
    assert small.all_sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and small.first_index == 1
    assert torch.equal(small.later(1).fresh().sigmas, small.sigmas[1:])
    assert small.for_width(1536) is small
    with pytest.raises(ValueError, match="'flowmatch_causvid' works with 4 steps only in a model of width 1536, not 6"):
        make_schedule(spec("flowmatch_causvid", 6)).for_width(1536)
    other = make_schedule(spec("unipc"))
    assert other.for_width(1536) is other


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("shift", 0.0)])
def test_impossible_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        make_schedule(spec("euler", **{field: value}))


def test_enhance_hf_replaces_the_low_end_by_a_uniform_tail() -> None:
    schedule = make_schedule(spec("euler", 30, enhance_hf=True))
    plain = make_schedule(spec("euler", 30)).sigmas[:-1]
    sigmas = schedule.sigmas
    kept = plain[plain > 0.5]
    torch.testing.assert_close(sigmas[: len(kept)], kept)
    tail = sigmas[len(kept) :]
    assert len(tail) == 6 + 1 and tail[0] == pytest.approx(0.5) and tail[-1] == 0
    torch.testing.assert_close(tail.diff(), torch.full((6,), -0.5 / 6))
    assert schedule.total == len(schedule) == len(sigmas) - 1
