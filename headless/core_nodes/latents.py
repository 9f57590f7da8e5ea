"""Frames of latents: taking, placing, counting (ComfyUI and KJNodes)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...node_tools import Inputs

log = logging.getLogger("wanvideo")

Latent = dict[str, object]

MANY, LARGEST = 4096, 16384


def _axis(samples: Tensor) -> int:
    """Of a video's frames [n, C, F, h, w], else of the batch of pictures [n, C, h, w]."""
    return 2 if samples.ndim == 5 else 0


class GetLatentSizeAndCount:
    """The sizes of latents; those of pictures have 0 frames."""

    FUNCTION = "getsize"
    RETURN_TYPES = ("LATENT", "INT", "INT", "INT", "INT", "INT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"latent": ("LATENT",)}}

    def getsize(self, latent: Latent) -> tuple[object, ...]:
        """The latents, then batch, channels, frames, height and width."""
        sizes = list(latent["samples"].shape)
        if len(sizes) == 4:
            sizes.insert(2, 0)
        return latent, *sizes


class GetLatentRangeFromBatch:
    """Some frames; start_index -1 takes the last ones, num_frames -1 all that follow."""

    FUNCTION = "latentsfrombatch"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        number = {"min": -1, "max": MANY, "step": 1}
        return {
            "required": {
                "latents": ("LATENT",),
                "start_index": ("INT", {"default": 0, **number}),
                "num_frames": ("INT", {"default": 1, **number}),
            }
        }

    def latentsfrombatch(self, latents: Latent, start_index: int, num_frames: int) -> tuple[Latent]:
        """LATENT of the frames alone."""
        samples = latents["samples"]
        axis, total = _axis(samples), samples.shape[_axis(samples)]
        start = max(total - num_frames, 0) if start_index == -1 else start_index
        if start >= total:
            raise ValueError(f"start_index {start_index} is past the last of {total} latent frames; choose less.")
        count = total - start if num_frames == -1 else min(num_frames, total - start)
        return ({"samples": samples.narrow(axis, start, count).contiguous()},)


class InsertLatentToIndex:
    """Latents in the place of one frame of others, which grow by what is more (InsertLatentToIndexed)."""

    FUNCTION = "insert"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        index = {"default": 0, "min": -1, "max": MANY, "step": 1}
        return {"required": {"source": ("LATENT",), "destination": ("LATENT",), "index": ("INT", index)}}

    def insert(self, source: Latent, destination: Latent, index: int) -> tuple[Latent]:
        """LATENT. The original counts the frames of the source for the limit of the index; so does this."""
        whole = destination["samples"]
        part, axis = source["samples"].to(whole), _axis(whole)
        if part.ndim != whole.ndim or not 0 <= index < part.shape[axis]:
            raise ValueError(
                f"index {index} is outside of the {part.shape[axis]} latent frames of source: choose another index."
            )
        behind = whole.shape[axis] - index - 1
        parts = (whole.narrow(axis, 0, index), part, whole.narrow(axis, index + 1, max(behind, 0)))
        return ({"samples": torch.cat(parts, dim=axis)},)


class ReplaceVideoLatentFrames:
    """Writes frames over those of a video."""

    FUNCTION = "execute"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        index = {"default": 0, "min": -LARGEST, "max": LARGEST, "step": 1}
        return {
            "required": {"destination": ("LATENT",), "index": ("INT", index)},
            "optional": {"source": ("LATENT",)},
        }

    def execute(self, destination: Latent, index: int, source: Latent | None = None) -> tuple[Latent]:
        """The source's LATENT with the whole video; the destination as it is where the source does not fit."""
        if source is None:
            return (destination,)
        whole, part = destination["samples"], source["samples"]
        start = index + whole.shape[2] if index < 0 else index
        if not 0 <= start <= whole.shape[2] - part.shape[2]:
            log.warning(
                "%d latent frames do not fit at %d into a video of %d, which stays as it is.",
                part.shape[2], index, whole.shape[2],
            )  # fmt: skip
            return (destination,)
        replaced = whole.clone()
        replaced[:, :, start : start + part.shape[2]] = part
        return ({**source, "samples": replaced},)


NODE_CLASS_MAPPINGS = {
    "GetLatentSizeAndCount": GetLatentSizeAndCount,
    "GetLatentRangeFromBatch": GetLatentRangeFromBatch,
    "InsertLatentToIndexed": InsertLatentToIndex,
    "ReplaceVideoLatentFrames": ReplaceVideoLatentFrames,
}
