"""Guidance rows against the published formulas; the Denoiser against a model whose answer is a known function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.extension import AudioWindow
from wanvideo_wrapper.wanvideo.conditioning import Payload, Row, Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance, per_step, prediction_name, present
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.shard import ALONE, Ranks

CPU = torch.device("cpu")
SHAPE = (16, 3, 4, 4)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speech(seed=7, speakers=1):
    masks = None if speakers == 1 else torch.ones(speakers + 1, 8, 8)
    return AudioWindow(rand(1, speakers, 9, 5, 2, 3, seed=seed), torch.tensor(1.0), masks)


class LinearModel:
    """Answers scale * latents plus the sums of what conditions each batch row: linear, so formulas can be checked."""

    ranks = ALONE

    def __init__(self):
        self.batches = []
        self.seen = []

    @staticmethod
    def answer(latents, text, clip, audio):
        return 0.5 * latents[:16] + text.sum() + 3 * clip + 7 * audio

    def __call__(self, inputs, memory=None):
        batch = inputs.latents.shape[0]
        self.batches.append(batch)
        self.seen.append(inputs)
        assert inputs.timestep.shape[0] == batch and len(inputs.text) == batch
        clip = audio = torch.zeros(batch)
        for payload in inputs.payloads:
            if isinstance(payload, ClipImage):
                clip = payload.positive.flatten(1).sum(1).expand(batch)
            if isinstance(payload, AudioWindow):
                audio = payload.audio.flatten(1).sum(1).expand(batch)
        rows = zip(inputs.latents, inputs.text, clip, audio, strict=True)
        return torch.stack([self.answer(*row) for row in rows])


def guidance_of(text, audio=1.0, spoken=True, **options):
    """Guidance with the rule that speech brings."""
    embeds = MultiTalkEmbeds(features=(rand(9, 2, 3),), cfg_scale=audio)
    return Guidance(cfg=per_step(text), payloads=(embeds,) if spoken else (), **options)


def denoiser(model, guidance, *payloads, negative=True):
    conditions = Conditions(
        positive=rand(5, 8, seed=1), negative=rand(3, 8, seed=2) if negative else None, payloads=payloads
    )
    return Denoiser(model, conditions, guidance=guidance, device=CPU, dtype=torch.float32)


def predictions(latents, audio, clip):
    """The model's answer for (text kept, audio kept)."""
    given = {True: rand(5, 8, seed=1), False: rand(3, 8, seed=2)}

    def of(text, spoken):
        image = 0.0 if clip is None else (clip.positive if text or clip.negative is None else clip.negative).sum()
        return LinearModel.answer(latents, given[text], image, audio.audio.sum() if spoken and audio else 0.0)

    return of


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("text", "audio"), [(1.0, 1.0), (5.0, 1.0), (1.0, 4.0), (5.0, 4.0), (3.0, 3.0), (0.0, 1.0)])
def test_velocity_equals_the_published_formula(text, audio, batched):
    model, window = LinearModel(), speech()
    clip = ClipImage(rand(1, 6, 4, seed=8), rand(1, 6, 4, seed=9))
    latents = rand(*SHAPE)
    guided = denoiser(model, guidance_of(text, audio, batched=batched), window, clip)
    velocity = guided(latents, torch.tensor(700.0), Step())
    p = predictions(latents, window, clip)
    if text == 1:
        want = p(True, False) + audio * (p(True, True) - p(True, False))
    else:
        nothing = p(False, False)
        want = nothing + text * (p(True, True) - p(False, True)) + audio * (p(False, True) - nothing)
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-3)
    passes = {(1, 1): 1, (5, 1): 2, (1, 4): 2, (5, 4): 3, (3, 3): 2, (0, 1): 1}[(int(text), int(audio))]
    assert model.batches == ([passes] if batched else [1] * passes)


def test_negative_clip_features_go_with_the_negative_prompt():
    model = LinearModel()
    clip = ClipImage(rand(1, 6, 4, seed=8), rand(1, 6, 4, seed=9))
    denoiser(model, Guidance(cfg=(2.0,)), clip)(rand(*SHAPE), torch.tensor(1.0), Step())
    torch.testing.assert_close(model.seen[0].payloads[0].positive, clip.positive)
    torch.testing.assert_close(model.seen[1].payloads[0].positive, clip.negative)
    denoiser(model, Guidance(cfg=(2.0,)), ClipImage(clip.positive))(rand(*SHAPE), torch.tensor(1.0), Step())
    torch.testing.assert_close(model.seen[3].payloads[0].positive, clip.positive)


