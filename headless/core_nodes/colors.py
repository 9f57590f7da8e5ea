"""Colors of pictures made to match others (KJNodes)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...multitalk.colormatch import match_colors
from ...node_tools import Inputs

METHODS = ["mkl", "hm", "reinhard", "mvgd", "hm-mvgd-hm", "hm-mkl-hm"]


class ColorMatch:
    """Gives pictures the colors of a reference, all of one or each of its own."""

    FUNCTION = "colormatch"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"image_ref": ("IMAGE",), "image_target": ("IMAGE",), "method": (METHODS, {"default": "mkl"})},
            "optional": {
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
                "multithread": ("BOOLEAN", {"default": True}),
            },
        }

    def colormatch(
        self, image_ref: Tensor, image_target: Tensor, method: str, strength: float = 1.0, multithread: bool = True
    ) -> tuple[Tensor]:
        """IMAGE in 0..1; strength: from the pictures as they are (0) to matched ones (1), and beyond."""
        if strength == 0:
            return (image_target,)
        if len(image_ref) not in (1, len(image_target)):
            raise ValueError(
                f"There are {len(image_ref)} references for {len(image_target)} pictures: give one, or one for each."
            )
        pairs = zip(image_target[..., :3], image_ref[..., :3].expand(len(image_target), -1, -1, -1), strict=True)
        matched = torch.cat([match_colors(image[None], reference, method) for image, reference in pairs])
        return (torch.lerp(image_target[..., :3], matched, strength).clamp(0, 1),)


NODE_CLASS_MAPPINGS = {"ColorMatch": ColorMatch}
