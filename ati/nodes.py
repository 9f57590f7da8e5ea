"""Nodes of ATI: motion along tracks, and a look at the tracks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.loading import WanVideoModel
from .drawing import draw_tracks
from .extension import MotionTracks, painted
from .tracks import LATENTS, latent_tracks, padded, parse_tracks

Tracks = str | Sequence[str]
# Channels of an image-to-video condition: mask, then latents.
MASK, CONDITION = 4, 20

SIZE = {"min": 64, "step": 8}
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
TRACKS_TIP = 'Tracks as JSON, like [[{"x": 10, "y": 20}, ...], ...], with 121 points each for 81 frames'
SIZE_ROWS = {
    "width": ("INT", {"default": 832, "max": 2048, **SIZE, "tooltip": "Width of the picture that was drawn on"}),
    "height": ("INT", {"default": 480, "max": 29048, **SIZE, "tooltip": "Height of the picture that was drawn on"}),
}
TEMPERATURE = (
    "FLOAT",
    {"default": 220.0, "min": 0.0, "max": 1000.0, "step": 0.1, "tooltip": "Higher: each track moves a smaller spot"},
)
TOPK = ("INT", {"default": 2, "min": 1, "max": 10, "step": 1, "tooltip": "Most tracks that one place follows"})


class WanVideoATITracks:
    """Moves what the start picture shows along tracks."""

    DISPLAY_NAME = "WanVideo ATI Tracks"
    CATEGORY = CATEGORY
    FUNCTION = "patchmodel"
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = (
        "ATI: moves what the start picture shows along tracks. It needs the ATI model, WanVideoImageToVideoEncode and "
        "81 frames."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": "The ATI model"}),
                "tracks": ("STRING", {"tooltip": TRACKS_TIP}),
                **SIZE_ROWS,
                "temperature": TEMPERATURE,
                "topk": TOPK,
                "start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which on"}),
                "end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which"}),
            }
        }

    def patchmodel(
        self,
        model: WanVideoModel,
        tracks: Tracks,
        width: int,
        height: int,
        temperature: float,
        topk: int,
        start_percent: float,
        end_percent: float,
    ) -> tuple[WanVideoModel]:
        """The model with tracks. Raises ValueError for tracks that are none, or a model that has some."""
        if any(isinstance(payload, MotionTracks) for payload in model.payloads):
            raise ValueError("The model has ATI tracks already: put all tracks into one node.")
        starts, points = _of_latents(tracks, width, height)
        motion = MotionTracks(starts, points, temperature, topk, start_percent, end_percent)
        return (replace(model, payloads=(*model.payloads, motion)),)


class WanVideoATITracksVisualize:
    """Draws tracks on pictures."""

    DISPLAY_NAME = "WanVideo ATI Tracks Visualize"
    CATEGORY = CATEGORY
    FUNCTION = "patchmodel"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    DESCRIPTION = "Draws the tracks of ATI on 81 frames: new points are large and red, old ones small and blue."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        radius = {"min": 0, "max": 100, "step": 1}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "One picture, or the frames of the video, repeated up to 81"}),
                "tracks": ("STRING", {"tooltip": TRACKS_TIP}),
                "min_radius": ("INT", {"default": 1, **radius, "tooltip": "Radius of the oldest point, in pixels"}),
                "max_radius": ("INT", {"default": 6, **radius, "tooltip": "Radius of the newest point, in pixels"}),
                "max_retain": ("INT", {"default": 50, **radius, "tooltip": "Frames for which a point is seen"}),
            }
        }

    def patchmodel(
        self, images: Tensor, tracks: Tracks, min_radius: int, max_radius: int, max_retain: int
    ) -> tuple[Tensor]:
        """IMAGE [81, H, W, 3]. Raises ValueError for tracks that are none."""
        whole = padded(parse_tracks(tracks))
        # Two of three of the points: the tracks have 24 a second, the video 16 frames.
        moments = torch.arange(4 * LATENTS - 3) * 3 // 2
        frames = images.cpu().float()[torch.arange(len(moments)) % len(images), ..., :3]
        return (draw_tracks(frames, whole[:, moments], smallest=min_radius, largest=max_radius, retain=max_retain),)


class ComfyModel(Protocol):
    """What is used of ComfyUI's MODEL."""

    def clone(self) -> Self:
        """A copy that shares the weights."""

    def get_model_object(self, name: str) -> Callable[..., Tensor | None]:
        """A member of the model."""

    def add_object_patch(self, name: str, value: object) -> None:
        """Put another in its place."""


class WanVideoATI_comfy:  # noqa: N801 - the name that saved graphs have
    """The same for models of ComfyUI itself."""

    DISPLAY_NAME = "WanVideo ATI Comfy"
    CATEGORY = CATEGORY
    FUNCTION = "patchcond"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "ATI for ComfyUI's own models and samplers: moves what the start picture shows along tracks."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The ATI model, loaded by ComfyUI"}),
                **SIZE_ROWS,
                "tracks": ("STRING", {"tooltip": TRACKS_TIP}),
                "temperature": TEMPERATURE,
                "topk": TOPK,
            }
        }

    def patchcond(
        self, model: ComfyModel, tracks: Tracks, width: int, height: int, temperature: float, topk: int
    ) -> tuple[ComfyModel]:
        """A copy of the model whose picture condition has the tracks in it.

        Sampling raises ValueError for a model without such a condition, and for a video of another length.
        """
        starts, points = _of_latents(tracks, width, height)
        patched, condition_of = model.clone(), model.get_model_object("concat_cond")

        def condition(**inputs: object) -> Tensor:
            cond = condition_of(**inputs)
            if cond is None or cond.shape[1] != CONDITION:
                raise ValueError(
                    "ATI tracks move what a start picture shows, but this model reads no picture of "
                    f"{CONDITION} channels: load the ATI model and connect WanImageToVideo to the sampler."
                )
            if cond.shape[2] != points.shape[1]:
                raise ValueError(
                    f"ATI tracks are for {4 * LATENTS - 3} frames, {LATENTS} in latents, but the video has "
                    f"{cond.shape[2]} in latents: make it {4 * LATENTS - 3} frames long."
                )
            where = starts.to(cond).expand(len(cond), -1, -1), points.to(cond).expand(len(cond), -1, -1, -1)
            picture, mask = painted(cond[:, MASK:], *where, temperature=temperature, topk=topk)
            return torch.cat((mask[:, None].to(picture).expand(-1, MASK, -1, -1, -1), picture), dim=1)

        patched.add_object_patch("concat_cond", condition)
        return (patched,)


def _of_latents(tracks: Tracks, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Starts [1, N, 2] and points [1, 21, N, 3], as in `latent_tracks`."""
    starts, points = latent_tracks(padded(parse_tracks(tracks)), (width, height))
    return starts[None], points[None]


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoATITracks, WanVideoATITracksVisualize, WanVideoATI_comfy
)