@pytest.mark.parametrize("batched", [False, True])
def test_every_pass_knows_the_prompt(batched):
    model = LinearModel()
    denoiser(model, Guidance(cfg=(2.0,), batched=batched))(rand(*SHAPE), torch.tensor(1.0), Step())
    texts, prompts = ([t for call in model.seen for t in getattr(call, name)] for name in ("text", "prompts"))
    assert [len(text) for text in texts] == [5, 3]
    assert len(prompts) == 2 and all(torch.equal(prompt, rand(5, 8, seed=1)) for prompt in prompts)


def test_rows_weigh_one_together():
    for text in (0.0, 1.0, 2.5, 7.0):
        for audio in (0.0, 1.0, 2.5, 4.0):
            rows = guidance_of(text, audio).rows(Step())
            assert sum(row.weight for row in rows) == pytest.approx(1.0)
            assert all(row.weight != 0 for row in rows) and len({row.without for row in rows}) == len(rows) <= 3


def test_equal_passes_are_joined():
    text = frozenset({"text"})
    assert present((Row(2.0), Row(-3.0, text), Row(1.0), Row(1.5, text), Row(0.0, frozenset({"x"})))) == (
        Row(3.0), Row(-1.5, text),
    )  # fmt: skip
    # Weights that cancel do so up to rounding.
    assert present((Row(1.0), Row(0.1, text), Row(0.2, text), Row(-0.3, text))) == (Row(1.0),)


def test_a_forward_is_named_by_what_it_goes_without():
    assert prediction_name((Row(1.0), Row(1.0, frozenset({"text", "audio"})))) == (
        "with everything and without audio and text"
    )


def test_what_a_step_cache_remembers_is_forgotten():
    class Memories:
        cleared = 0

        def clear(self):
            self.cleared += 1

    memories, conditions = Memories(), Conditions(positive=rand(3, 4))
    guidance = Guidance(cfg=(1.0,))
    Denoiser(LinearModel(), conditions, guidance=guidance, device=CPU, dtype=torch.float32, memories=memories).forget()
    assert memories.cleared == 1


def test_two_systems_that_guide_are_both_named():
    class Other(MultiTalkEmbeds):
        pass

    speech = MultiTalkEmbeds(features=(rand(9, 2, 3),), cfg_scale=2.0)
    other = Other(features=(rand(9, 2, 3),), cfg_scale=3.0)
    with pytest.raises(ValueError, match="MultiTalkEmbeds and Other"):
        Guidance(cfg=(5.0,), payloads=(speech, other)).rows(Step())
    assert len(Guidance(cfg=(5.0,), payloads=(speech, replace(other, cfg_scale=1.0))).rows(Step())) == 3


def test_modifiers_change_how_predictions_are_combined_the_first_outermost():
    class Times(Modifier):
        def __init__(self, factor, shift):
            self.factor, self.shift = factor, shift

        def around_guidance(self, combine):
            return lambda rows, predictions, step: self.factor * combine(rows, predictions, step) + self.shift

    model, latents = LinearModel(), rand(*SHAPE)
    plain = denoiser(model, Guidance(cfg=(5.0,)))(latents, torch.tensor(1.0), Step())
    changed = denoiser(model, Guidance(cfg=(5.0,), modifiers=(Times(2.0, 1.0), Times(3.0, 4.0))))
    torch.testing.assert_close(changed(latents, torch.tensor(1.0), Step()), 2 * (3 * plain + 4) + 1)


def test_scales_go_on_with_their_last_value():
    guidance = guidance_of([6.0, 3.0, 1.0], 4)
    weights = [guidance.rows(Step(in_run=i, index=i, total=10))[0].weight for i in (0, 1, 2, 9)]
    assert weights == [6.0, 3.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="empty"):
        per_step([])


def test_how_many_passes_may_share_a_forward():
    assert guidance_of(6.0, 4.0).most_passes(3) == 1
    assert guidance_of(1.0, batched=True).most_passes(3) == 1
    assert guidance_of([1.0, 6.0], batched=True).most_passes(3) == 2
    assert guidance_of(6.0, [1.0, 1.0, 4.0], batched=True).most_passes(3) == 3
    assert guidance_of(6.0, [1.0, 1.0, 4.0], batched=True).most_passes(2) == 2


def test_a_step_in_the_run_is_one_of_the_schedule_for_those_that_count_by_it():
    """What guides in a part of the schedule is asked about the steps that there are."""
    asked = []

    class Watching(MultiTalkEmbeds):
        def guidance(self, text_scale, step):
            asked.append((step.index, step.total, step.in_run))

    payload = Watching(features=(rand(9, 2, 3),))
    Guidance(cfg=(1.0,), payloads=(payload,), batched=True).most_passes(3)
    assert asked == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]


