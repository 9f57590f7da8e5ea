"""Nodes of FantasyPortrait: its module, the motion of a face in pictures, and how a run follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..fantasytalking.frame_attention import cut
from ..host import get_host
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from ..registry import SYSTEMS
from ..wanvideo.frames import VAE_TIME_STRIDE, round_frames
from ..wanvideo.request import ImageEmbeds
from .drawing import dotted
from .extension import PortraitMotion
from .faces import Array, FaceModels, Picture
from .motion import FACE_SIZE, encode_motion, load_motion_encoder
from .projection import FantasyPortraitModel, Strengths, load_fantasyportrait
from .tracking import landmarks_of
from .warping import similarity, warp

WHITE, GREEN = (1.0, 1.0, 1.0), (0.0, 1.0, 0.0)
# Pupils, tip of the nose and corners of the mouth: their landmarks, and where they lie in the encoder's picture.
ANCHORS = (182, 202, 36, 149, 133)
PLACES = np.array(((0.3843, 0.27), (0.62, 0.2668), (0.503, 0.4185), (0.406, 0.5273), (0.5977, 0.525)))


class FantasyPortraitModelLoader:
    """Chooses a FantasyPortrait module; its projections are loaded, the model loader reads the rest."""

    DISPLAY_NAME = "FantasyPortrait Model Loader"
    DESCRIPTION = "Loads a FantasyPortrait module: connect it to the model loader and to FantasyPortraitFaceDetector."
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("FANTASYPORTRAITMODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        precision = {"default": "fp16", "tooltip": "Of the projections; the rest has the precision of the transformer"}
        return {
            "required": {
                "model": (
                    files("diffusion_models"),
                    {"tooltip": "A FantasyPortrait module in models/diffusion_models, for a 14B model"},
                ),
                "base_precision": (["fp32", "bf16", "fp16"], precision),
            }
        }

    def loadmodel(self, model: str, base_precision: str) -> tuple[FantasyPortraitModel]:
        """Load the projections; they are on the compute device only while they run."""
        host = get_host()
        path = host.find_file("diffusion_models", model)
        return (load_fantasyportrait(path, dtype=DTYPES[base_precision], host=host, systems=SYSTEMS),)


class FantasyPortraitFaceDetector:
    """Reads the motion of the largest face in a video."""

    DISPLAY_NAME = "FantasyPortrait Face Detector"
    DESCRIPTION = "Reads how the largest face of a video moves: connect it to WanVideoAddFantasyPortrait."
    CATEGORY = CATEGORY
    FUNCTION = "detect"
    RETURN_TYPES = ("PORTRAIT_EMBEDS", "BBOX", "LANDMARKS")
    RETURN_NAMES = ("portrait_embeds", "bbox", "landmarks")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}
        device = {"default": "cuda", "tooltip": "Where the face detector runs; 'cuda' needs onnxruntime-gpu"}
        return {
            "required": {
                "portrait_model": ("FANTASYPORTRAITMODEL", {"tooltip": "The module that the model loader has, too"}),
                "images": ("IMAGE", {"tooltip": "The video whose face is followed; 4n+1 of its frames are read"}),
            },
            "optional": {
                "adapter_scale": ("FLOAT", {**scale, "tooltip": "Of the tokens of head, eyes, expression and mouth"}),
                "mouth_scale": ("FLOAT", {**scale, "tooltip": "Of the finer tokens of the mouth"}),
                "emo_scale": ("FLOAT", {**scale, "tooltip": "Of the finer tokens of the expression"}),
                "device": (["cuda", "cpu"], device),
            },
        }

    def detect(
        self,
        images: Tensor,
        portrait_model: FantasyPortraitModel,
        adapter_scale: float = 1.0,
        mouth_scale: float = 1.0,
        emo_scale: float = 1.0,
        device: str = "cuda",
    ) -> tuple[Tensor, list[Array], list[Array]]:
        """Motion tokens of every latent frame [1, F, T, A]; boxes and landmarks [222, 2] of every frame."""
        host, frames = get_host(), round_frames(images.shape[0])
        if frames <= VAE_TIME_STRIDE:
            raise ValueError(
                f"FantasyPortraitFaceDetector got {images.shape[0]} images: give at least {VAE_TIME_STRIDE + 1}."
            )
        models = FaceModels(host.models_dir("detection"), device)
        encoder = load_motion_encoder(portrait_model.path, host)
        pictures = _pictures(images[:frames])
        with host.progress(2 * frames, "Detecting faces") as progress:
            done = iter(range(1, 2 * frames + 1))
            boxes, points = landmarks_of(models, pictures, lambda: progress.update(next(done)))
        features = encode_motion(encoder, torch.stack([_face(*pair) for pair in zip(pictures, points, strict=True)]))
        tokens = portrait_model.project(features, Strengths(adapter_scale, mouth_scale, emo_scale))
        return cut(tokens, frames).tokens, boxes, points


def _pictures(images: Tensor) -> list[Picture]:
    """IMAGE -> uint8 [H, W, 3], blue first, as the detectors read them."""
    numbers = (images[..., :3].float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8)
    return list(numbers[..., ::-1])


def _face(picture: Picture, points: Array) -> Tensor:
    """What the motion encoder sees, [3, 224, 224] in -1..1, red first."""
    matrix = similarity(points[list(ANCHORS)], PLACES * FACE_SIZE)
    face = warp(picture, matrix, (FACE_SIZE, FACE_SIZE), cubic=True)[..., ::-1]
    return torch.from_numpy(face.transpose(2, 0, 1).astype(np.float32)) / 255 * 2 - 1


class WanVideoAddFantasyPortrait:
    """Makes a run follow the motion of a face."""

    DISPLAY_NAME = "WanVideo Add Fantasy Portrait"
    DESCRIPTION = "Adds the motion of a face to image embeds: the person of the start picture moves so."
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        strength = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        guided = {"default": 1.0, "min": 0.0, "max": 20.0, "step": 0.01}
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Embeds of the video, with the picture of the person"}),
                "portrait_embeds": ("PORTRAIT_EMBEDS", {"tooltip": "From FantasyPortraitFaceDetector"}),
                "strength": ("FLOAT", {**strength, "tooltip": "How strongly the motion is followed; 0 is off"}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": "Where in the steps it begins"}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "Where in the steps it ends"}),
                "portrait_cfg": (
                    "FLOAT",
                    {**guided, "tooltip": "Other than 1: guidance by the motion, one more pass a step"},
                ),
            }
        }

    def add(
        self,
        embeds: ImageEmbeds,
        portrait_embeds: Tensor,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        portrait_cfg: float | Sequence[float] = 1.0,
    ) -> tuple[ImageEmbeds]:
        """The embeds with the motion among what conditions the model."""
        motion = PortraitMotion(
            context=portrait_embeds,
            strength=strength,
            start=start_percent,
            end=end_percent,
            cfg_scale=portrait_cfg,
        )
        return (replace(embeds, payloads=(*embeds.payloads, motion)),)


class LandmarksToImage:
    """Draws landmarks of faces."""

    DISPLAY_NAME = "Landmarks to Image"
    DESCRIPTION = "Draws landmarks as white dots, on pictures or on black."
    CATEGORY = "LivePortrait"
    FUNCTION = "drawkeypoints"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("keypoints_image",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 512, "min": 1, "max": 2048, "step": 1, "tooltip": "In pixels, where no image is connected"}
        return {
            "required": {
                "landmarks": ("LANDMARKS", {"default": [], "tooltip": "From FantasyPortraitFaceDetector"}),
                "width": ("INT", side),
                "height": ("INT", side),
            },
            "optional": {"image": ("IMAGE", {"tooltip": "The pictures that the landmarks were found in"})},
        }

    def drawkeypoints(
        self, landmarks: Sequence[Array], width: int = 512, height: int = 512, image: Tensor | None = None
    ) -> tuple[Tensor]:
        """One picture for each frame's landmarks; black where a frame has none."""
        if not len(landmarks):
            raise ValueError("There are no landmarks to draw: connect those of FantasyPortraitFaceDetector.")
        if image is not None and image.shape[0] < len(landmarks):
            raise ValueError(
                f"There are landmarks of {len(landmarks)} frames but {image.shape[0]} images: connect the video that "
                "they were found in."
            )
        black = torch.zeros(height, width, 3) if image is None else torch.zeros_like(image[0, ..., :3])
        drawn = [
            dotted(black if image is None else image[number, ..., :3].float().cpu(), points, 2, WHITE)
            if len(points)
            else black
            for number, points in enumerate(landmarks)
        ]
        return (torch.stack(drawn),)


