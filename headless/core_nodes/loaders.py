"""Encoders that ComfyUI loads itself: CLIP vision, and Wan's text encoder for CLIPTextEncode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...host import get_host
from ...node_tools import files
from ...wanvideo.modules.clip import ClipVision, load_clip_vision
from ...wanvideo.modules.t5 import TextEncoder, load_text_encoder

Inputs = dict[str, dict[str, tuple[object, ...]]]
TEXT_LENGTH = 512


class CLIPVisionLoader:
    """A CLIP vision encoder from models/clip_vision."""

    FUNCTION = "load_clip"
    RETURN_TYPES = ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"clip_name": (files("clip_vision"),)}}

    def load_clip(self, clip_name: str) -> tuple[ClipVision]:
        """Load it in half precision, in float32 on a CPU."""
        host = get_host()
        dtype = torch.float32 if host.device().type == "cpu" else torch.float16
        return (load_clip_vision(host.find_file("clip_vision", clip_name), dtype=dtype, host=host),)


@dataclass(frozen=True)
class Clip:
    """A text encoder and where it computes (None: the host's device)."""

    encoder: TextEncoder
    device: torch.device | None


class CLIPLoader:
    """A text encoder from models/text_encoders; only Wan's UMT5."""

    FUNCTION = "load_clip"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "clip_name": (files("text_encoders"),),
                "type": ("STRING", {"default": "stable_diffusion"}),
            },
            "optional": {"device": (["default", "cpu"], {"advanced": True})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, type: str) -> bool | str:
        """Only Wan's encoder."""
        return type == "wan" or f"CLIPLoader of type '{type}' runs in ComfyUI only; Wan workflows use type 'wan'."

    def load_clip(self, clip_name: str, type: str = "stable_diffusion", device: str = "default") -> tuple[Clip]:
        """Load it."""
        verdict = self.VALIDATE_INPUTS(type)
        if verdict is not True:
            raise ValueError(verdict)
        host = get_host()
        chosen = torch.device("cpu") if device == "cpu" else None
        dtype = torch.float32 if "cpu" in (device, host.device().type) else torch.bfloat16
        encoder = load_text_encoder(host.find_file("text_encoders", clip_name), dtype=dtype, host=host)
        return (Clip(encoder, chosen),)


class CLIPTextEncode:
    """Encodes a prompt as ComfyUI does: padded to 512 tokens with zeros."""

    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)}}

    def encode(self, text: str, clip: Clip) -> tuple[list[list[object]]]:
        """CONDITIONING; the encoder then makes room for the models that follow."""
        embedding: Tensor = clip.encoder.encode([text], device=clip.device)[0].float()
        clip.encoder.managed.release()
        padded = torch.nn.functional.pad(embedding, (0, 0, 0, max(TEXT_LENGTH - len(embedding), 0)))
        return ([[padded[None], {}]],)


NODE_CLASS_MAPPINGS = {"CLIPVisionLoader": CLIPVisionLoader, "CLIPLoader": CLIPLoader, "CLIPTextEncode": CLIPTextEncode}
