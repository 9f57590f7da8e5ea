"""BindWeave: pictures of subjects as condition frames in front of the video, and what a language model sees in them.

Source: bytedance/BindWeave (s2v/models/predictor/wan_dit_mllm.py, pipeline wan_pipeline_s2v.py); BindWeave (Li et al.
2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Text, Tokens, video_tokens

PROJECTION = "text_projection.0.weight"


@dataclass(frozen=True)
class SubjectFrames(Payload):
    """frames [1, 4 + C, n, H, W]: mask and latents of the frames in front, empty ones included.

    text [1, T, features]: hidden states of the language model for the prompt and the pictures; negative: what passes
    without the prompt read instead. None: nothing.
    """

    frames: Tensor
    text: Tensor | None = None
    negative: Tensor | None = None
    needs: ClassVar[str] = (
        "This model has no text_projection.0.weight, so it cannot read BindWeave's subjects: load the BindWeave model, "
        "or disconnect WanVideoAddBindweaveEmbeds."
    )

    def without(self, names: frozenset[str]) -> Self:
        """The negative text goes with the negative prompt; subjects stay."""
        return replace(self, text=self.negative) if "text" in names else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the patch embedding reads them, and text until its projection does."""
        return super().to(device, torch.float32)


@dataclass(frozen=True)
class BindWeave(Extension):
    """features: width of the language model's hidden states."""

    features: int
    payload: ClassVar[type] = SubjectFrames

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By the projection of the hidden states."""
        return cls(shapes[PROJECTION][1]) if PROJECTION in shapes else None

    def owns(self, key: str) -> bool:
        """The projection."""
        return key.startswith("text_projection.")

    def build(self, model: WanModel) -> None:
        """Under its published name."""
        dim = model.config.dim
        model.text_projection = nn.Sequential(
            nn.Linear(self.features, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )

    def prepare(
        self, model: WanModel, payload: SubjectFrames, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Frames without noise come first in time, the video later; hidden states come before the prompt.

        Raises ValueError where the frames do not fit the model or the video.
        """
        if payload.text is not None:
            tokens = tokens._replace(text=self._text(model, payload.text, tokens))
        channels = model.config.in_dim - payload.frames.shape[1]
        if channels != model.config.out_dim:
            raise ValueError(
                f"The subjects have {payload.frames.shape[1]} channels besides the noise, but the model reads "
                f"{model.config.in_dim - model.config.out_dim}: load the BindWeave model."
            )
        latents = F.pad(payload.frames, (0, 0, 0, 0, 0, 0, channels, 0))
        patches = model.patch_embedding(latents.to(model.patch_embedding.weight.dtype))
        frames, *size = tokens.grid
        if list(patches.shape[3:]) != size:
            raise ValueError(
                f"The subjects give {tuple(patches.shape[3:])} patches a frame but the video has {tuple(size)}: encode "
                "the pictures at the width and height of the video."
            )
        count = patches.shape[2]
        how = {"riflex_index": inputs.riflex_index, "riflex_frames": frames + count, "device": tokens.x.device}
        later = model.rope(tokens.grid, start=(count, 0, 0), **how)
        tokens = tokens._replace(rope=torch.cat((later, tokens.rope[video_tokens(tokens.grid) :])))
        subjects = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype).expand(tokens.x.shape[0], -1, -1)
        return tokens.appended(subjects, model.rope((count, *size), **how)), None

    def _text(self, model: WanModel, text: Tensor, tokens: Tokens) -> Text:
        if not isinstance(tokens.text, Text):
            raise ValueError("BindWeave reads one prompt for the whole video: write it without '|' and shot marks.")
        if text.shape[-1] != self.features:
            raise ValueError(
                f"qwenvl_embeds have {text.shape[-1]} features but the model reads {self.features}: encode them with "
                "the language model that BindWeave was trained with (Qwen2.5-VL 7B)."
            )
        prompt = tokens.text.tokens
        added = model.text_projection(text.to(model.text_projection[0].weight.dtype)).to(prompt)
        return Text(torch.cat((added.expand(prompt.shape[0], -1, -1), prompt), dim=1))


EXTENSION = BindWeave
