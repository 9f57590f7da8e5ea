"""The node of RealisDance-DiT."""

from __future__ import annotations

import torch

from ..node_tools import CATEGORY, Inputs, Latent, mappings
from .extension import DancePoses

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}


class WanVideoRealisDanceLatents:
    """A reference picture and poses that it takes."""

    DISPLAY_NAME = "WanVideo RealisDance Latents"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("ADD_COND_LATENTS",)
    RETURN_NAMES = ("add_cond_latents",)
    DESCRIPTION = (
        "RealisDance-DiT: who is in a picture moves as renders of bodies (SMPL) and hands (HaMeR) do. Connect it to "
        "add_cond_latents of WanVideoImageToVideoEncode."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        start, end = "Part of the steps from which on poses are there", "Part of the steps up to which poses are there"
        rendered = "Renders of {} for every frame, encoded; one of the two is enough"
        return {
            "required": {
                "ref_latent": ("LATENT", {"tooltip": "The picture, encoded at the size of the video"}),
                "pose_cond_start_percent": ("FLOAT", {"default": 0.0, **PERCENT, "tooltip": start}),
                "pose_cond_end_percent": ("FLOAT", {"default": 1.0, **PERCENT, "tooltip": end}),
            },
            "optional": {
                "smpl_latent": ("LATENT", {"tooltip": rendered.format("bodies")}),
                "hamer_latent": ("LATENT", {"tooltip": rendered.format("hands")}),
            },
        }

    def process(
        self,
        ref_latent: Latent,
        pose_cond_start_percent: float,
        pose_cond_end_percent: float,
        hamer_latent: Latent | None = None,
        smpl_latent: Latent | None = None,
    ) -> tuple[DancePoses]:
        """Reference and poses. Raises ValueError without poses, and where the two differ in size."""
        given = [None if latent is None else latent["samples"][:1].float() for latent in (smpl_latent, hamer_latent)]
        known = [poses for poses in given if poses is not None]
        if not known:
            raise ValueError("RealisDance has no poses to follow: connect smpl_latent, hamer_latent or both.")
        if known[0].shape != known[-1].shape:
            raise ValueError(
                f"smpl_latent is {tuple(known[0].shape)} but hamer_latent {tuple(known[-1].shape)}: render both for "
                "the same frames and size."
            )
        poses = torch.cat([torch.zeros_like(known[0]) if part is None else part for part in given], dim=1)
        reference = ref_latent["samples"][:1].float()
        where = {"start": pose_cond_start_percent, "end": pose_cond_end_percent}
        return (DancePoses(reference=reference, poses=poses, **where),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoRealisDanceLatents)
