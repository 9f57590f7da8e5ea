"""Nodes of MTVCrafter: poses, their tokens, and the motion that a video follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..host import get_host
from ..node_tools import CATEGORY, Inputs, files, mappings
from ..wanvideo.guidance import per_step
from ..wanvideo.request import ImageEmbeds
from .extension import Motion
from .poses import draw, first_person
from .vqvae import MotionTokenizer, load_tokenizer

Poses = dict[str, list[list[Tensor]]]
RELEASES = "https://github.com/isarandi/nlf/releases/download"
URLS = [f"{RELEASES}/v0.3.2/nlf_l_multi_0.3.2.torchscript", f"{RELEASES}/v0.2.2/nlf_l_multi_0.2.2.torchscript"]
PROGRAM = (
    "NLF is published as TorchScript, a program, and this pack loads no programs: connect an NLFMODEL or NLFPRED of a "
    "pack that runs it."
)
WARMUP = ("BOOLEAN", {"default": True, "tooltip": "Without effect: the model is not loaded"})
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class _ProgramLoader:
    """A loader of NLF models, which refuses."""

    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("NLFMODEL",)
    RETURN_NAMES = ("nlf_model",)
    DESCRIPTION = PROGRAM

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: object = None) -> str:
        """Refuses before anything runs."""
        return PROGRAM


class LoadNLFModel(_ProgramLoader):
    """Refuses NLF models, which are programs."""

    DISPLAY_NAME = "Load NLF Model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"nlf_model": (files("nlf"), {"tooltip": "A file in models/nlf; it is not loaded"})},
            "optional": {"warmup": WARMUP},
        }

    def loadmodel(self, nlf_model: str, warmup: bool = True) -> tuple[object]:
        """Raises ValueError."""
        raise ValueError(PROGRAM)


class DownloadAndLoadNLFModel(_ProgramLoader):
    """Refuses NLF models, which are programs, and downloads nothing."""

    DISPLAY_NAME = "(Download)Load NLF Model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"url": (URLS, {"default": URLS[0], "tooltip": "Where NLF is published; it is not loaded"})},
            "optional": {"warmup": WARMUP},
        }

    def loadmodel(self, url: str, warmup: bool = True) -> tuple[object]:
        """Raises ValueError."""
        raise ValueError(PROGRAM)


class NLFPredict:
    """Poses of the people in a video, by an NLF model that another pack loaded."""

    DISPLAY_NAME = "NLF Predict"
    CATEGORY = CATEGORY
    FUNCTION = "predict"
    RETURN_TYPES = ("NLFPRED", "BBOX")
    RETURN_NAMES = ("pose_results", "bboxes")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        batch = {"default": -1, "min": -1, "max": 10000, "step": 1, "tooltip": "Frames at a time; -1 for all at once"}
        return {
            "required": {
                "model": ("NLFMODEL", {"tooltip": "An NLF model, loaded by another pack"}),
                "images": ("IMAGE", {"tooltip": "Frames of the video that the pose is taken from"}),
            },
            "optional": {"per_batch": ("INT", batch)},
        }

    @torch.no_grad()
    def predict(self, model: object, images: Tensor, per_batch: int = -1) -> tuple[Poses, list[list[float]]]:
        """Joints of every frame, and the first person's box, zeros where nobody is.

        Raises ValueError for a model without `detect_smpl_batched`.
        """
        detect = getattr(model, "detect_smpl_batched", None)
        if detect is None:
            raise ValueError(f"The model is a {type(model).__name__}, not an NLF model. {PROGRAM}")
        device = get_host().device()
        if isinstance(model, torch.nn.Module):
            model.to(device)
        joints: list[Tensor] = []
        boxes: list[list[float]] = []
        for part in images.split(len(images) if per_batch < 1 else per_batch):
            found = detect(part.permute(0, 3, 1, 2).to(device))
            joints += [people.cpu() for people in found.get("joints3d_nonparam", ())]
            boxes += [box[0, :4].tolist() if box.numel() else [0.0] * 4 for box in found.get("boxes", ())]
        if isinstance(model, torch.nn.Module):
            model.to(get_host().offload_device())
        return {"joints3d_nonparam": [joints]}, boxes


class DrawNLFPoses:
    """Draws the first person's skeleton on black."""

    DISPLAY_NAME = "Draw NLF Poses"
    CATEGORY = CATEGORY
    FUNCTION = "predict"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        stick = {"default": 4.0, "min": 0.0, "max": 1000.0, "step": 0.01, "tooltip": "Thickness of limbs"}
        radius = {"default": 5, "min": 1, "max": 10, "step": 1, "tooltip": "Radius of joints in pixels"}
        style = {"default": "original", "tooltip": "MTVCrafter's ellipses, or SCAIL's sticks"}
        return {
            "required": {
                "poses": ("NLFPRED", {"tooltip": "Poses of a detector, or those that MTV Crafter Encode Poses saw"}),
                "width": ("INT", {"default": 512, "tooltip": "Width of the pictures"}),
                "height": ("INT", {"default": 512, "tooltip": "Height of the pictures"}),
            },
            "optional": {
                "stick_width": ("FLOAT", stick),
                "point_radius": ("INT", radius),
                "style": (["original", "scail"], style),
            },
        }

    def predict(
        self,
        poses: object,
        width: int,
        height: int,
        stick_width: float = 1.0,
        point_radius: int = 2,
        style: str = "original",
    ) -> tuple[Tensor]:
        """One picture a frame."""
        return (draw(poses, width, height, stick_width=stick_width, point_radius=point_radius, style=style),)


