"""HuMo as an extension of the Wan transformer: audio attention in every block, and reference pictures at the end.

The 17B model reads the pictures as condition channels, the 1.7B in the place of the last latent frames.
Source: Phantom-video/HuMo (generate, generate_1_7B, model_humo).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..wanvideo.conditioning import Payload, check_size
from ..wanvideo.extension import Extension
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import gated_residual
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import Grid, ModelInputs, Tokens, video_tokens
from .audio_attention import AudioCrossAttentionWrapper, AudioProjModel

PROJECTION = "audio_proj.audio_proj_glob_"
WRAPPER = ".audio_cross_attn_wrapper."
# Names of what a pass goes without.
TEXT, AUDIO, IMAGE = "text", "audio", "image"
# Timesteps above it are the early steps, which settle the composition.
STEP_CHANGE = 980
NEEDS = (
    f"HuMo needs a model with {PROJECTION}1.layer.weight: load a HuMo checkpoint (17B or 1.7B) in WanVideoModelLoader."
)


@dataclass(frozen=True)
class HuMoWindow(Payload):
    """What one pass reads of one window.

    audio [B, F, 8, 5, channels]: Whisper features behind each latent frame, zeros for references. scale: strength, 0-d.
    cond, early, empty [B, 4 + z, F, h, w]: mask and latents, the reference pictures in the last frames; `early` is read
    instead of `cond` while the timestep is above 980, and `empty` has no pictures. references: how many there are.
    """

    audio: Tensor
    scale: Tensor
    cond: Tensor
    early: Tensor
    empty: Tensor
    references: int
    needs: ClassVar[str] = NEEDS
    encoded: ClassVar[bool] = True

    def without(self, names: frozenset[str]) -> Self:
        """Silence is zero features. With neither text nor audio the pictures go too, but in the early steps alone."""
        cond = self.empty if IMAGE in names else self.cond
        return replace(
            self,
            audio=torch.zeros_like(self.audio) if AUDIO in names else self.audio,
            cond=cond,
            early=self.empty if {TEXT, AUDIO} <= names else cond,
        )


class Sound(NamedTuple):
    """Audio tokens [B, F, T, A] of every latent frame, strength (0-d), token grid."""

    tokens: Tensor
    scale: Tensor
    grid: Grid


@dataclass(frozen=True)
class HuMo(Extension):
    """Sizes: features of a latent frame's sound, hidden width of the projection, audio tokens a frame, their width."""

    features: int
    hidden_dim: int
    context_tokens: int
    output_dim: int
    payload: ClassVar[type] = HuMoWindow
    high_precision: ClassVar[tuple[str, ...]] = ("audio_proj",)

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the audio projection."""
        names = (f"{PROJECTION}{part}.layer.weight" for part in ("1", "3", "norm"))
        first, last, norm = (shapes.get(name) for name in names)
        if first is None or last is None or norm is None:
            return None
        return cls(features=first[1], hidden_dim=first[0], context_tokens=last[0] // norm[0], output_dim=norm[0])

    def owns(self, key: str) -> bool:
        """The projection, and the audio attention of every block."""
        return key.startswith(PROJECTION) or (key.startswith("blocks.") and WRAPPER in key)

    def build(self, model: WanModel) -> None:
        """Adds audio_proj and, in every block, audio_cross_attn_wrapper."""
        model.audio_proj = AudioProjModel(self.features, self.hidden_dim, self.context_tokens, self.output_dim)
        for block in model.blocks:
            block.audio_cross_attn_wrapper = AudioCrossAttentionWrapper(model.config, self.output_dim)

    def latents(self, model: WanModel, payload: HuMoWindow, latents: Tensor, inputs: ModelInputs) -> Tensor:
        """Pictures behind the noise; a model without condition channels has them in the last frames of the noise.

        Where another system fills the channels (start pictures), the last frames of these are replaced. Raises
        ValueError where the channels that are left do not fit, or the size.
        """
        cond = self._pictures(payload, inputs.timestep).to(latents).expand(latents.shape[0], -1, -1, -1, -1)
        check_size("The latents of HuMoEmbeds", cond, latents, "give both the same width, height and num_frames")
        noise, room = model.config.out_dim, model.config.in_dim - latents.shape[1]
        if room == cond.shape[1]:
            return torch.cat((latents, cond), dim=1)
        if room:
            raise ValueError(
                f"The encoded pictures of HuMoEmbeds give {cond.shape[1]} channels besides the noise, but the model "
                f"has room for {room}: disconnect the other pictures, or load a HuMo checkpoint."
            )
        video = latents.shape[2] - payload.references
        first, last = latents.split((video, payload.references), dim=2)
        if model.config.condition_channels == cond.shape[1]:
            last = torch.cat((last[:, :noise], cond[:, :, video:]), dim=1)
        else:
            last = torch.cat((cond[:, -noise:, video:], last[:, noise:]), dim=1)
        return torch.cat((first, last), dim=2)

    def _pictures(self, payload: HuMoWindow, timestep: Tensor) -> Tensor:
        # Decided on the device: asking for the value would stop the host in every pass.
        highest = timestep if timestep.dim() == 1 else timestep.amax(dim=1)
        return torch.where((highest > STEP_CHANGE).view(-1, 1, 1, 1, 1), payload.early, payload.cond)

    def prepare(
        self, model: WanModel, payload: HuMoWindow, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Sound]:
        """Audio tokens of every latent frame, references included."""
        frames, features = payload.audio.shape[1], payload.audio[0, 0].numel()
        if features != self.features:
            raise ValueError(
                f"HuMo's audio layers read {self.features} features a frame but the audio encoder gives {features}: "
                "load the Whisper encoder that this checkpoint was trained with (large-v3)."
            )
        if frames != tokens.grid[0]:
            raise ValueError(
                f"HuMoEmbeds were made for {frames} latent frames, references included, but the sampler makes "
                f"{tokens.grid[0]}."
            )
        audio = model.audio_proj(payload.audio).to(tokens.x.dtype)
        return tokens, Sound(audio.expand(tokens.x.shape[0], -1, -1, -1).contiguous(), payload.scale, tokens.grid)

    def on(self, state: Sound, shard: Shard) -> Sound:
        """Every frame's sound for this part of its places."""
        return state._replace(grid=shard.grid(state.grid))

    def after_cross_attn(self, block: WanAttentionBlock, x: Tensor, cond: Sound) -> tuple[Tensor, Sound]:
        """Adds audio attention to the video tokens of the residual stream."""
        count = video_tokens(cond.grid)
        video = x[:, :count]
        video = gated_residual(video, block.audio_cross_attn_wrapper(video, cond.tokens), cond.scale)
        return video if count == x.shape[1] else torch.cat((video, x[:, count:]), dim=1), cond


EXTENSION = HuMo