class DrawArcFaceLandmarks:
    """Draws the five landmarks of a face."""

    DISPLAY_NAME = "Draw ArcFace Landmarks"
    DESCRIPTION = "Draws the landmarks that come with Lynx face embeds as green dots on a picture."
    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("landmarked_image",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        image = ("IMAGE", {"tooltip": "The picture that the face was found in"})
        return {
            "required": {
                "lynx_face_embeds": ("LYNXIP", {"tooltip": "Face embeds that have landmarks"}),
                "image": image,
            },
            "optional": {"image": image},
        }

    def draw(self, lynx_face_embeds: Mapping[str, object], image: Tensor) -> tuple[Tensor]:
        """The first picture with the dots. Raises ValueError where the embeds have no landmarks."""
        landmarks = lynx_face_embeds.get("landmarks") if isinstance(lynx_face_embeds, Mapping) else None
        if landmarks is None:
            raise ValueError("These face embeds have no landmarks, so that there is nothing to draw: bypass the node.")
        return (dotted(image[0].float().cpu(), landmarks, 3, GREEN)[None],)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    FantasyPortraitModelLoader,
    FantasyPortraitFaceDetector,
    WanVideoAddFantasyPortrait,
    LandmarksToImage,
    DrawArcFaceLandmarks,
)
