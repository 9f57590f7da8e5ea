"""Phantom: pictures of subjects as frames of latents behind the video, which all blocks attend to.

Source: Phantom (Liu et al. 2025); aigc-apps/VideoX-Fun (pipeline_wan_phantom) and ComfyUI (WanPhantomSubjectToVideo)
for what each pass sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.conditioning import Payload, Row, Step
from ..wanvideo.extension import Extension
from ..wanvideo.guidance import NO_TEXT, at_step
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens

# The name of the subjects in guidance.
SUBJECT = "subject"


@dataclass(frozen=True)
class SubjectReferences(Payload):
    """latents [1, C, n, H, W]: n encoded pictures of subjects, at the video's size.

    cfg: guidance by the subjects, one number or one a step of the run. start, end: the part of the steps (0..1) in
    which the subjects are there.
    """

    latents: Tensor
    cfg: tuple[float, ...] = (1.0,)
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = "Phantom works with every Wan model; this one was built without extensions."
    encoded: ClassVar[bool] = True

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Nothing + cfg * (subjects - nothing) + scale * (all - subjects), where nothing and subjects lack the prompt.

        At a cfg of 1 that is the rule of text alone.
        """
        cfg = at_step(self.cfg, step)
        if not step.within(self.start, self.end) or math.isclose(cfg, 1.0) or math.isclose(scale, 1.0):
            return None
        return Row(scale), Row(cfg - scale, NO_TEXT), Row(1.0 - cfg, NO_TEXT | {SUBJECT})

    def without(self, names: frozenset[str]) -> Self:
        """Without subjects: empty frames in their place, as the authors train the unconditional form."""
        return replace(self, latents=torch.zeros_like(self.latents)) if SUBJECT in names else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class Phantom(Extension):
    """It has no weights: the model itself was trained to see frames behind the video as subjects."""

    payload: ClassVar[type] = SubjectReferences

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Nothing in a file tells it from the text-to-video model that it was trained from."""
        return cls()

    def prepare(
        self, model: WanModel, payload: SubjectReferences, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Appends the references as frames that go on in time; condition channels, if there are any, are empty.

        Raises ValueError for another size, or latents of another VAE than the model's.
        """
        if not inputs.step.within(payload.start, payload.end):
            return tokens, None
        channels, config = payload.latents.shape[1], model.config
        if channels != config.out_dim:
            raise ValueError(
                f"The Phantom references have {channels} latent channels but the video {config.out_dim}: encode the "
                "pictures with the model's own VAE."
            )
        latents = F.pad(payload.latents, (0, 0, 0, 0, 0, 0, 0, config.in_dim - channels))
        latents = latents.to(model.patch_embedding.weight.dtype)
        patches = model.patch_embedding(latents)
        frames, *size = tokens.grid
        if list(patches.shape[3:]) != size:
            raise ValueError(
                f"The Phantom references give {tuple(patches.shape[3:])} patches a frame but the video has "
                f"{tuple(size)}: encode the pictures at the width and height of the video."
            )
        references = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)
        rope = model.rope(
            (int(patches.shape[2]), *size),
            start=(frames, 0, 0),
            riflex_index=inputs.riflex_index,
            riflex_frames=frames,
            device=tokens.x.device,
        )
        # Where frames differ in time, as with given first frames, the references are as noisy as the last one.
        return tokens.appended(references.expand(tokens.x.shape[0], -1, -1), rope, tokens.last_frame_mod), None


EXTENSION = Phantom
