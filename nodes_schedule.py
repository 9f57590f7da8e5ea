"""Nodes that say when and over which frames a run works: schedules and context windows."""

from __future__ import annotations

import functools

from torch import Tensor

from .node_checks import Types, verdict
from .node_tools import CATEGORY, Inputs, mappings
from .wanvideo.schedulers import SCHEDULERS, Schedule, ScheduleSpec, make_schedule
from .wanvideo.schedulers.comfy_model import FlowModel
from .wanvideo.windows import FUSE_METHODS, SCHEDULES, ContextOptions

Latent = dict[str, object]

SCHEDULER = (list(SCHEDULERS), {"default": "unipc", "tooltip": "Distilled models name theirs; unipc suits the others"})
SHIFT_TIP = "Higher spends more steps at high noise; 5 to 8 for 14B at 480p and 720p"
SHIFT = ("FLOAT", {"default": 5.0, "min": 0.0, "max": 1000.0, "step": 0.01, "tooltip": SHIFT_TIP})


class WanVideoScheduler:
    """Makes the sigmas of a scheduler, and passes its settings on."""

    DISPLAY_NAME = "WanVideo Scheduler"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("SIGMAS", "INT", "FLOAT", SCHEDULER[0], "INT", "INT")
    RETURN_NAMES = ("sigmas", "steps", "shift", "scheduler", "start_step", "end_step")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "scheduler": SCHEDULER,
                "steps": (
                    "INT",
                    {"default": 30, "min": 1, "tooltip": "Of the whole run, also where only a part is sampled"},
                ),
                "shift": SHIFT,
                "start_step": ("INT", {"default": 0, "min": 0, "tooltip": "The first step to sample, counted from 0"}),
                "end_step": ("INT", {"default": -1, "min": -1, "tooltip": "-1: to the end"}),
            },
            "optional": {
                "sigmas": ("SIGMAS", {"tooltip": "Noise levels to use instead of the scheduler's own"}),
                "enhance_hf": ("BOOLEAN", {"default": False, "tooltip": "More steps at low noise"}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        scheduler: str = "unipc",
        steps: int = 30,
        shift: float = 5.0,
        start_step: int = 0,
        end_step: int = -1,
        input_types: Types | None = None,
    ) -> bool:
        """A schedule that can be made, as far as its widgets tell."""
        part = {"steps": steps, "shift": shift, "start_step": start_step, "end_step": end_step}

        def check(**values: object) -> None:
            if "sigmas" not in (input_types or {}):
                make_schedule(ScheduleSpec(name=scheduler, **part))

        return verdict(cls, check, input_types, scheduler=scheduler, **part)

    def process(
        self,
        scheduler: str,
        steps: int,
        start_step: int,
        end_step: int,
        shift: float,
        unique_id: str | None = None,
        sigmas: Tensor | None = None,
        enhance_hf: bool = False,
    ) -> tuple[Tensor, int, float, Schedule, int, int]:
        """All sigmas, the settings, and the schedule itself where a sampler takes a scheduler's name."""
        spec = ScheduleSpec(
            name=scheduler,
            steps=steps,
            shift=shift,
            sigmas=sigmas,
            start_step=start_step,
            end_step=end_step,
            enhance_hf=bool(enhance_hf),
        )
        schedule = make_schedule(spec)
        return schedule.all_sigmas, schedule.total, shift, schedule, start_step, end_step


class WanVideoSchedulerv2(WanVideoScheduler):
    """Makes a schedule for WanVideoSamplerv2."""

    DISPLAY_NAME = "WanVideo Scheduler v2"
    RETURN_TYPES = ("WANVIDEOSCHEDULER",)
    RETURN_NAMES = ("scheduler",)

    # With the parameters of the other, which calls in order go by.
    @functools.wraps(WanVideoScheduler.process, assigned=())
    def process(self, **widgets: object) -> tuple[Schedule]:
        """The schedule."""
        return (super().process(**widgets)[3],)


class WanVideoContextOptions:
    """Cuts a video longer than the model's into windows that are blended at every step."""

    DISPLAY_NAME = "WanVideo Context Options"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDCONTEXT",)
    RETURN_NAMES = ("context_options",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        frames = {"min": 4, "max": 100, "step": 1}
        return {
            "required": {
                "context_schedule": (list(SCHEDULES), {"tooltip": "How windows lie; looped: the end meets the start"}),
                "context_frames": (
                    "INT",
                    {"default": 81, "min": 2, "max": 1000, "step": 1, "tooltip": "Pixel frames of a window"},
                ),
                "context_stride": ("INT", {"default": 4, **frames, "tooltip": "8 adds windows of every 2nd latent"}),
                "context_overlap": ("INT", {"default": 16, **frames, "tooltip": "Pixel frames that windows share"}),
                "freenoise": ("BOOLEAN", {"default": True, "tooltip": "Windows start from the same noise, shuffled"}),
                "verbose": ("BOOLEAN", {"default": False, "tooltip": "Log every window"}),
            },
            "optional": {
                "fuse_method": (list(FUSE_METHODS), {"default": "linear", "tooltip": "How overlaps are weighed"}),
                "reference_latent": ("LATENT", {"tooltip": "Start picture of the windows after the first"}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, context_frames: int = 81, context_overlap: int = 16, input_types: Types | None = None
    ) -> bool:
        """Windows that move on."""

        def check(context_frames: int, context_overlap: int) -> None:
            ContextOptions(size=context_frames, overlap=context_overlap).check()

        return verdict(cls, check, input_types, context_frames=context_frames, context_overlap=context_overlap)

    def process(
        self,
        context_schedule: str,
        context_frames: int,
        context_stride: int,
        context_overlap: int,
        freenoise: bool,
        verbose: bool,
        *,
        fuse_method: str = "linear",
        reference_latent: Latent | None = None,
    ) -> tuple[ContextOptions]:
        """Collect the settings."""
        options = ContextOptions(
            schedule=context_schedule,
            size=context_frames,
            stride=context_stride,
            overlap=context_overlap,
            freenoise=bool(freenoise),
            fuse=fuse_method,
            verbose=bool(verbose),
            reference=None if reference_latent is None else reference_latent["samples"],
        )
        return (options,)


class WanVideoSigmaToStep:
    """Lets a sampler start or end at a noise level in the place of a step."""

    DISPLAY_NAME = "WanVideo Sigma To Step"
    CATEGORY = CATEGORY
    FUNCTION = "convert"
    RETURN_TYPES = ("INT",)
    RETURN_NAMES = ("step",)
    DESCRIPTION = "For start_step and end_step of a sampler: the split is at a noise level, whatever the steps are."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "Noise level from 1 (noise) to 0 (video); 0.9 is where Wan 2.2 image to video changes its model"
        sigma = {"default": 0.9, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": tip}
        return {"required": {"sigma": ("FLOAT", sigma)}}

    def convert(self, sigma: float) -> tuple[float]:
        """The noise level, which samplers tell from a step by its type."""
        return (float(sigma),)


class DummyComfyWanModelObject:
    """Stands in for a Wan model where ComfyUI makes sigmas."""

    DISPLAY_NAME = "Dummy Comfy Wan Model Object"
    CATEGORY = CATEGORY
    FUNCTION = "create"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "For ComfyUI's BasicScheduler, whose sigmas a sampler of this pack then takes; no weights are loaded."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        shift = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": f"Above 0. {SHIFT_TIP}"}
        return {"required": {"shift": ("FLOAT", shift)}}

    @classmethod
    def VALIDATE_INPUTS(cls, shift: float = 1.0, input_types: Types | None = None) -> bool:
        """A shift above 0."""
        return verdict(cls, FlowModel, input_types, shift=shift)

    def create(self, shift: float) -> tuple[FlowModel]:
        """A MODEL that has noise levels and nothing else."""
        return (FlowModel(shift),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoScheduler, WanVideoSchedulerv2, WanVideoContextOptions, WanVideoSigmaToStep, DummyComfyWanModelObject
)