def test_missing_negative_prompt_is_named():
    model = LinearModel()
    guided = denoiser(model, Guidance(cfg=(5.0, 1.0)), negative=False)
    with pytest.raises(ValueError, match="no negative prompt"):
        guided(rand(*SHAPE), torch.tensor(1.0), Step())
    assert guided(rand(*SHAPE), torch.tensor(1.0), Step(in_run=1, index=1, total=2)).shape == SHAPE


def test_latents_timestep_and_step_reach_the_model():
    model = LinearModel()
    latents, timestep, step = rand(*SHAPE), torch.tensor([0.0, 500.0, 500.0]), Step(index=3, total=9)
    denoiser(model, Guidance(cfg=(2.0,), batched=True))(latents, timestep, step)
    (inputs,) = model.seen
    torch.testing.assert_close(inputs.latents, latents.expand(2, -1, -1, -1, -1))
    torch.testing.assert_close(inputs.timestep, timestep.expand(2, -1))
    assert inputs.step == step and inputs.latents.dtype == torch.float32 and inputs.riflex_index == 0


def test_passes_of_unlike_shape_do_not_share_a_forward():
    """Two speakers fall silent as one, so the silent pass cannot be stacked with the others."""
    model = LinearModel()
    guided = denoiser(model, guidance_of(5.0, 4.0, batched=True), speech(speakers=2))
    guided(rand(*SHAPE), torch.tensor(1.0), Step())
    assert model.batches == [2, 1]


@dataclass(frozen=True)
class Texts(Payload):
    texts: tuple[torch.Tensor, ...]
    needs: ClassVar[str] = "none"

    def without(self, names):
        return Texts(()) if "text" in names else self


def test_payloads_with_several_tensors_are_compared_by_all_of_them():
    model = LinearModel()
    guided = denoiser(model, Guidance(cfg=(5.0,), batched=True), Texts((rand(2), rand(3))))
    guided(rand(*SHAPE), torch.tensor(1.0), Step())
    assert model.batches == [1, 1]


@dataclass(frozen=True)
class Tuned(Payload):
    strength: float
    blocks: list[int]
    needs: ClassVar[str] = "none"

    def without(self, names):
        return Tuned(float(str(self.strength)), self.blocks)


def test_settings_that_are_equal_share_a_forward():
    model = LinearModel()
    guided = denoiser(model, Guidance(cfg=(5.0,), batched=True), Tuned(0.37, [1, 2]))
    guided(rand(*SHAPE), torch.tensor(1.0), Step())
    assert model.batches == [2]


@dataclass(frozen=True)
class Sounds(Payload):
    needs: ClassVar[str] = "none"
    together: ClassVar[bool] = True


@pytest.mark.parametrize("payloads", [(), (Sounds(),)])
def test_processes_run_all_passes_together_where_one_leaves_more_than_its_velocity(payloads):
    asked = []

    class Noting(Ranks):
        def each(self, jobs, run, *, together=False):
            asked.append(together)
            return super().each(jobs, run, together=together)

    model = LinearModel()
    model.ranks = Noting()
    denoiser(model, Guidance(cfg=(5.0,)), *payloads)(rand(*SHAPE), torch.tensor(1.0), Step())
    assert asked == [bool(payloads)]


def wan_model(seed=0):
    """A tiny image-to-video transformer with random weights."""
    config = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=36, text_dim=8, text_len=6)
    model = WanModel(config, (ImageToVideo(), ClipImageExtension(clip_dim=4), EnhanceAVideo())).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.requires_grad_(False)


def test_batched_equals_sequential_on_the_transformer():
    """Also when the number of passes changes within a run."""
    model = wan_model()
    clip = ClipImage(rand(1, 6, 4, seed=8))
    picture = ImageCondition(rand(1, 16, 3, 4, 4, seed=3), rand(1, 4, 3, 4, 4, seed=5))
    for payload in (clip, ClipImage(clip.positive, rand(1, 6, 4, seed=9))):
        conditions = Conditions(
            positive=rand(5, 8, seed=1), negative=rand(3, 8, seed=2), payloads=(picture, payload, EnhanceArgs(2.0))
        )
        results = []
        for batched in (False, True):
            guidance = Guidance(cfg=(5.0, 1.0, 4.0), batched=batched)
            guided = Denoiser(model, conditions, guidance=guidance, device=CPU, dtype=torch.float32)
            latents = rand(*SHAPE, seed=4)
            run = [guided(latents, torch.tensor(900.0 - 300 * i), Step(index=i, total=3, in_run=i)) for i in range(3)]
            results.append(torch.stack(run))
        assert results[0].std() > 0.05
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
