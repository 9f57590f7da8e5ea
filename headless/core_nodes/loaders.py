"""Encoders that ComfyUI loads itself: CLIP vision, Wan's text encoder, and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...host import get_host
from ...node_tools import Inputs, files
from ...wanvideo.modules.clip import ClipVision, load_clip_vision
from ...wanvideo.modules.qwen_vl import QwenVision, load_qwen_vl
from ...wanvideo.modules.t5 import TextEncoder, load_text_encoder

TEXT_LENGTH = 512
QWEN_VL = "qwen_image"


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

    def tokenize(self, text: str, images: Sequence[Tensor] | None = None, llama_template: str | None = None) -> str:
        """The text. Raises ValueError where pictures may come with it."""
        if images is not None:
            raise ValueError(
                f"{self.encoder.path.name} is a UMT5 text encoder, which sees no pictures: load Qwen2.5-VL with "
                "CLIPLoader of type 'qwen_image'."
            )
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[list[object]]:
        """CONDITIONING, padded to 512 tokens with zeros; the encoder then makes room for the models that follow."""
        embedding: Tensor = self.encoder.encode([tokens], device=self.device)[0].float()
        self.encoder.managed.release()
        padded = torch.nn.functional.pad(embedding, (0, 0, 0, max(TEXT_LENGTH - len(embedding), 0)))
        return [[padded[None], {}]]


class CLIPLoader:
    """A text encoder from models/text_encoders: Wan's UMT5, or Qwen2.5-VL."""

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
        """Encoders that are built."""
        known = type in ("wan", QWEN_VL)
        return known or f"CLIPLoader of type '{type}' runs in ComfyUI only; Wan workflows use 'wan' or '{QWEN_VL}'."

    def load_clip(
        self, clip_name: str, type: str = "stable_diffusion", device: str = "default"
    ) -> tuple[Clip | QwenVision]:
        """Load it. Qwen2.5-VL runs on the host's device, whatever `device` says."""
        verdict = self.VALIDATE_INPUTS(type)
        if verdict is not True:
            raise ValueError(verdict)
        host = get_host()
        chosen = torch.device("cpu") if device == "cpu" else None
        dtype = torch.float32 if "cpu" in (device, host.device().type) else torch.bfloat16
        path = host.find_file("text_encoders", clip_name)
        if type == QWEN_VL:
            return (load_qwen_vl(path, dtype=dtype, host=host),)
        encoder = load_text_encoder(path, dtype=dtype, host=host)
        return (Clip(encoder, chosen),)


class CLIPTextEncode:
    """Encodes a prompt."""

    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)}}

    def encode(self, text: str, clip: Clip | QwenVision) -> tuple[list[list[object]]]:
        """CONDITIONING."""
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


NODE_CLASS_MAPPINGS = {"CLIPVisionLoader": CLIPVisionLoader, "CLIPLoader": CLIPLoader, "CLIPTextEncode": CLIPTextEncode}
