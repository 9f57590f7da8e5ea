"""The sampler of SkyReels V2 diffusion forcing models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from ..host import get_host
from ..node_tools import CATEGORY, OFFLOAD_TIP, Inputs, Latent, mappings
from ..wanvideo.loading import WanVideoModel
from ..wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds, contributions
from ..wanvideo.sampling import sample
from ..wanvideo.schedulers import ScheduleSpec, make_schedule
from ..wanvideo.step_cache import StepCache
from .extension import FrameRate
from .prefix import KnownFrames

log = logging.getLogger("wanvideo")

SCHEDULERS = ["unipc", "unipc/beta", "euler", "euler/beta", "lcm", "lcm/beta"]
ROPES = ["default", "comfy"]
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


class WanVideoDiffusionForcingSampler:
    """Samples a video that may go on from given frames."""

    DISPLAY_NAME = "WanVideo Diffusion Forcing Sampler"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = (
        "Sampler of SkyReels V2 diffusion forcing models: every latent frame has a time of its own, so that a video "
        "goes on from prefix_samples, one picture or the last frames of another video."
    )
    RENAMED_INPUTS = {"teacache_args": "cache_args"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        noise = "Noise that the known frames are seen with, of 1000: a little hides their seams in long videos"
        cfg = "How strictly the prompt is followed; 1 turns it off and halves the time"
        shift = "Higher spends more steps at high noise; 8 for text, 5 for pictures"
        part = "Below 1 keeps part of samples"
        known = "Encoded frames that the video begins with and goes on from"
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": "A SkyReels V2 diffusion forcing model"}),
                "text_embeds": ("WANVIDEOTEXTEMBEDS", {"tooltip": "The prompts"}),
                "image_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Size and frames, known ones included"}),
                "addnoise_condition": ("INT", {"default": 10, "min": 0, "max": 1000, "tooltip": noise}),
                "fps": (
                    "FLOAT",
                    {"default": 24.0, "min": 1.0, "max": 120.0, "step": 0.01, "tooltip": "16, or any other for 24"},
                ),
                "steps": ("INT", {"default": 30, "min": 1, "tooltip": "30 to 50 for these models"}),
                "cfg": ("FLOAT", {"default": 6.0, "min": 0.0, "max": 30.0, "step": 0.01, "tooltip": cfg}),
                "shift": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 1000.0, "step": 0.01, "tooltip": shift}),
                "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "tooltip": "Same seed, same video"}),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
                "scheduler": (SCHEDULERS, {"default": "unipc", "tooltip": "unipc is the authors'"}),
            },
            "optional": {
                "samples": ("LATENT", {"tooltip": "Clean video to start from where denoise_strength is below 1"}),
                "prefix_samples": ("LATENT", {"tooltip": known}),
                "denoise_strength": (
                    "FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": part}
                ),
                "cache_args": ("CACHEARGS", {"tooltip": "Leaves out steps that change little"}),
                "slg_args": ("SLGARGS", {"tooltip": "Skip layer guidance"}),
                "rope_function": (ROPES, {"default": "comfy", "tooltip": "Both run the same kernel here"}),
                "experimental_args": ("EXPERIMENTALARGS", {"tooltip": "Experimental ways of guidance"}),
                "unianimate_poses": ("UNIANIMATE_POSE", {"tooltip": "Not available in this sampler"}),
            },
        }  # fmt: skip

    def process(
        self,
        model: WanVideoModel,
        text_embeds: TextEmbeds,
        image_embeds: ImageEmbeds,
        shift: float,
        fps: float,
        steps: int,
        addnoise_condition: int,
        cfg: float | Sequence[float],
        seed: int,
        scheduler: str,
        force_offload: bool = True,
        samples: Latent | None = None,
        prefix_samples: Latent | None = None,
        denoise_strength: float = 1.0,
        *,
        rope_function: str = "comfy",
        cache_args: StepCache | None = None,
        **sockets: object,
    ) -> tuple[Latent]:
        """The whole video, known frames included. sockets: payloads and modifiers, by their names.

        Raises ValueError where nothing is left to sample, and for embeds that make a video in a loop.
        """
        if image_embeds.loop is not None:
            raise ValueError(
                "WanVideoDiffusionForcingSampler makes one stretch of video: connect WanVideoEmptyEmbeds to "
                "image_embeds, or use WanVideoSampler for these."
            )
        payloads, modifiers = contributions(sockets.items())
        if prefix_samples is not None:
            image_embeds, known = _extended(image_embeds, prefix_samples, addnoise_condition, seed)
            modifiers = (*modifiers, known)
        if samples is not None and denoise_strength == 1:
            log.warning("samples have no effect where denoise_strength is 1.")
            samples = None
        # The widget counts the steps that are run, a schedule those of the whole way.
        whole = int(steps / denoise_strength) if denoise_strength else steps
        schedule = make_schedule(
            ScheduleSpec(name=scheduler, steps=whole, shift=shift, denoise_strength=denoise_strength)
        )
        request = SampleRequest(
            model=model,
            text=text_embeds,
            image=image_embeds,
            schedule=schedule,
            cfg=cfg,
            seed=seed,
            samples=samples,
            payloads=(FrameRate.of(fps), *payloads),
            modifiers=modifiers,
            cache=cache_args,
            force_offload=force_offload,
        )
        return (sample(request, get_host())[0],)


def _extended(image: ImageEmbeds, prefix_samples: Latent, noise: int, seed: int) -> tuple[ImageEmbeds, KnownFrames]:
    """The embeds with the known frames given, and how the model sees them."""
    prefix, first = prefix_samples["samples"][0], image.leading_latents
    count, frames = prefix.shape[1], image.latent_shape[1] - first
    if count >= frames:
        raise ValueError(
            f"prefix_samples have {count} latent frames and the whole video {frames}, so that none is left to make: "
            "raise num_frames of the image embeds, which counts the known frames, too."
        )
    given = (*image.given_latents, (first, prefix))
    # Not the seed of the starting noise, whose first numbers would come again here.
    known = KnownFrames(first=first, count=count, noise=noise, seed=(seed + 1) & LARGEST_SEED)
    return replace(image, given_latents=given), known


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoDiffusionForcingSampler)
