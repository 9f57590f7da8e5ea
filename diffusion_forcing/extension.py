"""SkyReels V2: the frame rate that the model was told in training joins the modulation of every block.

Source: SkyworkAI/SkyReels-V2 (`inject_sample_info`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens

# The two rows of the embedding: videos of 16 frames a second, and all others, which were of 24.
SLOW, OTHER = 0, 1
SLOW_FPS = 16


@dataclass(frozen=True)
class FrameRate(Payload):
    """row [1] of the embedding. Frames that were given before sampling stay as they are."""

    row: Tensor
    needs: ClassVar[str] = (
        "This model has no 'fps_embedding', so that fps has no effect: SkyReels V2 diffusion forcing models have one."
    )
    optional: ClassVar[bool] = True
    holds_given: ClassVar[bool] = True

    @classmethod
    def of(cls, fps: float) -> Self:
        """The row of a frame rate."""
        return cls(torch.tensor([SLOW if round(fps, 2) == SLOW_FPS else OTHER]))


@dataclass(frozen=True)
class FrameRateEmbedding(Extension):
    """Idle without its payload, as in a plain sampler."""

    payload: ClassVar[type] = FrameRate

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By its embedding."""
        return cls() if "fps_embedding.weight" in shapes else None

    def owns(self, key: str) -> bool:
        """The embedding and its projection."""
        return key.startswith(("fps_embedding.", "fps_projection."))

    def build(self, model: WanModel) -> None:
        """Under their published names."""
        dim = model.config.dim
        model.fps_embedding = nn.Embedding(2, dim)
        model.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))

    def prepare(self, model: WanModel, payload: FrameRate, inputs: ModelInputs, tokens: Tokens) -> tuple[Tokens, None]:
        """Added to the modulation of all frames alike."""
        change = model.fps_projection(model.fps_embedding(payload.row)).float().unflatten(-1, (6, -1))
        return tokens._replace(mod=tokens.mod + change.unsqueeze(1)), None


EXTENSION = FrameRateEmbedding
