"""Every formula against float64 written otherwise; the options in the sampler node."""

import logging
import math

import pytest
import torch
from contract import build, inputs
from tiny_runs import Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.experimental.extension import SplitAttention, SplitByPrompts, SplitSteps, token_ranges
from wanvideo_wrapper.experimental.formulas import FrequencyScales, adaptive_scale, optimal_scale, tangential
from wanvideo_wrapper.experimental.guidance import TextGuidance
from wanvideo_wrapper.experimental.positions import ScaledPositions
from wanvideo_wrapper.experimental.velocity import TemporalScoreRescaling, ZeroInit
from wanvideo_wrapper.wanvideo.conditioning import Row, Step
from wanvideo_wrapper.wanvideo.guidance import weighted_sum
from wanvideo_wrapper.wanvideo.request import contributions
from wanvideo_wrapper.wanvideo.rope import rope_table

OFF = dict(
    video_attention_split_steps="", cfg_zero_star=False, use_zero_init=False, zero_star_steps=0, use_fresca=False,
    fresca_scale_low=1.0, fresca_scale_high=1.25, fresca_freq_cutoff=20, use_tcfg=False, raag_alpha=0.0,
    bidirectional_sampling=False, temporal_score_rescaling=False, tsr_k=0.95, tsr_sigma=1.0,
)  # fmt: skip
NO_TEXT, AUDIO = frozenset({"text"}), frozenset({"audio"})


def args(**changes):
    return N["WanVideoExperimentalArgs"]().process(**{**OFF, **changes})[0]


def videos(seed=0, shape=(16, 3, 6, 8)):
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(*shape, generator=generator)
    return cond, 0.7 * cond + 0.5 * torch.randn(*shape, generator=generator)


def svd_part(cond, uncond):
    pair = torch.stack((cond, uncond), 1).flatten(2).double()
    u, s, vh = torch.linalg.svd(pair, full_matrices=False)
    s[:, 1] = 0
    return (u @ torch.diag_embed(s) @ vh)[:, 1].view(cond.shape)


