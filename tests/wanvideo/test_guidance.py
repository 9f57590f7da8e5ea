"""Guidance rows against the published formulas; the Denoiser against a model whose answer is a known function."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from wanvideo_wrapper.enhance_a_video import EnhanceArgs
from wanvideo_wrapper.multitalk.extension import AudioWindow
from wanvideo_wrapper.wanvideo import registry
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Step
from wanvideo_wrapper.wanvideo.extensions.clip_image import ClipImage, ClipImageExtension
from wanvideo_wrapper.wanvideo.guidance import Conditioning, Conditions, Denoiser, Guidance, guidance_rows, per_step
from wanvideo_wrapper.wanvideo.modules.model import WanModel

CPU = torch.device("cpu")
SHAPE = (16, 3, 4, 4)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speech(seed=7, speakers=1):
    masks = None if speakers == 1 else torch.ones(speakers + 1, 8, 8)
    return AudioWindow(rand(1, speakers, 9, 5, 2, 3, seed=seed), torch.tensor(1.0), masks)


class LinearModel:
    """Answers scale * latents plus the sums of what conditions each batch row: linear, so formulas can be checked."""

    def __init__(self):
        self.batches = []
        self.seen = []

    @staticmethod
    def answer(latents, text, clip, audio):
        return 0.5 * latents[:16] + text.sum() + 3 * clip + 7 * audio

    def __call__(self, inputs):
        batch = inputs.latents.shape[0]
        self.batches.append(batch)
        self.seen.append(inputs)
        assert inputs.timestep.shape[0] == batch and len(inputs.text) == batch
        clip = audio = torch.zeros(batch)
        for payload in inputs.payloads:
            if isinstance(payload, ClipImage):
                clip = payload.tokens.flatten(1).sum(1).expand(batch)
            if isinstance(payload, AudioWindow):
                audio = payload.audio.flatten(1).sum(1).expand(batch)
        rows = zip(inputs.latents, inputs.text, clip, audio, strict=True)
        return torch.stack([self.answer(*row) for row in rows])


def denoiser(model, guidance, *, audio=None, clip=None, negative=True, channels=None):
    conditionings = []
    if clip is not None:
        conditionings.append(Conditioning(clip[0], no_text=clip[1]))
    if audio is not None:
        conditionings.append(Conditioning(audio, no_audio=audio.silent()))
    conditions = Conditions(
        positive=rand(5, 8, seed=1),
        negative=rand(3, 8, seed=2) if negative else None,
        channels=channels,
        conditionings=tuple(conditionings),
    )
    return Denoiser(model, conditions, guidance=guidance, device=CPU, dtype=torch.float32)


def predictions(latents, audio, clip):
    """The model's answer for (text kept, audio kept)."""
    given = {True: rand(5, 8, seed=1), False: rand(3, 8, seed=2)}

    def of(text, spoken):
        image = 0.0 if clip is None else (clip[0] if text or clip[1] is None else clip[1]).tokens.sum()
        return LinearModel.answer(latents, given[text], image, audio.audio.sum() if spoken and audio else 0.0)

    return of


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("text", "audio"), [(1.0, 1.0), (5.0, 1.0), (1.0, 4.0), (5.0, 4.0), (3.0, 3.0), (0.0, 1.0)])
def test_velocity_equals_the_published_formula(text, audio, batched):
    model, window = LinearModel(), speech()
    clip = (ClipImage(rand(1, 6, 4, seed=8)), ClipImage(rand(1, 6, 4, seed=9)))
    latents = rand(*SHAPE)
    guided = denoiser(model, Guidance(cfg=(text,), audio_cfg=(audio,), batched=batched), audio=window, clip=clip)
    velocity = guided(latents, torch.tensor(700.0), Step(), 0)
    p = predictions(latents, window, clip)
    if text == 1:
        want = p(True, False) + audio * (p(True, True) - p(True, False))
    else:
        nothing = p(False, False)
        want = nothing + text * (p(True, True) - p(False, True)) + audio * (p(False, True) - nothing)
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-3)
    passes = {(1, 1): 1, (5, 1): 2, (1, 4): 2, (5, 4): 3, (3, 3): 2, (0, 1): 1}[(int(text), int(audio))]
    assert model.batches == ([passes] if batched else [1] * passes)


def test_text_guidance_without_speech_ignores_the_audio_scale():
    model, latents = LinearModel(), rand(*SHAPE)
    velocity = denoiser(model, Guidance(cfg=(6.0,), audio_cfg=(4.0,)))(latents, torch.tensor(1.0), Step(), 0)
    p = predictions(latents, None, None)
    torch.testing.assert_close(velocity, p(False, True) + 6 * (p(True, True) - p(False, True)), rtol=1e-5, atol=1e-4)
    assert model.batches == [1, 1]


def test_negative_clip_features_go_with_the_negative_prompt():
    model = LinearModel()
    clip = (ClipImage(rand(1, 6, 4, seed=8)), ClipImage(rand(1, 6, 4, seed=9)))
    denoiser(model, Guidance(cfg=(2.0,)), clip=clip)(rand(*SHAPE), torch.tensor(1.0), Step(), 0)
    torch.testing.assert_close(model.seen[0].payloads[0].tokens, clip[0].tokens)
    torch.testing.assert_close(model.seen[1].payloads[0].tokens, clip[1].tokens)
    denoiser(model, Guidance(cfg=(2.0,)), clip=(clip[0], None))(rand(*SHAPE), torch.tensor(1.0), Step(), 0)
    torch.testing.assert_close(model.seen[3].payloads[0].tokens, clip[0].tokens)


