"""Nodes of Wan2.2-Animate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..node_tools import CATEGORY, OFFLOAD_TIP, SIDE_TIP, Inputs, mappings, round_size, whole_frames
from ..wanvideo.conditioning import Payload
from ..wanvideo.images import centered, to_video
from ..wanvideo.modules.vae import Tile, WanVAE
from ..wanvideo.request import ImageEmbeds, payloads_of
from .footage import Footage, kept_background
from .loop import CharacterLoop
from .mask import face_masks

log = logging.getLogger("wanvideo")

COLOR_METHODS = ["disabled", "mkl", "hm", "reinhard", "mvgd", "hm-mvgd-hm", "hm-mkl-hm"]
# What the published motion encoder reads.
FACE_SIDE = 512


class WanVideoAnimateEmbeds:
    """Makes a character move like the person of a video, or takes that person's place."""

    DESCRIPTION = "Makes the character of a picture move like the person of a video, or puts it in that person's place."
    DISPLAY_NAME = "WanVideo Animate Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"min": 64, "max": 8096, "step": 8, "tooltip": SIDE_TIP}
        frames = {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": "Rounded down to 4n+1"}
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001}
        window = "Frames sampled at once; a longer video is made in windows that share a frame"
        mask = "1 where the character is; elsewhere the background stays"
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "A Wan 2.1 VAE"}),
                "width": ("INT", {"default": 832, **side}),
                "height": ("INT", {"default": 480, **side}),
                "num_frames": ("INT", frames),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
                "frame_window_size": ("INT", {"default": 77, "min": 1, "max": 10000, "step": 1, "tooltip": window}),
                "colormatch": (
                    COLOR_METHODS,
                    {"default": "disabled", "tooltip": "Match colors to the reference, between windows"},
                ),
                "pose_strength": ("FLOAT", {**strength, "tooltip": "Strength of the poses"}),
                "face_strength": ("FLOAT", {**strength, "tooltip": "Strength of the face"}),
            },
            "optional": {
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS", {"tooltip": "CLIP features of the reference"}),
                "ref_images": ("IMAGE", {"tooltip": "The character: one picture"}),
                "pose_images": ("IMAGE", {"tooltip": "Drawn poses, a picture a frame"}),
                "face_images": ("IMAGE", {"tooltip": "The driving face cut out, a picture a frame"}),
                "bg_images": ("IMAGE", {"tooltip": "The video whose person is replaced, without that person"}),
                "mask": ("MASK", {"tooltip": mask}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": "Less memory for the VAE"}),
            },
        }

    def process(
        self,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        force_offload: bool,
        frame_window_size: int,
        colormatch: str,
        pose_strength: float,
        face_strength: float,
        ref_images: Tensor | None = None,
        pose_images: Tensor | None = None,
        face_images: Tensor | None = None,
        clip_embeds: Payload | None = None,
        tiled_vae: bool = False,
        bg_images: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[ImageEmbeds]:
        """What the model reads of a short video, or the loop of a longer one."""
        width, height = round_size(width, height)
        frames = whole_frames(num_frames)
        _warn_of_short(frames, pose_images=pose_images, face_images=face_images, bg_images=bg_images, mask=mask)
        sides = (height // vae.spatial_factor, width // vae.spatial_factor)
        footage = Footage(
            vae=vae,
            reference=to_video(_one(ref_images), width, height),
            poses=None if pose_images is None else to_video(pose_images, width, height),
            faces=_faces(face_images, masked=mask is not None),
            background=None if bg_images is None else to_video(bg_images, width, height),
            kept=None if mask is None else kept_background(mask, *sides),
            pose_strength=pose_strength,
            face_strength=face_strength,
            tile=Tile() if tiled_vae else None,
        )
        shape, clip = footage.shape(frames), payloads_of(clip_embeds)
        if frames > frame_window_size:
            window = whole_frames(frame_window_size)
            if window < 5:
                raise ValueError(f"frame_window_size must be 5 or more for a longer video, not {frame_window_size}.")
            loop = CharacterLoop(footage=footage, frames=frames, window_frames=window, colormatch=colormatch)
            return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=clip, leading_latents=1, loop=loop),)
        try:
            character = footage.lasting(frames).part(range(frames))
        finally:
            if force_offload:
                vae.managed.release()
        payloads = (character, *clip)
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=payloads, leading_latents=1),)


def _warn_of_short(frames: int, **videos: Tensor | None) -> None:
    """One frame is meant to stand still."""
    for name, video in videos.items():
        if video is not None and 1 < len(video) < frames:
            log.warning(
                "%s has %d frames, and the video %d: it runs back and forth. Lower num_frames to end with it.",
                name, len(video), frames,
            )  # fmt: skip


def _one(images: Tensor | None) -> Tensor:
    if images is None:
        raise ValueError("Animate needs the character's picture: connect ref_images to WanVideoAnimateEmbeds.")
    if len(images) > 1:
        raise ValueError(f"Animate takes one reference picture, but ref_images has {len(images)}: choose one of them.")
    return images


def _faces(images: Tensor | None, *, masked: bool) -> Tensor | None:
    """[3, n, 512, 512] in -1..1, the middle of each picture. A masked video without faces has grey ones."""
    if images is None:
        return torch.zeros(3, 1, FACE_SIDE, FACE_SIDE) if masked else None
    return to_video(centered(images, FACE_SIDE, FACE_SIDE), FACE_SIDE, FACE_SIDE)


class FaceMaskFromPoseKeypoints:
    """Masks the face of one person."""

    DESCRIPTION = "Masks the face of one person of a video, from keypoints that a pose detector gives."
    DISPLAY_NAME = "Face Mask From Pose Keypoints"
    CATEGORY = "ControlNet Preprocessors/Pose Keypoint Postprocess"
    FUNCTION = "createmask"
    RETURN_TYPES = ("MASK",)
    RETURN_NAMES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        index = {"default": 0, "min": 0, "max": 100, "step": 1, "tooltip": "Whose face, in the first frame"}
        keypoints = {"tooltip": "From a detector such as DWPreprocessor, one entry a frame"}
        return {"required": {"pose_kps": ("POSE_KEYPOINT", keypoints), "person_index": ("INT", index)}}

    def createmask(self, pose_kps: Sequence[Mapping[str, object]], person_index: int) -> tuple[Tensor]:
        """One mask a frame; empty where the face is lost."""
        return (face_masks(pose_kps, person_index),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoAnimateEmbeds, FaceMaskFromPoseKeypoints)
