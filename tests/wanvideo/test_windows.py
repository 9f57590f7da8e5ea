"""Context windows: every frame is covered, blending against a plain loop, each window sees its own conditions."""

from dataclasses import dataclass, replace

import pytest
import talking
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step
from wanvideo_wrapper.wanvideo.frames import pixel_frames
from wanvideo_wrapper.wanvideo.guidance import Conditions
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample, whole_window
from wanvideo_wrapper.wanvideo.windows import (
    FUSE_METHODS,
    SCHEDULES,
    ContextOptions,
    WindowedDenoiser,
    blend_weights,
    free_noise,
    radical_inverse,
)

FRAMES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


def options(**changes):
    return ContextOptions(**{"size": 17, "overlap": 8, "stride": 4, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("frames", [6, 9, 22, 41, 90])
@pytest.mark.parametrize(("size", "overlap", "stride"), [(17, 4, 4), (17, 16, 8), (33, 8, 12), (81, 16, 4)])
def test_every_frame_is_covered_at_every_step(schedule, frames, size, overlap, stride):
    asked = options(schedule=schedule, size=size, overlap=overlap, stride=stride)
    for step in range(9):
        windows = asked.windows(step, frames)
        assert {frame for window in windows for frame in window} == set(range(frames))
        length = min(asked.latent_size, frames)
        assert all(len(set(window)) == length for window in windows)
        if schedule != "uniform_looped":
            assert all(list(window) == sorted(window) for window in windows)
        for fuse in FUSE_METHODS:
            chosen = replace(asked, fuse=fuse)
            total = torch.zeros(frames)
            for window in windows:
                weights = blend_weights(window, frames, chosen)
                assert weights.min() > 0 and weights.max() <= 1
                total[list(window)] += weights
            assert total.min() > 0


def test_windows_by_hand():
    assert options(schedule="static_standard").windows(3, 12) == [
        (0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10), (7, 8, 9, 10, 11),
    ]  # fmt: skip
    assert options(schedule="uniform_looped").windows(0, 9) == [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 0, 1)]
    assert options().windows(0, 9) == [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (4, 5, 6, 7, 8)]
    assert [radical_inverse(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


def test_windows_that_moved_on_by_hand():
    """In the second step they start in the middle; windows of every second frame come last."""
    ring = [(6, 7, 8, 9, 10), (9, 10, 11, 0, 1), (0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (7, 9, 11, 1, 3), (3, 5, 7, 9, 11)]
    assert options(schedule="uniform_looped", stride=8).windows(1, 12) == ring
    assert options(stride=8).windows(1, 12) == [
        (6, 7, 8, 9, 10), (7, 8, 9, 10, 11), (0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (3, 5, 7, 9, 11), (1, 2, 3, 4, 5),
    ]  # fmt: skip
    assert options().windows(1, 9) == [(4, 5, 6, 7, 8), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5)]
    # A window of every fourth frame would meet itself.
    assert options(schedule="uniform_looped", stride=16).windows(1, 12) == ring
    assert options(schedule="uniform_looped", stride=3).windows(1, 12) == ring[:4]
    assert options(stride=8).windows(0, 8) == options(stride=4).windows(0, 8)
    # What the last window lost by being moved back, the first one begins.
    assert options(stride=8).windows(0, 9) == [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (4, 5, 6, 7, 8), (0, 2, 4, 6, 8)]
    # Moving windows of every second frame back leaves a frame that only a window of its own covers.
    assert options(size=29, stride=8).windows(2, 18)[-1] == (1, 2, 3, 4, 5, 6, 7, 8)


def test_lengths_in_latent_frames():
    asked = options(size=17, overlap=8)
    assert (asked.latent_size, asked.latent_overlap) == (5, 2)
    assert [asked.apply_to(frames) for frames in (4, 5, 6)] == [False, False, True]
    assert [asked.seen(frames) for frames in (4, 5, 6, 60)] == [4, 5, 5, 5]
    assert asked.windows(0, 5) == [(0, 1, 2, 3, 4)]
    with pytest.raises(ValueError, match="must be less"):
        options(size=17, overlap=23).check()
    options(size=17, overlap=19).check()


LOW = 1e-4
START, MIDDLE, END, AROUND = (0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (7, 8, 9, 10, 11), (9, 10, 11, 0, 1)


@pytest.mark.parametrize(
    ("window", "schedule", "overlap", "fuse", "want"),
    [
        (START, "static_standard", 12, "linear", (1, 1, 1, 0.5, LOW)),
        (MIDDLE, "static_standard", 12, "linear", (LOW, 0.5, 1, 0.5, LOW)),
        (END, "static_standard", 12, "linear", (LOW, 0.5, 1, 1, 1)),
        (START, "uniform_looped", 12, "linear", (1, 1, 1, 0.5, LOW)),
        (END, "uniform_looped", 12, "linear", (LOW, 0.5, 1, 1, 1)),
        (AROUND, "uniform_looped", 12, "linear", (LOW, 0.5, 1, 0.5, LOW)),
        (MIDDLE, "static_standard", 16, "pyramid", (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)),
        (START, "static_standard", 16, "pyramid", (1 / 3, 2 / 3, 1, 1, 1 / 3)),
        (END, "static_standard", 16, "pyramid", (1 / 3, 1, 1, 2 / 3, 1 / 3)),
        (START, "uniform_looped", 16, "pyramid", (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)),
        (END, "uniform_looped", 16, "pyramid", (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)),
        ((0, 1, 2, 3), "uniform_looped", 8, "pyramid", (0.5, 1, 1, 0.5)),
    ],
)
def test_blend_weights_by_hand(window, schedule, overlap, fuse, want):
    got = blend_weights(window, 12, options(schedule=schedule, overlap=overlap, fuse=fuse))
    torch.testing.assert_close(got, torch.tensor([float(w) for w in want]))


def test_windows_that_cannot_move_on_are_named():
    with pytest.raises(ValueError, match=r"context_overlap \(20\) must be less than context_frames \(17\)"):
        options(overlap=20).windows(0, 30)


def test_linear_neighbours_add_up_to_one():
    a, b = (blend_weights(window, 9, options()) for window in ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7)))
    torch.testing.assert_close(a[3:] + b[:2], torch.ones(2), atol=2e-4, rtol=0)


def test_free_noise_reuses_the_first_window():
    noise = torch.randn(2, 14, 2, 2)
    got = free_noise(noise, options(), torch.Generator().manual_seed(0))
    assert torch.equal(got[:, :5], noise[:, :5])
    for start in range(0, 9, 3):
        count = min(3, 9 - start)
        rows = {tuple(got[:, start + 5 + i].flatten().tolist()) for i in range(count)}
        assert rows == {tuple(got[:, start + i].flatten().tolist()) for i in range(count)}
    assert not torch.equal(got[:, 5:8], got[:, :3])
    assert torch.equal(got, free_noise(noise, options(), torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="must be less"):
        free_noise(noise, options(overlap=20), torch.Generator())


def request(folder, context, prompts=1, base="text"):
    asked = talking.request(folder, base=base, total=60, scheduler="euler")
    texts = tuple(torch.randn(4, asked.text.positive[0].shape[1]) for _ in range(prompts))
    image = ImageEmbeds(latent_shape=(16, FRAMES, 4, 4), num_frames=45)
    if base == "base":
        picture = ImageCondition(torch.randn(1, 16, FRAMES, 4, 4), torch.rand(1, 4, FRAMES, 4, 4))
        image = replace(image, payloads=(picture,))
    return replace(asked, image=image, context=context, text=replace(asked.text, positive=texts))


@pytest.fixture
def calls(monkeypatch):
    from wanvideo_wrapper.wanvideo.modules.model import WanModel

    found, forward = [], WanModel.forward

    def spy(self, inputs, memory=None):
        found.append((replace(inputs, latents=inputs.latents.clone()), forward(self, inputs, memory)))
        return found[-1][1]

    monkeypatch.setattr(WanModel, "forward", spy)
    return found


@pytest.mark.parametrize("fuse", FUSE_METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blending_equals_a_plain_loop(folder, calls, schedule, fuse):
    context = options(schedule=schedule, fuse=fuse, freenoise=False)
    asked = request(folder, context, prompts=3)
    result = sample(asked, StandaloneHost(device="cpu"))[0]["samples"][0]
    latents = torch.randn(16, FRAMES, 4, 4, generator=torch.Generator().manual_seed(asked.seed)).double()
    done = 0
    for step, sigma in enumerate(asked.schedule.sigmas[:-1]):
        total, weight = torch.zeros_like(latents), torch.zeros(FRAMES, dtype=torch.float64)
        for window in context.windows(step, FRAMES):
            inputs, velocity = calls[done]
            done += 1
            torch.testing.assert_close(inputs.latents[0].double(), latents[:, list(window)], atol=1e-4, rtol=1e-4)
            assert torch.equal(inputs.text[0], asked.text.positive[min(max(window) // 4, 2)])
            speech = next(p for p in inputs.payloads if hasattr(p, "audio")).audio
            want = asked.find(MultiTalkEmbeds).window(whole_window(FRAMES)).audio[:, :, list(pixel_frames(window))]
            assert torch.equal(speech, want)
            for place, frame in enumerate(window):
                share = float(blend_weights(window, FRAMES, context)[place])
                total[:, frame] += velocity[0, :, place].double() * share
                weight[frame] += share
        velocity = total / weight[:, None, None]
        latents = latents + velocity * (asked.schedule.sigmas[step + 1] - sigma).double()
    assert done == len(calls)
    torch.testing.assert_close(result.double(), latents, atol=1e-4, rtol=1e-4)


def test_windows_know_how_long_the_run_is(folder, calls):
    seen = []

    @dataclass(frozen=True)
    class Curious(ImageCondition):
        def window(self, window):
            seen.append(window.total)
            return super().window(window)

    asked = request(folder, options(schedule="static_standard"), base="base")
    (picture,) = asked.image.payloads
    asked = replace(asked, image=replace(asked.image, payloads=(Curious(picture.cond, picture.mask),)))
    sample(asked, StandaloneHost(device="cpu"))
    assert seen and set(seen) == {FRAMES} and whole_window(7, 1, 2).total == 7


def test_windows_start_from_the_picture_or_the_reference(folder, calls):
    reference = torch.randn(2, 16, 1, 4, 4)
    asked = request(folder, options(schedule="static_standard", reference=reference), base="base")
    sample(asked, StandaloneHost(device="cpu"))
    (picture,) = asked.image.payloads
    whole = torch.cat((picture.mask[0], picture.cond[0]))
    windows = asked.context.windows(0, FRAMES)
    for (inputs, _), window in zip(calls, windows * 2, strict=True):
        want = whole[:, list(window)].clone()
        want[:, 0] = whole[:, 0]
        if window[0]:
            want[4:, 0] = reference[min(max(window) // 6, 1), :, 0]
        seen = next(p for p in inputs.payloads if isinstance(p, ImageCondition))
        torch.testing.assert_close(torch.cat((seen.mask[0], seen.cond[0])), want)


@pytest.mark.parametrize("shape", [(1, 16, 1, 4, 6), (1, 48, 1, 4, 4)])
def test_a_reference_of_another_size_is_refused_before_the_first_window(folder, calls, shape):
    asked = request(folder, options(reference=torch.randn(*shape)), base="base")
    with pytest.raises(ValueError, match=rf"has pictures of \({shape[1]}, 1, 4, {shape[4]}\) .* are \(16, 12, 4, 4\)"):
        sample(asked, StandaloneHost(device="cpu"))
    assert not calls


class Remembered:
    reports = 0

    def report(self):
        self.reports += 1


@dataclass(frozen=True)
class Windowed(Payload):
    """Notes the windows that it is asked for; the second has no part of it."""

    windows: list

    def window(self, window):
        self.windows.append(window)
        return None if len(self.windows) == 2 else self


def test_references_are_in_every_window_and_what_steps_remember_stays_with_it(caplog):
    made, calls, windows = [], [], []

    def memories():
        made.append(Remembered())
        return made[-1]

    def make(conditions, remembered):
        def velocity(latents, times, step):
            calls.append((conditions, remembered, times))
            return latents + len(calls)

        return velocity

    conditions = Conditions(positive=torch.randn(2, 3), payloads=(Windowed(windows),))
    texts, asked = (torch.randn(2, 3), torch.randn(2, 3)), options(schedule="static_standard", verbose=True)
    denoiser = WindowedDenoiser(
        conditions, options=asked, texts=texts, references=(1, 2), device=torch.device("cpu"), make=make,
        memories=memories, model=None,
    )  # fmt: skip
    latents, times = torch.randn(4, 15, 2, 2), torch.rand(15)
    caplog.set_level("INFO", logger="wanvideo")
    got = denoiser(latents, times, Step(in_run=2, total=9))
    frames = [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10), (7, 8, 9, 10, 11)]
    places = [[0, *(frame + 1 for frame in window), 13, 14] for window in frames]
    total, weight = torch.zeros(15), torch.zeros(15)
    for number, (place, window) in enumerate(zip(places, frames, strict=True), start=1):
        share = torch.cat((torch.ones(1), blend_weights(window, 12, asked), torch.ones(2)))
        total[place], weight[place] = total[place] + share * number, weight[place] + share
    torch.testing.assert_close(got, latents + (total / weight)[None, :, None, None])
    assert torch.allclose((got - latents)[:, [0, 13, 14]], torch.tensor(2.5))
    assert [window.latents for window in windows] == [tuple(place) for place in places]
    assert [window.pixels for window in windows] == [pixel_frames(window) for window in frames]
    assert {(w.leading, w.trailing, w.total, w.whole, w.picture) for w in windows} == {(1, 2, 15, False, None)}
    assert [len(call[0].payloads) for call in calls] == [1, 0, 1, 1]
    assert [call[0].positive is texts[1] for call in calls] == [False, True, True, True]
    assert all(torch.equal(call[2], times[place]) for call, place in zip(calls, places, strict=True))
    assert [r.message for r in caplog.records][:2] == [
        "Step 3, context window (0, 1, 2, 3, 4).", "Step 3, context window (3, 4, 5, 6, 7).",
    ]  # fmt: skip
    assert [call[1] for call in calls] == made and len(made) == 4

    denoiser(latents, times[0], Step())
    assert [call[1] for call in calls[4:]] == made and all(torch.equal(call[2], times[0]) for call in calls[4:])
    denoiser.report()
    assert [memory.reports for memory in made] == [1, 1, 1, 1]
    denoiser.forget()
    denoiser(latents, times[0], Step())
    assert [call[1] for call in calls[8:]] == made[4:] and len(made) == 8


def test_a_window_that_cannot_be_is_refused_before_the_first_runs(folder, calls):
    @dataclass(frozen=True)
    class Short(ImageCondition):
        def window(self, window):
            if FRAMES - 1 in window.latents:
                raise ValueError("too short")
            return super().window(window)

    asked = request(folder, options(schedule="static_standard"), base="base")
    (picture,) = asked.image.payloads
    asked = replace(asked, image=replace(asked.image, payloads=(Short(picture.cond, picture.mask),)))
    with pytest.raises(ValueError, match="too short"):
        sample(asked, StandaloneHost(device="cpu"))
    assert not calls


def test_a_short_video_is_not_cut(folder, calls):
    long = options(size=81)
    first = sample(request(folder, long), StandaloneHost(device="cpu"))[0]["samples"]
    assert len(calls) == 2 and calls[0][0].latents.shape[2] == FRAMES and first.isfinite().all()


def test_the_loop_and_context_windows_exclude_each_other(folder):
    asked = replace(talking.request(folder), context=options())
    with pytest.raises(ValueError, match="disconnect one"):
        sample(asked, StandaloneHost(device="cpu"))


def test_node():
    (made,) = N["WanVideoContextOptions"]().process(
        "static_standard", 49, 8, 12, True, False, fuse_method="pyramid",
        reference_latent={"samples": torch.zeros(1, 16, 1, 4, 4)},
    )
    assert (made.latent_size, made.latent_overlap, made.stride, made.fuse) == (13, 3, 8, "pyramid")
    assert made.reference.shape[0] == 1
    extra = N["WanVideoSamplerExtraArgs"]().process(context_options=made)[0]
    assert extra["context"] is made


def test_defaults_are_those_of_the_node():
    node = N["WanVideoContextOptions"]
    widgets = {name: spec[-1].get("default", spec[0][0]) for name, spec in node.INPUT_TYPES()["required"].items()}
    assert node().process(**widgets)[0] == ContextOptions()
