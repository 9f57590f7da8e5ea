"""The nodes of UniAnimate: one finds the poses of people and draws them, the other gives drawn poses to the model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..host import get_host
from ..node_tools import CATEGORY, Inputs, mappings
from .alignment import Alignment
from .drawing import Style
from .extension import Poses
from .keypoints import Pose, PoseModels

log = logging.getLogger("wanvideo")

# Frames that are looked at together.
BATCH = 8
NO_REFERENCE = (1, 64, 64, 3)
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoUniAnimatePoseInput:
    """Drawn poses for UniAnimate."""

    DISPLAY_NAME = "WanVideo UniAnimate Pose Input"
    DESCRIPTION = (
        "Drawn poses that the video follows. Needs UniAnimate's LoRA at the 'lora' input of the model loader; connect "
        "it to unianimate_poses of the sampler."
    )
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("UNIANIMATE_POSE",)
    RETURN_NAMES = ("unianimate_poses",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "pose_images": ("IMAGE", {"tooltip": "Drawn poses, one a frame, at the size of the video"}),
                "strength": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": "How much the poses count"}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which the poses act"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which the poses act"},
                ),
            },
            "optional": {
                "reference_pose_image": (
                    "IMAGE",
                    {"tooltip": "The drawn pose of the picture that the video starts from, at the size of the video"},
                ),
            },
        }

    def process(
        self,
        pose_images: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        reference_pose_image: Tensor | None = None,
    ) -> tuple[Poses]:
        """The poses as the model reads them."""
        video = pose_images[..., :3].permute(3, 0, 1, 2)[None].contiguous()
        reference = None
        if reference_pose_image is not None:
            reference = reference_pose_image[:1, ..., :3].permute(0, 3, 1, 2).contiguous()
        return (Poses(video, reference, strength, start_percent, end_percent),)


class WanVideoUniAnimateDWPoseDetector:
    """Finds the pose of one person in every frame and draws it."""

    DISPLAY_NAME = "WanVideo UniAnimate DWPose Detector"
    DESCRIPTION = (
        "Draws the pose of the surest person in every image, aligned to that of a reference picture where one is "
        "connected. For WanVideo UniAnimate Pose Input. Needs onnxruntime and the DWPose models in models/detection."
    )
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("poses", "reference_pose")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        threshold = {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01}
        stick = {"default": 4, "min": 1, "max": 100, "step": 1, "tooltip": "Half the width of limbs, in pixels"}
        dot = {"default": 4, "min": 0, "max": 100, "step": 1}
        colors = "BGR is what UniAnimate-DiT was trained on; it swaps red and blue of both outputs"
        absent = "Images without a person: black, or with the pose before them"
        reference = "The picture that the video starts from: all poses get its proportions and place"
        return {
            "required": {
                "pose_images": ("IMAGE", {"tooltip": "The video whose poses are drawn, at the size of the new video"}),
                "score_threshold": ("FLOAT", {**threshold, "tooltip": "Points with a higher score are drawn"}),
                "stick_width": ("INT", stick),
                "draw_body": ("BOOLEAN", {"default": True, "tooltip": "Draw trunk, arms and legs"}),
                "body_keypoint_size": ("INT", {**dot, "tooltip": "Radius of the dots of the body, in pixels; 0: none"}),
                "draw_feet": ("BOOLEAN", {"default": True, "tooltip": "Draw limbs from ankles to toes"}),
                "draw_hands": ("BOOLEAN", {"default": True, "tooltip": "Draw fingers and their dots"}),
                "hand_keypoint_size": ("INT", {**dot, "tooltip": "Radius of the dots of hands, in pixels; 0: none"}),
                "colorspace": (["RGB", "BGR"], {"tooltip": colors}),
                "handle_not_detected": (["empty", "repeat"], {"default": "empty", "tooltip": absent}),
                "draw_head": ("BOOLEAN", {"default": True, "tooltip": "Draw nose, eyes and ears, and the neck"}),
            },
            "optional": {"reference_pose_image": ("IMAGE", {"tooltip": reference})},
        }

    def process(
        self,
        pose_images: Tensor,
        score_threshold: float,
        stick_width: int,
        reference_pose_image: Tensor | None = None,
        draw_body: bool = True,
        body_keypoint_size: int = 4,
        draw_feet: bool = True,
        draw_hands: bool = True,
        hand_keypoint_size: int = 4,
        colorspace: str = "RGB",
        handle_not_detected: str = "empty",
        draw_head: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Drawn poses [F, H, W, 3] in 0..1, and that of the reference [1, H, W, 3]; black, 64x64, without one."""
        host = get_host()
        models = PoseModels(host.models_dir("detection"), host.device().type, score_threshold)
        style = Style(
            stick=stick_width, body=draw_body, head=draw_head, feet=draw_feet, hands=draw_hands,
            body_dots=body_keypoint_size, hand_dots=hand_keypoint_size,
        )  # fmt: skip
        reference, drawn_reference = None, torch.zeros(NO_REFERENCE)
        if reference_pose_image is not None:
            (reference,) = models.poses(reference_pose_image[:1])
            if reference is None:
                raise ValueError("No person was found in reference_pose_image: choose a picture that shows one.")
            drawn_reference = _drawn(reference, style, pose_images)[None]
        poses = _pose_video(models, pose_images, style, reference, repeat=handle_not_detected == "repeat")
        return (poses.flip(-1), drawn_reference.flip(-1)) if colorspace == "BGR" else (poses, drawn_reference)


def _pose_video(models: PoseModels, images: Tensor, style: Style, reference: Pose | None, *, repeat: bool) -> Tensor:
    """The drawn pose of every image, by parts of the video: only the drawings themselves grow with its length."""
    host, count, missing = get_host(), len(images), 0
    drawn = torch.zeros(*images.shape[:3], 3)
    alignment, previous = None, None
    with host.progress(count, "Detecting poses") as progress:
        for start in range(0, count, BATCH):
            host.check_cancelled()
            for number, pose in enumerate(models.poses(images[start : start + BATCH]), start):
                if pose is None:
                    missing += 1
                    pose = previous if repeat else None
                elif reference is not None:
                    alignment = alignment or Alignment.between(pose, reference)
                    pose = alignment(pose)
                if pose is not None:
                    drawn[number] = _drawn(pose, style, images)
                    previous = pose
            progress.update(min(start + BATCH, count))
    if missing == count:
        raise ValueError(f"No person was found in any of the {count} pose_images: choose a video that shows one.")
    if missing:
        instead = "repeat the pose before them" if repeat else "are black"
        log.warning("%d of %d images show no person; they %s.", missing, count, instead)
    return drawn


def _drawn(pose: Pose, style: Style, images: Tensor) -> Tensor:
    """At the size of the images."""
    height, width = images.shape[1:3]
    return torch.from_numpy(style.draw(pose, width, height)).float() / 255


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoUniAnimatePoseInput, WanVideoUniAnimateDWPoseDetector
)
