"""Warnings about settings that run without an error and seldom give what is wanted.

Source: the model cards of LightX2V, CausVid and FusionX (few steps, no guidance), and the papers of the step caches,
which measure 40 to 50 steps.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .guidance import per_step
from .modifier import Modifier

if TYPE_CHECKING:
    from .loading import WanVideoModel
    from .request import SampleRequest

log = logging.getLogger("wanvideo")

# Nothing in such files says how they were trained; their published names do.
DISTILLED = re.compile(
    r"lightx2v|lightning|causvid|fusion_?i?x|fastwan|turbo|distill|[248]_?steps?(?![a-z])|(?<![a-z])(rcm|dmd|lcm)(?![a-z])",
    re.IGNORECASE,
)
# Weaker ones help a model that keeps its own steps and guidance.
AT_WORK = 0.5
MOST_DISTILLED_STEPS, FEWEST_CACHED_STEPS = 12, 9


def warn_of_settings(request: SampleRequest) -> None:
    """Log what in the steps, the guidance and the step cache of a run does not suit its model, LoRAs and samples."""
    steps = request.schedule.total
    if request.schedule.first_index > 0 and not _begins_with_something(request):
        log.warning(
            "start_step or denoise_strength leaves out %d of %d steps, but there are no samples to go on from: the "
            "video begins as noise and keeps some of it. Connect samples, or run all steps.",
            request.schedule.first_index, steps,
        )  # fmt: skip
    samples = request.samples or {}
    if samples.get("original_image") is not None and samples.get("noise_mask") is None:
        log.warning(
            "The sampler before painted within a mask, which does not come along with its samples: this one changes "
            "the whole video. To keep the rest, connect Set Latent Noise Mask between the two."
        )
    if request.cache is not None and steps < FEWEST_CACHED_STEPS:
        log.warning(
            "%s leaves out steps that differ little from the one before, and of %d steps none does: it brings nothing, "
            "or harms the video. Disconnect cache_args.",
            request.cache.label, steps,
        )  # fmt: skip
    name = named(request.model, DISTILLED)
    if name is None:
        return
    least = min(per_step(request.cfg)[: len(request.schedule)])
    if least > 1:
        log.warning(
            "%s is distilled to work without guidance: cfg %g makes each step take twice as long and burns colours. "
            "Set cfg to 1.",
            name, least,
        )  # fmt: skip
    if steps > MOST_DISTILLED_STEPS:
        log.warning(
            "%s is distilled to few steps: %d of them take longer and look no better. Set steps to 4 to 8.", name, steps
        )


def _begins_with_something(request: SampleRequest) -> bool:
    """Whether the run starts from anything but noise: latents, or what a modifier puts in their place."""
    modifiers = (*request.modifiers, *request.image.modifiers)
    changed = any(type(modifier).begin is not Modifier.begin for modifier in modifiers)
    return changed or request.noise is not None or (request.samples or {}).get("samples") is not None


def warn_of_cut(name: str, lasts: float, seconds: float) -> None:
    """Log that a sound of `lasts` seconds is longer than the video. name: the input that it came by."""
    # Less than a frame of 60 a second is rounding.
    if lasts - seconds > 1 / 60:
        log.warning(
            "%s lasts %.2f s, of which num_frames leaves the first %.2f s: raise num_frames to hear all of it.",
            name, lasts, seconds,
        )  # fmt: skip


def named(model: WanVideoModel, pattern: re.Pattern[str]) -> str | None:
    """The first file, of the model's and of its LoRAs at work, whose name has the pattern."""
    merged = [file for file in model.options.loras if file.merge]
    paths: list[Path] = [model.path]
    paths += [file.path for file in (*merged, *model.loras) if abs(file.at(0)) >= AT_WORK]
    return next((path.name for path in paths if pattern.search(path.name)), None)
