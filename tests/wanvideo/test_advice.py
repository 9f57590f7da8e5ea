"""Settings that seldom give what is wanted are named: of distilled files, of caches at few steps, of long videos."""

from pathlib import Path

import pytest
import torch
from sampler_stand_in import SHAPE, FakeHost, FakeModel, rand, request, schedule
from wanvideo_wrapper.cache_methods.teacache import TeaCache
from wanvideo_wrapper.wanvideo import advice
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modifier import Modifier
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample

PUBLISHED = [
    "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",
    "Wan2.1_I2V_14B_FusionX_LoRA.safetensors",
    "Wan14BT2VFusioniX_LoRA.safetensors",
    "Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors",
    "Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16.safetensors",
    "FastWan_T2V_14B_480p_lora_rank_128_bf16.safetensors",
    "rCM_T2V_14B_lora_average_rank_94_bf16.safetensors",
]
PLAIN = ["Wan2_1-I2V-14B-720P_fp8_e4m3fn.safetensors", "detailz-wan.safetensors", "wan_5000_steps.safetensors"]


def model_with(name, strength=1.0, *, merge=False):
    """As the loader leaves it: merged files in its options, the others beside the weights."""
    file = LoraFile(path=Path(name), strength=strength, merge=merge)
    model = FakeModel(loras=() if merge else (file,))
    model.options = LoadOptions(base_dtype=torch.float32, loras=(file,))
    return model


def warnings(caplog, **changes):
    caplog.clear()
    advice.warn_of_settings(request(**changes))
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_distilled_loras_want_cfg_1_and_few_steps(name, merge, caplog):
    burnt, slow = warnings(caplog, model=model_with(name, merge=merge), cfg=5.0, schedule=schedule(steps=30))
    assert burnt.startswith(name) and burnt.endswith("Set cfg to 1.") and "cfg 5 " in burnt
    assert slow.startswith(name) and "30 of them" in slow and slow.endswith("Set steps to 4 to 8.")
    assert not warnings(caplog, model=model_with(name, merge=merge), cfg=1.0, schedule=schedule(steps=6))


def test_distilled_models_do_too(caplog):
    model = FakeModel()
    model.path = Path("Wan14BT2VFusioniX_fp8.safetensors")
    assert len(warnings(caplog, model=model, cfg=6.0, schedule=schedule(steps=50))) == 2


@pytest.mark.parametrize("name", PLAIN)
def test_others_run_as_they_please(name, caplog):
    assert not warnings(caplog, model=model_with(name), cfg=5.0, schedule=schedule(steps=30))


def test_a_weak_one_or_guidance_for_some_steps_is_meant(caplog):
    weak = model_with(PUBLISHED[0], 0.3)
    assert not warnings(caplog, model=weak, cfg=5.0, schedule=schedule(steps=30))
    assert not warnings(caplog, model=model_with(PUBLISHED[0]), cfg=[3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    # The last number is of no step.
    assert warnings(caplog, model=model_with(PUBLISHED[0]), cfg=[3.0] * 6 + [1.0])


def test_a_cache_at_few_steps(caplog):
    cache = TeaCache(threshold=0.1, use_coefficients=False)
    (line,) = warnings(caplog, cache=cache, schedule=schedule(steps=4))
    assert line.startswith("TeaCache leaves out steps") and "of 4 steps" in line and line.endswith("cache_args.")
    # Each half of a run of eight steps.
    first_half = {"samples": rand(1, *SHAPE)}
    assert warnings(caplog, cache=cache, samples=first_half, schedule=schedule(steps=8, start_step=4))
    assert not warnings(caplog, cache=cache, samples=first_half, schedule=schedule(steps=12, start_step=6))
    assert not warnings(caplog, cache=cache, schedule=schedule(steps=20))


@pytest.mark.parametrize("part", [{"start_step": 3}, {"denoise_strength": 0.5}])
def test_a_run_that_begins_later_needs_something_to_begin_with(part, caplog):
    (line,) = warnings(caplog, schedule=schedule(**part))
    assert line.startswith("start_step or denoise_strength leaves out") and "no samples" in line
    assert not warnings(caplog, schedule=schedule(**part), samples={"samples": rand(1, *SHAPE)})
    assert not warnings(caplog, schedule=schedule())

    class Begins(Modifier):
        def begin(self, start, schedule, generator):
            return start

    assert not warnings(caplog, schedule=schedule(**part), modifiers=(Begins(),))
    image = ImageEmbeds(latent_shape=SHAPE, num_frames=9, modifiers=(Begins(),))
    assert not warnings(caplog, schedule=schedule(**part), image=image)


def test_a_second_sampler_goes_on_without_the_mask_of_the_first(caplog):
    painted = {"samples": rand(1, *SHAPE), "original_image": rand(*SHAPE)}
    (line,) = warnings(caplog, samples=painted)
    assert line.startswith("The sampler before painted within a mask") and "Set Latent Noise Mask" in line
    assert not warnings(caplog, samples={**painted, "noise_mask": torch.ones(1, 4, 6)})
    assert not warnings(caplog, samples={**painted, "original_image": None})


def test_the_sampler_says_it(caplog):
    sample(request(model_with(PUBLISHED[0]), cfg=3.0), FakeHost())
    assert "Set cfg to 1." in caplog.text