def scaled(x, low, high, cutoff):
    """By unshifted frequency numbers."""
    height, width = x.shape[-2:]
    mask = torch.full((height, width), high, dtype=torch.float64)
    for y in range(height):
        for z in range(width):
            inside = [-cutoff <= (n + size // 2) % size - size // 2 < cutoff for n, size in ((y, height), (z, width))]
            if all(inside):
                mask[y, z] = low
    return torch.fft.ifft2(torch.fft.fft2(x.double()) * mask).real


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def test_optimal_scale_is_the_least_squares_factor():
    cond, uncond = videos()
    want = torch.linalg.lstsq(uncond.double().view(-1, 1), cond.double().view(-1, 1)).solution
    assert optimal_scale(cond, uncond).item() == pytest.approx(want.item(), rel=1e-5)


def test_tangential_is_the_first_singular_part():
    cond, uncond = videos()
    close(tangential(cond, uncond), svd_part(cond, uncond))
    assert (tangential(cond, uncond) - uncond).abs().max() > 0.1


class OnApple(torch.Tensor):
    """Apple's GPUs have no float64."""

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def to(self, *args):
        return super().to(*args).as_subclass(torch.Tensor)


def test_rescaling_needs_no_float64_of_the_device():
    v, x = videos()
    rule, time = TemporalScoreRescaling(0.9, 0.5).around_velocity(lambda *_: v), torch.tensor([700.0])
    assert torch.equal(rule(x, time.as_subclass(OnApple), Step()), rule(x, time, Step()))


def test_tangential_needs_no_float64_of_the_device():
    cond, uncond = videos()
    got = tangential(cond.as_subclass(OnApple), uncond.as_subclass(OnApple))
    assert torch.equal(got.as_subclass(torch.Tensor), tangential(cond, uncond))


def test_adaptive_scale():
    cond, uncond = videos()
    ratios = [
        math.sqrt(((c - u).double() ** 2).sum() / (u.double() ** 2).sum()) for c, u in zip(cond, uncond, strict=True)
    ]
    want = 1 + 4 * math.exp(-0.5 * sum(ratios) / len(ratios))
    assert adaptive_scale(cond, uncond, 5.0, 0.5) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("cutoff", [0, 1, 2, 3])
def test_frequencies(cutoff):
    x, _ = videos()
    close(FrequencyScales(0.5, 1.5, cutoff)(x), scaled(x, 0.5, 1.5, cutoff))


@pytest.mark.parametrize("zero_star", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("fresca", [False, True])
def test_two_passes(zero_star, projected, alpha, fresca):
    cond, uncond = videos()
    rule = TextGuidance(
        zero_star=zero_star, projected=projected, raag_alpha=alpha,
        frequencies=FrequencyScales(0.8, 1.4, 2) if fresca else None,
    )  # fmt: skip
    got = rule.around_guidance(weighted_sum)((Row(5.0), Row(-4.0, NO_TEXT)), (cond, uncond), Step())
    c, u, scale = cond.double(), uncond.double(), 5.0
    star = (c * u).sum() / (u * u).sum() if zero_star else 1.0
    u = u * star
    if projected:
        u = svd_part(c, u)
    if alpha:
        ratio = ((c - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)).mean()
        scale = 1 + 4 * torch.exp(-alpha * ratio)
    difference = scaled(c - u, 0.8, 1.4, 2) * star if fresca else c - u
    close(got, u + scale * difference)


def test_other_passes(caplog):
    cond, other = videos()
    rule = TextGuidance(zero_star=True, frequencies=FrequencyScales(0.8, 1.4, 2)).around_guidance(weighted_sum)
    filtered = scaled(cond, 0.8, 1.4, 2)
    close(rule((Row(1.0),), (cond,), Step(in_run=1)), filtered)
    close(rule((Row(3.0), Row(-2.0, AUDIO)), (cond, other), Step(in_run=1)), 3 * filtered - 2 * other)
    rows = (Row(3.0), Row(-1.0, NO_TEXT), Row(-1.0, NO_TEXT | AUDIO))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(rule(rows, (cond, other, cond), Step()), weighted_sum(rows, (cond, other, cond), Step()))
    assert "only in steps of one pass with" in caplog.text


@pytest.mark.parametrize("t", [0.0, 1.0, 300.0, 999.0, 1000.0])
@pytest.mark.parametrize(("k", "sigma"), [(0.95, 1.0), (3.0, 0.2)])
def test_temporal_score_rescaling(t, k, sigma):
    x, v = videos()
    got = TemporalScoreRescaling(k, sigma).around_velocity(lambda *_: v)(x, torch.tensor(t), Step())
    s = t / 1000
    snr = math.inf if s == 0 else (1 - s) ** 2 / s**2
    ratio = k if s == 0 else (snr * sigma**2 + 1) / (snr * sigma**2 / k + 1)
    v, x = v.double(), x.double()
    close(got, v if s == 1 else (ratio * ((1 - s) * v + x) - x) / (1 - s), 1e-4)


def test_rescaling_of_frames_at_their_own_timesteps():
    x, v = videos()
    times = torch.tensor([0.0, 300.0, 1000.0])
    rule = TemporalScoreRescaling(0.9, 0.5)
    got = rule.around_velocity(lambda *_: v)(x, times, Step())
    for frame, time in enumerate(times):
        one = rule.around_velocity(lambda *_: v)(x, time, Step())
        close(got[:, frame], one[:, frame])


def test_zero_init():
    x, v = videos()
    velocity = ZeroInit(1).around_velocity(lambda *_: v)
    moves = [bool(velocity(x, torch.tensor(1.0), Step(in_run=i, total=9)).any()) for i in range(3)]
    assert moves == [False, False, True]


SHARES = [(7, 3, (3, 2, 2)), (6, 3, (2, 2, 2)), (2, 3, (1, 1)), (5, 2, (3, 2))]


@pytest.mark.parametrize(("frames", "parts", "sizes"), SHARES)
def test_shares_of_frames(frames, parts, sizes):
    assert tuple((stop - start) // 4 for start, stop in token_ranges(frames, 4, parts)) == sizes
    assert token_ranges(frames, 4, parts)[-1][1] == frames * 4


def test_parts_attend_to_themselves():
    _, model = build(SplitAttention())
    block, seen = model.blocks[0], []
    block.self_attn.o.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    calls = []
    attention = block.self_attn.attention

    class Spy:
        name = "spy"

        def __call__(self, q, k, v, **more):
            calls.append((q, k, v))
            return attention(q, k, v, **more)

    block.self_attn.attention = Spy()
    elsewhere, there = inputs(SplitSteps((1,), 2)), inputs(SplitSteps((0,), 2))
    model(elsewhere)
    whole = calls.pop()
    assert not calls
    seen.clear()
    model(there)
    assert len(calls) == 2
    q, k, v = (torch.cat(parts, 1).transpose(1, 2).double() for parts in zip(*calls, strict=True))
    assert q.shape[2] == whole[0].shape[1]
    part = torch.tensor([0] * 8 + [1] * 4)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(part[:, None] != part, -math.inf)
    close(seen[0], (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_reversed_pass_answers_the_same_reversed():
    """Why bidirectional sampling needs no second pass."""

    class Reversed(SplitAttention):
        def prepare(self, model, payload, inputs, tokens):
            places = tokens.grid[1] * tokens.grid[2]
            rope = tokens.rope.unflatten(0, (-1, places)).flip(0).flatten(0, 1)
            return tokens._replace(rope=rope), None

    base, model = build(Reversed())
    plain = inputs()
    turned = inputs(SplitSteps((), 2))
    turned = type(turned)(**{**turned.__dict__, "latents": plain.latents.flip(2)})
    close(model(turned).flip(2), base(plain), 1e-4)


def test_the_node(caplog):
    assert args() == ()
    got = args(
        cfg_zero_star=True, use_zero_init=True, zero_star_steps=2, use_fresca=True, use_tcfg=True, raag_alpha=0.5,
        temporal_score_rescaling=True, tsr_k=0.9, tsr_sigma=0.5, video_attention_split_steps="0, 2",
    )  # fmt: skip
    guided = TextGuidance(zero_star=True, projected=True, raag_alpha=0.5, frequencies=FrequencyScales())
    assert got == (TemporalScoreRescaling(0.9, 0.5), ZeroInit(2), guided, SplitByPrompts((0, 2)))
    assert contributions([("experimental_args", got)]) == ((), got)
    with pytest.raises(ValueError, match="tsr_k must be more than 0"):
        args(temporal_score_rescaling=True, tsr_k=0.0)
    with caplog.at_level(logging.WARNING):
        assert args(use_zero_init=True, bidirectional_sampling=True) == ()
    assert "without cfg_zero_star" in caplog.text and "bidirectional_sampling has no effect" in caplog.text


def test_flowedit_is_refused_by_name():
    with pytest.raises(ValueError, match="flowedit_args.*disconnect it"):
        contributions([("flowedit_args", {"any": 1})])


def test_runs_of_the_sampler(tmp_path, caplog):
    with Runs(tmp_path) as runs:
        plain = runs.sample(prompts=2)
        for changes in (
            {"cfg_zero_star": True}, {"cfg_zero_star": True, "use_zero_init": True}, {"use_tcfg": True},
            {"raag_alpha": 1.0}, {"use_fresca": True, "fresca_freq_cutoff": 1},
            {"temporal_score_rescaling": True, "tsr_k": 0.8}, {"video_attention_split_steps": "1,2"},
        ):  # fmt: skip
            changed = runs.sample(prompts=2, experimental_args=args(**changes))
            assert changed.isfinite().all() and (plain - changed).abs().max() > 1e-5, changes
        with caplog.at_level(logging.WARNING):
            alone = runs.sample(experimental_args=args(video_attention_split_steps="1"))
        assert torch.equal(alone, runs.sample()) and "there is only one" in caplog.text


def scale_positions(f=1.0, h=1.0, w=1.0):
    return N["WanVideoRoPEFunction"]().process("comfy", f, h, w)[0]


def test_scaled_positions(tmp_path, monkeypatch):
    assert scale_positions() == "comfy"
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="ntk_scale_h"):
            scale_positions(h=wrong)
    with pytest.raises(ValueError, match="more than 0"):
        N["WanVideoRoPEFunction"].VALIDATE_INPUTS(ntk_scale_w=0.0)
    with Runs(tmp_path) as runs:
        plain = runs.sample(rope_function="comfy")
        scaled = {axis: runs.sample(rope_function=scale_positions(**{axis: 9.0})) for axis in "fhw"}
        latents = [plain, *scaled.values(), runs.sample(rope_function=scale_positions(9.0, 9.0, 9.0))]
        for number, one in enumerate(latents):
            assert all((one - other).abs().max() > 1e-5 for other in latents[:number])
        (args,) = N["WanVideoSamplerExtraArgs"]().process(rope_function=scale_positions(9.0, 9.0, 9.0))
        assert args["modifiers"] == (ScaledPositions(9.0, 9.0, 9.0),)
        assert torch.equal(runs.sample(), plain)
        rope_table.cache_clear()
        monkeypatch.setattr("wanvideo_wrapper.wanvideo.rope.ROPE_THETA", 90000.0)
        assert torch.equal(runs.sample(), latents[-1])
        rope_table.cache_clear()
        with pytest.raises(ValueError, match="rope_function must be one of default, comfy, comfy_chunked"):
            runs.sample(rope_function="mocha")