def test_rows_weigh_one_together():
    for text in (0.0, 1.0, 2.5, 7.0):
        for audio in (0.0, 1.0, 2.5, 4.0):
            rows = guidance_rows(text, audio)
            assert sum(row.weight for row in rows) == pytest.approx(1.0)
            assert all(row.weight != 0 for row in rows) and len(set(r[:2] for r in rows)) == len(rows) <= 3


def test_scales_go_on_with_their_last_value():
    guidance = Guidance(cfg=per_step([6.0, 3.0, 1.0]), audio_cfg=per_step(4))
    assert [guidance.scales(i) for i in (0, 1, 2, 9)] == [(6.0, 4.0), (3.0, 4.0), (1.0, 4.0), (1.0, 4.0)]
    with pytest.raises(ValueError, match="empty"):
        per_step([])


def test_how_many_passes_may_share_a_forward():
    assert Guidance(cfg=(6.0,), audio_cfg=(4.0,)).batch == 1
    assert Guidance(cfg=(1.0,), batched=True).batch == 1
    assert Guidance(cfg=(1.0, 6.0), batched=True).batch == 2
    assert Guidance(cfg=(6.0,), audio_cfg=(1.0, 1.0, 4.0), batched=True).batch == 3


def test_missing_negative_prompt_is_named():
    model = LinearModel()
    guided = denoiser(model, Guidance(cfg=(5.0, 1.0)), negative=False)
    with pytest.raises(ValueError, match="no negative prompt"):
        guided(rand(*SHAPE), torch.tensor(1.0), Step(), 0)
    assert guided(rand(*SHAPE), torch.tensor(1.0), Step(), 1).shape == SHAPE


def test_channels_timestep_and_step_reach_the_model():
    model, channels = LinearModel(), rand(20, 3, 4, 4, seed=3)
    latents, timestep, step = rand(*SHAPE), torch.tensor([0.0, 500.0, 500.0]), Step(index=3, total=9)
    denoiser(model, Guidance(cfg=(2.0,), batched=True), channels=channels)(latents, timestep, step, 0)
    (inputs,) = model.seen
    torch.testing.assert_close(inputs.latents, torch.cat([latents, channels]).expand(2, -1, -1, -1, -1))
    torch.testing.assert_close(inputs.timestep, timestep.expand(2, -1))
    assert inputs.step == step and inputs.latents.dtype == torch.float32


def test_passes_of_unlike_shape_do_not_share_a_forward():
    """Two speakers fall silent as one, so the silent pass cannot be stacked with the others."""
    model = LinearModel()
    guided = denoiser(model, Guidance(cfg=(5.0,), audio_cfg=(4.0,), batched=True), audio=speech(speakers=2))
    guided(rand(*SHAPE), torch.tensor(1.0), Step(), 0)
    assert model.batches == [2, 1]


@dataclass(frozen=True)
class Texts:
    texts: tuple[torch.Tensor, ...]

    def to(self, device, dtype):
        return self

    def stack(self, others):
        return replace(self, texts=self.texts)


def test_payloads_with_several_tensors_are_compared_by_all_of_them():
    model = LinearModel()
    pair = Conditioning(Texts((rand(2), rand(3))), no_text=Texts(()))
    conditions = Conditions(positive=rand(5, 8), negative=rand(3, 8), conditionings=(pair,))
    guided = Denoiser(model, conditions, guidance=Guidance(cfg=(5.0,), batched=True), device=CPU, dtype=torch.float32)
    guided(rand(*SHAPE), torch.tensor(1.0), Step(), 0)
    assert model.batches == [1, 1]


def wan_model(seed=0):
    """A tiny image-to-video transformer with random weights."""
    config = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=36, text_dim=8, text_len=6)
    model = WanModel(config, (ClipImageExtension(clip_dim=4), registry.EnhanceAVideo())).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.requires_grad_(False)


def test_batched_equals_sequential_on_the_transformer():
    """Also when the number of passes changes within a run: what extensions keep must not leak between batch sizes."""
    model = wan_model()
    clip = Conditioning(ClipImage(rand(1, 6, 4, seed=8)))
    negative_clip = Conditioning(ClipImage(rand(1, 6, 4, seed=8)), no_text=ClipImage(rand(1, 6, 4, seed=9)))
    for conditioning in (clip, negative_clip):
        conditions = Conditions(
            positive=rand(5, 8, seed=1),
            negative=rand(3, 8, seed=2),
            channels=rand(20, 3, 4, 4, seed=3),
            conditionings=(conditioning, Conditioning(EnhanceArgs(2.0))),
        )
        results = []
        for batched in (False, True):
            guidance = Guidance(cfg=(5.0, 1.0, 4.0), batched=batched)
            guided = Denoiser(model, conditions, guidance=guidance, device=CPU, dtype=torch.float32)
            latents = rand(*SHAPE, seed=4)
            run = [guided(latents, torch.tensor(900.0 - 300 * i), Step(index=i, total=3), i) for i in range(3)]
            results.append(torch.stack(run))
        assert results[0].std() > 0.05
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
