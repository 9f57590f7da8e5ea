"""How a HuMo transformer hears: the projection of Whisper features, and the audio attention of every block.

Source: Phantom-video/HuMo (model_humo, audio_proj). Module names are the published checkpoint keys.
Shapes: B batch, F latent frames, S video tokens a frame, T audio tokens a frame, A audio channels, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.config import WanConfig
from ..wanvideo.modules.attention import WanT2VCrossAttention
from ..wanvideo.modules.layers import WanLayerNorm, normalize


class AudioProjModel(nn.Module):
    """Features of the sound behind one latent frame -> its audio tokens. features: all of a frame's, in one row."""

    def __init__(self, features: int, hidden_dim: int, context_tokens: int, output_dim: int) -> None:
        super().__init__()
        self.tokens = (context_tokens, output_dim)
        self.audio_proj_glob_1 = _wrapped(nn.Linear(features, hidden_dim))
        self.audio_proj_glob_2 = _wrapped(nn.Linear(hidden_dim, hidden_dim))
        self.audio_proj_glob_3 = _wrapped(nn.Linear(hidden_dim, context_tokens * output_dim))
        self.audio_proj_glob_norm = _wrapped(WanLayerNorm(output_dim, eps=1e-5, elementwise_affine=True))

    def forward(self, audio: Tensor) -> Tensor:
        """[B, F, window, layers, channels] -> [B, F, T, A]."""
        first, second, third = (
            part["layer"] for part in (self.audio_proj_glob_1, self.audio_proj_glob_2, self.audio_proj_glob_3)
        )
        hidden = audio.flatten(2).contiguous().to(first.weight.dtype)
        hidden = F.relu(second(F.relu(first(hidden))))
        return self.audio_proj_glob_norm["layer"](third(hidden).unflatten(-1, self.tokens))


def _wrapped(layer: nn.Module) -> nn.ModuleDict:
    """Published keys have one more level, "layer", around each."""
    return nn.ModuleDict({"layer": layer})


class WanHuMoCrossAttention(WanT2VCrossAttention):
    """Cross-attention to audio: the tokens of a frame attend to the audio tokens of that frame alone."""

    def __init__(self, config: WanConfig, audio_dim: int) -> None:
        super().__init__(config, sdpa())
        self.k = nn.Linear(audio_dim, config.dim)
        self.v = nn.Linear(audio_dim, config.dim)

    def within_frames(self, x: Tensor, audio: Tensor) -> Tensor:
        """x [B, F * S, C] normalized, or its FP8 rows, and audio [B, F, T, A] -> [B, F * S, C]."""
        batch, frames = audio.shape[:2]
        q = self.split(self.norm_q(self.q(x)))
        k, v = self.keys_values(audio.flatten(0, 1))
        out = self.project(self.attention(q.reshape(batch * frames, -1, *self.heads), k, v))
        return out.reshape(batch, -1, out.shape[-1])


class AudioCrossAttentionWrapper(nn.Module):
    """Audio attention behind a norm of its own, before the residual."""

    def __init__(self, config: WanConfig, audio_dim: int) -> None:
        super().__init__()
        self.audio_cross_attn = WanHuMoCrossAttention(config, audio_dim)
        self.norm1_audio = WanLayerNorm(config.dim, config.eps, elementwise_affine=True)

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        """x [B, F * S, C], audio [B, F, T, A] -> [B, F * S, C]."""
        attention = self.audio_cross_attn
        return attention.within_frames(normalize(self.norm1_audio, x, attention.readers()), audio)
