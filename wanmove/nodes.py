"""Nodes of Wan-Move: tracks in the condition of a start picture, and a look at the tracks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ati.tracks import parse_tracks
from ..node_tools import CATEGORY, Inputs, mappings
from ..wanvideo.request import ImageEmbeds
from .drawing import draw_tracks
from .trajectories import VAE_SIDE_STRIDE, MovedPicture, latent_positions, moved

# Socket TRACKS, as in ComfyUI: track_path [frames, N, 2] in pixels, track_visibility [frames, N].
Tracks = dict[str, Tensor]
Coords = str | Sequence[str]
Conditioning = list[list[object]]

COORDS_TIP = 'Tracks as JSON, like [[{"x": 10, "y": 20}, ...], ...], with one point for every frame'
MASK_TIP = "Frames in which the tracks are seen: those whose mask holds anything"
PICTURE = "concat_latent_image"


class WanVideoAddWanMoveTracks:
    """Moves what the start picture shows along tracks."""

    DISPLAY_NAME = "WanVideo Add WanMove Tracks"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS", "TRACKS")
    RETURN_NAMES = ("image_embeds", "tracks")
    DESCRIPTION = "Wan-Move: moves what the start picture shows along tracks. It needs the Wan-Move model."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = "1 puts the start picture's features where the tracks are, 0 leaves them out"
        return {
            "required": {
                "image_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "From WanVideo ImageToVideo Encode"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": strength}),
            },
            "optional": {
                "track_mask": ("MASK", {"tooltip": MASK_TIP}),
                "track_coords": ("STRING", {"forceInput": True, "tooltip": COORDS_TIP}),
                "tracks": ("TRACKS", {"tooltip": "Tracks of ComfyUI's own nodes, in the place of track_coords"}),
            },
        }

    def add(
        self,
        image_embeds: ImageEmbeds,
        track_coords: Coords | None = None,
        tracks: Tracks | None = None,
        strength: float = 1.0,
        track_mask: Tensor | None = None,
    ) -> tuple[ImageEmbeds, Tracks]:
        """The embeds with tracks, and the tracks. Raises ValueError without tracks or picture, or where they differ."""
        height, width = image_embeds.latent_shape[2:]
        if image_embeds.leading_latents:
            raise ValueError(
                "Wan-Move takes the first latent frame for the start picture: connect no reference latents "
                "(extra_latents)."
            )
        if track_coords is not None:
            used = _of_text(track_coords, track_mask, image_embeds.num_frames)
        elif tracks is not None:
            used = _of_tracks(tracks, track_mask, image_embeds.num_frames)
        else:
            raise ValueError("There are no tracks: connect track_coords or tracks.")
        size = (width * VAE_SIDE_STRIDE, height * VAE_SIDE_STRIDE)
        positions = latent_positions(used["track_path"], used["track_visibility"], size)
        payloads = MovedPicture.of(image_embeds.payloads, positions, strength)
        return replace(image_embeds, payloads=payloads), used


class WanVideoWanDrawWanMoveTracks:
    """Draws tracks on pictures."""

    DISPLAY_NAME = "WanVideo Draw WanMove Tracks"
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    DESCRIPTION = "Draws the tracks of Wan-Move on the frames of a video: a disc for each, and the way it has come."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        width = {"default": 14, "min": 1, "max": 50, "step": 1}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "One picture, or the frames of the video"}),
                "tracks": ("TRACKS", {"tooltip": "From WanVideo Add WanMove Tracks, or of ComfyUI's own nodes"}),
            },
            "optional": {
                "line_resolution": (
                    "INT", {"default": 24, "min": 4, "max": 64, "step": 1, "tooltip": "Frames that a way goes back"}
                ),
                "circle_size": ("INT", {"default": 10, "min": 1, "max": 20, "step": 1, "tooltip": "Radius in pixels"}),
                "opacity": (
                    "FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "0 shows nothing"}
                ),
                "line_width": ("INT", {**width, "tooltip": "Width of the way at the disc, in pixels"}),
            },
        }  # fmt: skip

    def execute(
        self,
        images: Tensor,
        tracks: Tracks,
        line_resolution: int = 24,
        circle_size: int = 10,
        opacity: float = 0.5,
        line_width: int = 14,
    ) -> tuple[Tensor]:
        """IMAGE with a frame for every point of the tracks. Raises ValueError for tracks that are none."""
        used = _of_tracks(tracks, None, None)
        path = used["track_path"]
        frames = images[torch.arange(len(path)) % len(images), ..., :3]
        settings = {"trail": line_resolution, "radius": circle_size, "opacity": opacity, "line_width": line_width}
        return (draw_tracks(frames, path, used["track_visibility"], **settings),)


class WanMove_native:  # noqa: N801 - the name that saved graphs have
    """The same for ComfyUI's own conditioning."""

    DISPLAY_NAME = "WanMove Native"
    CATEGORY = CATEGORY
    FUNCTION = "patchcond"
    RETURN_TYPES = ("CONDITIONING", "TRACKS")
    RETURN_NAMES = ("positive", "tracks")
    DEPRECATED = True
    DESCRIPTION = "Wan-Move for ComfyUI's own models and samplers; newer ComfyUI has WanMoveTrackToVideo for it."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "With a start picture, from WanImageToVideo"}),
                "track_coords": ("STRING", {"forceInput": True, "tooltip": COORDS_TIP}),
            },
            "optional": {"track_mask": ("MASK", {"tooltip": MASK_TIP})},
        }

    def patchcond(
        self, positive: Conditioning, track_coords: Coords, track_mask: Tensor | None = None
    ) -> tuple[Conditioning, Tracks]:
        """The conditioning with tracks in its picture, and the tracks. Raises ValueError without a picture."""
        picture = positive[0][1].get(PICTURE) if positive else None
        if picture is None:
            raise ValueError("The conditioning has no start picture: connect the positive output of WanImageToVideo.")
        frames, height, width = picture.shape[2:]
        used = _of_text(track_coords, track_mask, 4 * frames - 3)
        size = (width * VAE_SIDE_STRIDE, height * VAE_SIDE_STRIDE)
        positions = latent_positions(used["track_path"], used["track_visibility"], size).to(picture.device)
        tracked = moved(picture, positions.expand(len(picture), -1, -1, -1))
        return [[text, {**options, PICTURE: tracked}] for text, options in positive], used


