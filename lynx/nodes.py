"""Nodes of Lynx: crops of a face, its identity as tokens, and the face that a video keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..host import get_host
from ..node_tools import CATEGORY, DTYPES, Inputs, files, mappings
from ..wanvideo.guidance import per_step
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.request import ImageEmbeds, TextEmbeds
from .arcface import embedding_of, find_arcface
from .extension import LynxFace
from .faces import crops, landmarks_of
from .resampler import FaceResampler, load_resampler

FaceTokens = tuple[Tensor, Tensor]
PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class LoadLynxResampler:
    """Loads what turns the identity of a face into tokens."""

    DISPLAY_NAME = "Load Lynx Resampler"
    CATEGORY = CATEGORY
    FUNCTION = "loadmodel"
    RETURN_TYPES = ("LYNXRESAMPLER",)
    RETURN_NAMES = ("resampler",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        precision = {"default": "fp16", "tooltip": "Of its weights and products"}
        return {
            "required": {
                "model_name": (
                    files("diffusion_models"),
                    {"tooltip": "A Lynx resampler in models/diffusion_models, of the kind of the ip layers"},
                ),
                "precision": (["fp32", "bf16", "fp16"], precision),
            }
        }

    def loadmodel(self, model_name: str, precision: str) -> tuple[FaceResampler]:
        """Load it; it is on the compute device only while it runs."""
        host = get_host()
        return (load_resampler(host.find_file("diffusion_models", model_name), dtype=DTYPES[precision], host=host),)


class LynxInsightFaceCrop:
    """Crops the largest face of a picture as Lynx reads it; needs the package insightface."""

    DISPLAY_NAME = "Lynx InsightFace Crop"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("ip_image", "ref_image")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"image": ("IMAGE", {"tooltip": "A picture of the person; the first one counts"})}}

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """112x112 for the identity, 256x256 for the picture."""
        picture = image[0, ..., :3]
        both = crops(picture, landmarks_of(picture))
        return both.ip[None], both.ref[None]


class LynxEncodeFaceIP:
    """The identity of a face as tokens."""

    DISPLAY_NAME = "Lynx Encode Face IP"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LYNXIP",)
    RETURN_NAMES = ("lynx_face_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "resampler": ("LYNXRESAMPLER", {"tooltip": "From Load Lynx Resampler"}),
                "ip_image": ("IMAGE", {"tooltip": "The aligned face, 112x112 pixels"}),
            }
        }

    def encode(self, resampler: FaceResampler, ip_image: Tensor) -> tuple[FaceTokens]:
        """Tokens of the face, and of none."""
        host = get_host()
        return (resampler.tokens(embedding_of(ip_image[0, ..., :3], find_arcface(host), host)),)


class WanVideoAddLynxEmbeds:
    """Adds a face that the video keeps."""

    DISPLAY_NAME = "WanVideo Add Lynx Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        scale = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        guidance = "Guidance by the face, beside the cfg of the sampler: a third pass where neither is 1"
        return {
            "required": {
                "embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "The video to come, from WanVideo Empty Embeds"}),
                "ip_scale": ("FLOAT", {**scale, "tooltip": "Strength of the identity"}),
                "ref_scale": ("FLOAT", {**scale, "tooltip": "Strength of the picture"}),
                "lynx_cfg_scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": guidance},
                ),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **PERCENT, "tooltip": "Part of the steps from which it acts"},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **PERCENT, "tooltip": "Part of the steps up to which it acts"},
                ),
            },
            "optional": {
                "vae": ("WANVAE", {"tooltip": "The model's VAE, for ref_image"}),
                "lynx_ip_embeds": ("LYNXIP", {"tooltip": "The identity, for a model with ip layers"}),
                "ref_image": ("IMAGE", {"tooltip": "The picture, 256x256, for a model with ref layers"}),
                "ref_text_embed": (
                    "WANVIDEOTEXTEMBEDS",
                    {"tooltip": "The prompt of the picture: 'image of a face', as in training"},
                ),
                "ref_blocks_to_use": (
                    "STRING",
                    {
                        "default": "",
                        "forceInput": True,
                        "tooltip": "Blocks that read the picture, like 0-20, 25; all where it is empty",
                    },
                ),
            },
        }

    def add(
        self,
        embeds: ImageEmbeds,
        ip_scale: float,
        ref_scale: float,
        start_percent: float,
        end_percent: float,
        lynx_cfg_scale: float | Sequence[float],
        vae: WanVAE | None = None,
        lynx_ip_embeds: FaceTokens | None = None,
        ref_image: Tensor | None = None,
        ref_text_embed: TextEmbeds | None = None,
        ref_blocks_to_use: str = "",
    ) -> tuple[ImageEmbeds]:
        """The embeds with the face. Raises ValueError where neither form of it, or a part of the picture, is given."""
        if lynx_ip_embeds is None and ref_image is None:
            raise ValueError("Lynx got no face: connect lynx_ip_embeds, ref_image, or both.")
        blocks = _blocks(ref_blocks_to_use)
        tokens, without_tokens = lynx_ip_embeds or (None, None)
        face = LynxFace(
            tokens=tokens,
            without_tokens=without_tokens,
            ip_scale=torch.tensor(float(ip_scale)),
            ref_scale=torch.tensor(float(ref_scale)),
            cfg=per_step(lynx_cfg_scale),
            ref_blocks=blocks,
            start=start_percent,
            end=end_percent,
        )
        if ref_image is not None:
            face = _with_picture(face, ref_image, vae, ref_text_embed)
        return (replace(embeds, payloads=(*embeds.payloads, face)),)


def _with_picture(face: LynxFace, image: Tensor, vae: WanVAE | None, text: TextEmbeds | None) -> LynxFace:
    if vae is None or text is None or not text.positive:
        raise ValueError(
            "ref_image needs vae and ref_text_embed: connect the model's VAE and WanVideoTextEncode with the prompt "
            "'image of a face'."
        )
    video = image[:1, ..., :3].permute(3, 0, 1, 2).float() * 2 - 1
    picture, empty = vae.encode(video), vae.encode(torch.zeros_like(video))
    prompt = text.positive[0][None]
    return replace(face, picture=picture[None], without_picture=empty[None], prompt=prompt)


def _blocks(text: str) -> tuple[int, ...] | None:
    """The blocks of a text like "0-20, 25"; None for all. Raises ValueError for anything else."""
    blocks: set[int] = set()
    for part in (part.strip() for part in text.split(",") if part.strip()):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"ref_blocks_to_use must be numbers and ranges, like 0-20, 25, not '{part}'.")
        blocks.update(range(int(ends[0]), int(ends[-1]) + 1))
    return tuple(sorted(blocks)) if text.strip() else None


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    LoadLynxResampler, LynxInsightFaceCrop, LynxEncodeFaceIP, WanVideoAddLynxEmbeds
)
