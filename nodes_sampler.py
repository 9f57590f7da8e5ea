"""Sampler nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace

from torch import Tensor

from .host import get_host
from .node_checks import Types, need_link, verdict
from .node_tools import CATEGORY, Inputs, Latent, mappings
from .nodes_schedule import SCHEDULER, SHIFT
from .wanvideo.loading import WanVideoModel
from .wanvideo.modifier import Modifier
from .wanvideo.request import NO_PROMPT, ImageEmbeds, SampleRequest, TextEmbeds, contributions
from .wanvideo.sampling import sample
from .wanvideo.schedulers import Schedule, ScheduleSpec, make_schedule
from .wanvideo.step_cache import StepCache
from .wanvideo.windows import ContextOptions

log = logging.getLogger("wanvideo")

SamplerArgs = dict[str, object]

SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF})
CFG = ("FLOAT", {"default": 6.0, "min": 0.0, "max": 30.0, "step": 0.01})
RIFLEX = (
    "INT",
    {"default": 0, "min": 0, "max": 1000, "step": 1, "tooltip": "RIFLEx: 6 lets videos run longer without repeating"},
)
ROPE_TIP = "All run the same kernel here; WanVideo RoPE Function scales positions"
ROPE = (["default", "comfy", "comfy_chunked"], {"default": "comfy", "tooltip": ROPE_TIP})
ADD_NOISE = ("BOOLEAN", {"default": False, "tooltip": "For samples that are clean video"})
# Sockets of the original, in its order: saved graphs count on both. What comes out of them is handled alike.
ADVANCED = {
    "unianimate_poses": ("UNIANIMATE_POSE",),
    "fantasytalking_embeds": ("FANTASYTALKING_EMBEDS",),
    "uni3c_embeds": ("UNI3C_EMBEDS",),
    "multitalk_embeds": ("MULTITALK_EMBEDS",),
}


class WanVideoSampler:
    """Samples latents, or a whole talking video where the image embeds come from the Multi/InfiniteTalk node."""

    DISPLAY_NAME = "WanVideo Sampler"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("samples", "denoised_samples")
    RENAMED_INPUTS = {"teacache_args": "cache_args"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": ("WANVIDEOMODEL",),
                "image_embeds": ("WANVIDIMAGE_EMBEDS",),
                "steps": ("INT", {"default": 30, "min": 1}),
                "cfg": CFG,
                "shift": SHIFT,
                "seed": SEED,
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": "Free the GPU afterwards"}),
                "scheduler": SCHEDULER,
                "riflex_freq_index": RIFLEX,
            },
            "optional": {
                "text_embeds": ("WANVIDEOTEXTEMBEDS",),
                "samples": ("LATENT", {"tooltip": "Latents to start or to go on from"}),
                "denoise_strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "feta_args": ("FETAARGS",),
                "context_options": ("WANVIDCONTEXT",),
                "cache_args": ("CACHEARGS",),
                "flowedit_args": ("FLOWEDITARGS",),
                "batched_cfg": ("BOOLEAN", {"default": False, "tooltip": "Both passes in one, for more memory"}),
                "slg_args": ("SLGARGS",),
                "rope_function": ROPE,
                "loop_args": ("LOOPARGS",),
                "experimental_args": ("EXPERIMENTALARGS",),
                "sigmas": ("SIGMAS",),
                **ADVANCED,
                "freeinit_args": ("FREEINITARGS",),
                "start_step": ("INT", {"default": 0, "min": 0, "max": 10000, "step": 1}),
                "end_step": ("INT", {"default": -1, "min": -1, "max": 10000, "step": 1, "tooltip": "-1: to the end"}),
                "add_noise_to_samples": ADD_NOISE,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        steps: int = 30,
        shift: float = 5.0,
        scheduler: str = "unipc",
        denoise_strength: float = 1.0,
        start_step: int = 0,
        end_step: int = -1,
        input_types: Types | None = None,
    ) -> bool:
        """A prompt, and a schedule that can be made."""
        part = {"denoise_strength": denoise_strength, "start_step": start_step, "end_step": end_step}

        def check(**values: object) -> None:
            need_link(input_types, "text_embeds", NO_PROMPT)
            if "sigmas" not in (input_types or {}):
                make_schedule(ScheduleSpec(name=scheduler, steps=steps, shift=shift, **part))

        return verdict(cls, check, input_types, steps=steps, shift=shift, scheduler=scheduler, **part)

    def process(
        self,
        model: WanVideoModel,
        image_embeds: ImageEmbeds,
        shift: float,
        steps: int,
        cfg: float | Sequence[float],
        seed: int,
        scheduler: str | Schedule,
        riflex_freq_index: int,
        text_embeds: TextEmbeds | None = None,
        force_offload: bool = True,
        samples: Latent | None = None,
        *,
        denoise_strength: float = 1.0,
        context_options: ContextOptions | None = None,
        cache_args: StepCache | None = None,
        batched_cfg: bool = False,
        sigmas: Tensor | None = None,
        start_step: int = 0,
        end_step: int = -1,
        add_noise_to_samples: bool = False,
        rope_function: str | Modifier = "comfy",
        **sockets: object,
    ) -> tuple[Latent, Latent]:
        """The result and the last estimate of the clean latents. sockets: payloads and modifiers, by their names."""
        payloads, modifiers = contributions((_positions(rope_function), *sockets.items()))
        part = {
            "sigmas": sigmas, "denoise_strength": denoise_strength, "start_step": start_step, "end_step": end_step,
        }  # fmt: skip
        if isinstance(scheduler, str):
            schedule = make_schedule(ScheduleSpec(name=scheduler, steps=steps, shift=shift, **part))
        else:
            schedule = _connected(scheduler, steps, shift, part)
        request = SampleRequest(
            model=model,
            text=text_embeds,
            image=image_embeds,
            schedule=schedule,
            cfg=cfg,
            seed=seed,
            samples=samples,
            add_noise_to_samples=bool(add_noise_to_samples),
            batched_cfg=bool(batched_cfg),
            riflex_index=riflex_freq_index,
            payloads=payloads,
            modifiers=modifiers,
            context=context_options,
            cache=cache_args,
            force_offload=force_offload,
        )
        return sample(request, get_host())


def _connected(schedule: Schedule, steps: int, shift: float, part: SamplerArgs) -> Schedule:
    """A connected schedule; of the sampler's own widgets, those that choose a part of it hold for it, too."""
    spec = schedule.spec
    if (steps, shift) != (spec.steps, spec.shift):
        log.info("Steps (%d) and shift (%s) are those of the connected scheduler.", spec.steps, spec.shift)
    usual = {f.name: f.default for f in fields(ScheduleSpec) if f.name in part}
    chosen = {name: value for name, value in part.items() if isinstance(value, Tensor) or value != usual[name]}
    return make_schedule(replace(spec, **chosen)) if chosen else schedule


