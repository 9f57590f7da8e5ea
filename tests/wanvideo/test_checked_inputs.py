"""What is connected to the sampler is looked at before the model: prompts for every step, NaN, sizes of the 5B."""

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from sampler_stand_in import (
    SHAPE,
    FakeHost,
    FakeModel,
    GaussianTransformer,
    config,
    latents_of,
    rand,
    request,
    schedule,
)
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.node_tools import round_size
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.finite import check_finite, is_finite
from wanvideo_wrapper.wanvideo.images import to_video
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_seen(dtype, bad):
    values = rand(3, 5, 7, seed=1)
    assert is_finite(values.to(dtype))
    values[2, 4, 6] = bad
    assert not is_finite(values.to(dtype))
    with pytest.raises(ValueError, match=r"^The pictures hold NaN or infinity \(first in frame 2\): look at the node"):
        check_finite("The pictures hold", values.to(dtype), unit="frame")


def test_what_has_no_nan_is_finite():
    assert is_finite(torch.empty(0)) and is_finite(torch.arange(3)) and is_finite(torch.tensor([True]))


def test_pictures_with_nan_never_reach_a_vae():
    images = torch.rand(4, 8, 8, 3)
    images[3, 1, 2, 0] = float("nan")
    for size in ((), (16, 16)):
        with pytest.raises(ValueError, match="first in frame 3"):
            to_video(images, *size)


def test_nan_is_seen_at_any_depth():
    inner = ClipImage(positive=spoiled(rand(1, 2, 3)))

    @dataclass(frozen=True)
    class Several(Payload):
        parts: tuple[tuple[ClipImage, ...], ...]
        needs: ClassVar[str] = "none"

        def to(self, device, dtype):
            return self

    with pytest.raises(ValueError, match=r"connected as Several \(parts\) holds NaN"):
        sample(request(payloads=(Several(((inner,),)),)), FakeHost())


def spoiled(tensor):
    tensor.view(-1)[-1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": {"samples": spoiled(rand(1, *SHAPE))}, "add_noise_to_samples": True}, r"\(samples\) hold NaN"),
        ({"samples": {"samples": rand(1, *SHAPE), "noise_mask": spoiled(rand(1, 4, 6))}}, r"\(noise_mask\) hold NaN"),
        ({"text": TextEmbeds(positive=(spoiled(rand(3, 8)),), negative=(rand(3, 8),))}, "text embeds hold NaN"),
        ({"text": TextEmbeds(positive=(rand(3, 8),), negative=(spoiled(rand(3, 8)),))}, "text embeds hold NaN"),
        ({"payloads": (ClipImage(positive=spoiled(rand(1, 6, 4))),)}, r"ClipImage \(positive\) holds NaN"),
        (
            {"image": ImageEmbeds(latent_shape=SHAPE, num_frames=9, given_latents=((0, spoiled(rand(16, 1, 4, 6))),))},
            "extra latents hold NaN",
        ),
    ],
)
def test_nan_is_named_before_the_model_runs(change, says):
    asked = request(**change)
    with pytest.raises(ValueError, match=says):
        sample(asked, FakeHost())
    assert asked.model.transformer.calls == [] and "enter" not in asked.model.events


@pytest.mark.parametrize("cfg", [3.0, [1.0, 1.0, 5.0]])
def test_a_cfg_that_needs_a_negative_prompt_at_any_step_is_refused_before_the_first(cfg):
    asked = replace(request(cfg=cfg, schedule=schedule("euler")), text=TextEmbeds(positive=(rand(3, 8),)))
    with pytest.raises(ValueError, match="no negative prompt"):
        sample(asked, FakeHost())
    assert asked.model.transformer.calls == []
    sample(replace(asked, cfg=[1.0, 1.0]), FakeHost())
    assert asked.model.transformer.calls


@pytest.mark.parametrize("changed", ["positive", "negative"])
def test_prompts_of_another_encoder_are_refused_before_the_model_runs(changed):
    """What ComfyUI's Load CLIP makes of a file under another type than 'wan'."""
    texts = TextEmbeds(positive=(rand(3, 8),), negative=(rand(3, 8),))
    asked = request(text=replace(texts, **{changed: (rand(3, 12),)}))
    with pytest.raises(ValueError, match=r"embeds are 12 channels wide, and this model reads 8: .*type 'wan'"):
        sample(asked, FakeHost())
    assert asked.model.transformer.calls == [] and "enter" not in asked.model.events
    wordless = FakeModel(GaussianTransformer(config(text_dim=0)))
    sample(request(wordless, text=TextEmbeds(positive=(rand(3, 12),), negative=(rand(3, 12),))), FakeHost())


@pytest.mark.parametrize(("factor", "size"), [(8, (1280, 720)), (16, (1280, 704))])
def test_sides_are_what_the_vae_and_its_model_can_run(factor, size, caplog):
    caplog.set_level(logging.INFO, "wanvideo")
    assert round_size(1280, 720, SimpleNamespace(spatial_factor=factor)) == size
    assert ("1280x720 is rounded to 1280x704: sides must divide by 32" in caplog.text) == (factor == 16)
    assert round_size(20, 20, SimpleNamespace(spatial_factor=factor)) == (2 * factor, 2 * factor)


def test_empty_embeds_of_half_a_token_are_rounded_for_the_5b(caplog):
    caplog.set_level(logging.INFO, "wanvideo")
    transformer = GaussianTransformer(config(in_dim=48, out_dim=48))
    image = ImageEmbeds(latent_shape=(16, 3, 10, 14), num_frames=9)
    assert latents_of(sample(request(FakeModel(transformer), image=image), FakeHost())).shape == (48, 3, 4, 6)
    assert "112x80 is rounded to 96x64: sides must divide by 32 for the 5B" in caplog.text