class LoadVQVAE:
    """Loads MTVCrafter's motion tokenizer."""

    DISPLAY_NAME = "Load VQVAE"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("VQVAE",)
    RETURN_NAMES = ("vqvae",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model_name": (files("vae"), {"tooltip": "MTVCrafter's VQ-VAE in models/vae"})}}

    def loadmodel(self, model_name: str) -> tuple[MotionTokenizer]:
        """In float32."""
        host = get_host()
        return (load_tokenizer(host.find_file("vae", model_name), host),)


class MTVCrafterEncodePoses:
    """Turns the first person's poses into motion tokens."""

    DISPLAY_NAME = "MTV Crafter Encode Poses"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("MTVCRAFTERMOTION", "NLFPRED")
    RETURN_NAMES = ("mtvcrafter_motion", "pose_results")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "vqvae": ("VQVAE", {"tooltip": "The motion tokenizer, from Load VQVAE"}),
                "poses": ("NLFPRED", {"tooltip": "Poses of the video, as many frames as the new one has"}),
            }
        }

    def encode(self, vqvae: MotionTokenizer, poses: object) -> tuple[Tensor, Tensor]:
        """Tokens, and the poses [frames, 24, 3] that they stand for."""
        return vqvae.encode(first_person(poses))


class WanVideoAddMTVMotion:
    """Adds a motion that the person in the video follows."""

    DISPLAY_NAME = "WanVideo MTV Crafter Motion"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": "A list gives one value a step"}
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The video to come, with its start picture"}),
                "mtv_crafter_motion": ("MTVCRAFTERMOTION", {"tooltip": "From MTV Crafter Encode Poses"}),
                "strength": ("FLOAT", strength),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which it acts"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which it acts"},
                ),
            }
        }

    def add(
        self,
        embeds: ImageEmbeds,
        mtv_crafter_motion: Tensor,
        strength: float | Sequence[float],
        start_percent: float,
        end_percent: float,
    ) -> tuple[ImageEmbeds]:
        """The embeds with the motion."""
        motion = Motion(mtv_crafter_motion, per_step(strength), start_percent, end_percent)
        return (replace(embeds, payloads=(*embeds.payloads, motion)),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    LoadNLFModel,
    DownloadAndLoadNLFModel,
    NLFPredict,
    DrawNLFPoses,
    LoadVQVAE,
    MTVCrafterEncodePoses,
    WanVideoAddMTVMotion,
)