def _positions(function: object) -> tuple[str, object]:
    """The socket rope_function: what a node made, nothing for the names of functions. Raises ValueError for others."""
    if not isinstance(function, str):
        return "rope_function", function
    if function not in (*ROPE[0], ""):
        raise ValueError(f"rope_function must be one of {', '.join(ROPE[0])} in this version, not '{function}'.")
    return "rope_function", None


class WanVideoSamplerSettings(WanVideoSampler):
    """Collects all sampler inputs for WanVideoSamplerFromSettings."""

    DISPLAY_NAME = "WanVideo Sampler Settings"
    RETURN_TYPES = ("SAMPLER_ARGS",)
    RETURN_NAMES = ("sampler_inputs",)

    def process(self, **inputs: object) -> tuple[SamplerArgs]:
        """The inputs under their names."""
        return (inputs,)


class WanVideoSamplerFromSettings:
    """Runs the sampler with collected inputs."""

    DISPLAY_NAME = "WanVideo Sampler From Settings"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("samples", "denoised_samples")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"sampler_inputs": ("SAMPLER_ARGS",)}}

    def process(self, sampler_inputs: SamplerArgs) -> tuple[Latent, Latent]:
        """As WanVideoSampler."""
        return WanVideoSampler().process(**sampler_inputs)


class WanVideoSamplerExtraArgs:
    """Options of WanVideoSamplerv2 that are seldom needed."""

    DISPLAY_NAME = "WanVideoSampler v2 Extra Args"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDSAMPLEREXTRAARGS",)
    RETURN_NAMES = ("extra_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {},
            "optional": {
                "riflex_freq_index": RIFLEX,
                "feta_args": ("FETAARGS",),
                "context_options": ("WANVIDCONTEXT",),
                "cache_args": ("CACHEARGS",),
                "slg_args": ("SLGARGS",),
                "rope_function": ROPE,
                "loop_args": ("LOOPARGS",),
                "experimental_args": ("EXPERIMENTALARGS",),
                **ADVANCED,
            },
        }

    def process(
        self,
        riflex_freq_index: int = 0,
        context_options: ContextOptions | None = None,
        cache_args: StepCache | None = None,
        rope_function: str | Modifier = "comfy",
        **sockets: object,
    ) -> tuple[SamplerArgs]:
        """Fields of the request. sockets: payloads and modifiers, by their names."""
        payloads, modifiers = contributions((_positions(rope_function), *sockets.items()))
        args = {"riflex_index": riflex_freq_index, "payloads": payloads, "modifiers": modifiers}
        return ({**args, "context": context_options, "cache": cache_args},)


class WanVideoSamplerv2:
    """The sampler with its schedule and seldom used options from nodes of their own."""

    DISPLAY_NAME = "WanVideo Sampler v2"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("samples", "denoised_samples")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": ("WANVIDEOMODEL",),
                "image_embeds": ("WANVIDIMAGE_EMBEDS",),
                "cfg": CFG,
                "seed": SEED,
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": "Free the GPU afterwards"}),
                "scheduler": ("WANVIDEOSCHEDULER",),
            },
            "optional": {
                "text_embeds": ("WANVIDEOTEXTEMBEDS",),
                "samples": ("LATENT", {"tooltip": "Latents to start or to go on from"}),
                "add_noise_to_samples": ADD_NOISE,
                "extra_args": ("WANVIDSAMPLEREXTRAARGS",),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Types | None = None) -> bool:
        """A prompt."""
        return verdict(cls, lambda: need_link(input_types, "text_embeds", NO_PROMPT), input_types)

    def process(
        self,
        model: WanVideoModel,
        image_embeds: ImageEmbeds,
        cfg: float | Sequence[float],
        seed: int,
        force_offload: bool,
        scheduler: Schedule,
        text_embeds: TextEmbeds | None = None,
        samples: Latent | None = None,
        add_noise_to_samples: bool = False,
        extra_args: SamplerArgs | None = None,
    ) -> tuple[Latent, Latent]:
        """The result and the last estimate of the clean latents."""
        request = SampleRequest(
            model=model,
            text=text_embeds,
            image=image_embeds,
            schedule=scheduler,
            cfg=cfg,
            seed=seed,
            samples=samples,
            add_noise_to_samples=bool(add_noise_to_samples),
            force_offload=force_offload,
            **(extra_args or {}),
        )
        return sample(request, get_host())


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoSampler,
    WanVideoSamplerSettings,
    WanVideoSamplerFromSettings,
    WanVideoSamplerExtraArgs,
    WanVideoSamplerv2,
)