def _of_text(coords: Coords, mask: Tensor | None, frames: int) -> Tracks:
    """Tracks of JSON for at most so many frames. Raises ValueError for tracks of different lengths."""
    tracks = parse_tracks(coords)
    lengths = sorted({len(track) for track in tracks})
    if len(lengths) > 1:
        raise ValueError(
            f"The tracks have {' and '.join(map(str, lengths))} points: give every track one point for every frame."
        )
    return _of_tracks({"track_path": torch.stack(tracks, dim=1)}, mask, frames)


def _of_tracks(tracks: Tracks, mask: Tensor | None, frames: int | None) -> Tracks:
    """The tracks of at most so many frames, all seen where neither the mask [frames, H, W] nor they say otherwise.

    Raises ValueError where they are no tracks, or frames are missing.
    """
    path, visible = tracks.get("track_path"), tracks.get("track_visibility")
    if path is None or path.ndim != 3 or path.shape[-1] != 2:
        raise ValueError("The tracks hold no 'track_path' [frames, tracks, 2]: connect a node that gives tracks.")
    path = path[:frames].float().cpu()
    if mask is not None:
        visible = (mask > 0).flatten(1).any(1)[:, None].expand(-1, path.shape[1])
    visible = torch.ones(path.shape[:2], dtype=torch.bool) if visible is None else visible.cpu()[: len(path)]
    if visible.shape != path.shape[:2]:
        raise ValueError(
            f"The tracks have points for {tuple(path.shape[:2])} frames and tracks, but the mask or track_visibility "
            f"is for {tuple(visible.shape)}: give both the same number of frames."
        )
    return {"track_path": path, "track_visibility": visible}


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoAddWanMoveTracks, WanVideoWanDrawWanMoveTracks, WanMove_native
)
