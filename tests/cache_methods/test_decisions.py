"""Each method's decisions equal its published formulas in float64, and what it gives is the input and a difference."""

import pytest
import torch
from wanvideo_wrapper.cache_methods.easycache import EasyCache, EasyCacheMemory
from wanvideo_wrapper.cache_methods.magcache import MagCache, MagCacheMemory, ratio_at
from wanvideo_wrapper.cache_methods.published import MODELS
from wanvideo_wrapper.cache_methods.teacache import TeaCache, TeaCacheMemory
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.step_cache import Moment

STEPS = 24
CPU = torch.device("cpu")


class Blocks:
    """Stands in for the blocks: random results, and in which steps they ran."""

    def __init__(self, shape):
        self.shape, self.ran, self.results = shape, [], []

    def at(self, step):
        def run():
            self.ran.append(step.in_run)
            self.results.append(torch.randn(self.shape))
            return self.results[-1]

        return run


def steps(count=STEPS, first=0, total=None):
    return [Step(index=first + i, total=total or count, in_run=i) for i in range(count)]


def moments(count=STEPS):
    """Embeddings that change a little from step to step, and random tokens."""
    embedding, mod = torch.randn(1, 1, 32), torch.randn(1, 1, 6, 8)
    for _ in range(count):
        yield Moment(embedding, mod, torch.randn(1, 10, 8))
        embedding = embedding + 0.05 * torch.rand(()) * torch.randn(1, 1, 32)
        mod = mod + 0.05 * torch.rand(()) * torch.randn(1, 1, 6, 8)


def polynomial(coefficients, x):
    return sum(c * x ** (len(coefficients) - 1 - i) for i, c in enumerate(coefficients))


def check_results(given, results, blocks, ran):
    """A step that was left out is its own input and the difference of the last step that ran."""
    assert blocks.ran == ran and 0 < len(ran) < STEPS
    made, difference = iter(blocks.results), None
    for index, (before, got) in enumerate(zip(given, results, strict=True)):
        if index in ran:
            want = next(made)
            difference = want - before
            assert torch.equal(got, want)
        else:
            assert torch.allclose(got, before + difference)


@pytest.mark.parametrize("mode", ["e", "e0", "plain"])
@pytest.mark.parametrize("device", ["main_device", "offload_device"])
def test_teacache(mode, device):
    coefficients = (40.0, -3.0, 1.5, 0.001) if mode != "plain" else (1.0, 0.0)
    cache = TeaCache(threshold=0.1, start_step=2, end_step=18, use_coefficients=mode != "plain",
                     mode="e" if mode == "e" else "e0", cache_device=device)  # fmt: skip
    memory, blocks = TeaCacheMemory(cache, coefficients, CPU), Blocks((1, 10, 8))
    given = list(moments())
    results = [memory.blocks(m, step, blocks.at(step)) for m, step in zip(given, steps(), strict=True)]
    ran, distance, before = [], 0.0, None
    for index, moment in enumerate(given):
        signal = (moment.embedding if mode == "e" else moment.mod).double()
        if before is not None and 2 <= index <= 18:
            distance += polynomial(coefficients, float((signal - before).abs().mean() / before.abs().mean()))
            if distance >= 0.1:
                ran.append(index)
                distance = 0.0
        else:
            ran.append(index)
            distance = 0.0
        before = signal
    check_results([m.tokens for m in given], results, blocks, ran)
    assert memory.skipped == [i for i in range(STEPS) if i not in ran] and memory.steps == STEPS


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_magcache(name, longest):
    curve = MODELS[name].magcache
    cache = MagCache(threshold=0.05, longest=longest, start_step=1)
    memory, blocks = MagCacheMemory(cache, curve, CPU), Blocks((1, 10, 8))
    given = list(moments())
    results = [memory.blocks(m, step, blocks.at(step)) for m, step in zip(given, steps(), strict=True)]
    ran, ratio, error, row = [0], 1.0, 0.0, 0
    for index in range(1, STEPS):
        ratio *= curve[round(index / (STEPS - 1) * (len(curve) - 1))]
        error += abs(1 - ratio)
        row += 1
        if not (error < 0.05 and row <= longest):
            ran.append(index)
            ratio, error, row = 1.0, 0.0, 0
    check_results([m.tokens for m in given], results, blocks, ran)


def test_the_curve_follows_the_whole_schedule():
    curve = tuple(float(i) for i in range(50))
    assert [ratio_at(curve, step) for step in steps(3, first=0, total=5)] == [0, 12, 24]
    assert [ratio_at(curve, step) for step in steps(2, first=3, total=5)] == [37, 49]


def test_easycache():
    cache = EasyCache(threshold=0.6, start_step=4)
    memory = EasyCacheMemory(cache, CPU)
    given, velocities, ran = [torch.randn(1, 4, 2, 3, 3)], [], []
    for _ in range(STEPS - 1):
        given.append(given[-1] + 0.2 * torch.rand(()) * torch.randn(given[0].shape))
    results = []
    for latents, step in zip(given, steps(), strict=True):

        def run(latents=latents, step=step):
            ran.append(step.in_run)
            velocities.append(0.5 * latents + 0.3 * torch.randn(latents.shape))
            return velocities[-1]

        results.append(memory.whole(latents, step, run))
    want, error, rate, last = [], 0.0, None, None
    made = iter(velocities)
    for index, latents in enumerate(given):
        x = latents.double()
        if rate is not None and index >= 4:
            error += rate * float((x - given[index - 1].double()).abs().mean() / last[1].abs().mean())
            if error < 0.6:
                continue
        want.append(index)
        error, velocity = 0.0, next(made).double()
        if last is not None:
            rate = float((velocity - last[1]).abs().mean() / (x - last[0]).abs().mean())
        last = (x, velocity)
    assert ran == want and 4 < len(ran) < STEPS
    for index in memory.skipped:
        latest = max(i for i in ran if i < index)
        assert torch.allclose(results[index], given[index] + results[latest] - given[latest], atol=1e-5)


@pytest.mark.parametrize("kind", ["tea", "mag", "easy"])
def test_nothing_is_left_out_at_threshold_zero_or_out_of_range_or_after_a_gap(kind):
    def make(**options):
        if kind == "tea":
            return TeaCacheMemory(TeaCache(**options), (1.0, 0.0), CPU)
        if kind == "mag":
            return MagCacheMemory(MagCache(**options), (1.0,) * 50, CPU)
        return EasyCacheMemory(EasyCache(**options), CPU)

    def ran(memory, chosen):
        blocks = Blocks((1, 10, 8))
        for moment, step in zip(moments(len(chosen)), chosen, strict=True):
            if kind == "easy":
                memory.whole(moment.tokens, step, blocks.at(step))
            else:
                memory.blocks(moment, step, blocks.at(step))
        return blocks.ran

    every = list(range(STEPS))
    assert ran(make(threshold=0.0, start_step=0), steps()) == every
    assert ran(make(threshold=99.0, start_step=STEPS), steps()) == every
    early = ran(make(threshold=99.0, start_step=0, end_step=6), steps())
    assert early[-17:] == every[-17:] and len(early) < STEPS
    assert ran(make(threshold=99.0, start_step=0), steps()[::2]) == every[::2]
