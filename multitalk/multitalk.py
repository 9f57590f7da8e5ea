"""Audio projection and audio cross-attention of MultiTalk and InfiniteTalk.

Source: MeiGen-AI/MultiTalk and MeiGen-AI/InfiniteTalk. Module names are the published checkpoint keys.
Shapes: B batch, F latent frames, S tokens a frame, T audio tokens a frame, C channels, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import sdpa
from ..kernels.fp8_rows import Fp8Rows
from ..wanvideo.modules.layers import WanLayerNorm, turned_heads
from ..wanvideo.shard import WHOLE, Shard
from .speakers import key_positions, query_positions, rotation

AUDIO_WINDOW = 5
FRAMES_PER_LATENT = 4
LATENT_WINDOW = AUDIO_WINDOW + FRAMES_PER_LATENT - 1


class AudioProjModel(nn.Module):
    """Wav2Vec2 features of the frames behind one latent frame -> audio tokens.

    features: layers times channels of the audio encoder. The first frame has its own projection (5 feature frames);
    every later latent frame stands for four pixel frames (8 feature frames).
    """

    def __init__(self, features: int, intermediate_dim: int, context_tokens: int, output_dim: int) -> None:
        super().__init__()
        self.tokens = (context_tokens, output_dim)
        self.proj1 = nn.Linear(AUDIO_WINDOW * features, intermediate_dim)
        self.proj1_vf = nn.Linear(LATENT_WINDOW * features, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, context_tokens * output_dim)
        self.norm = WanLayerNorm(output_dim, eps=1e-5, elementwise_affine=True)

    def forward(self, first: Tensor, later: Tensor) -> Tensor:
        """first [B, 1, 5, layers, channels], later [B, F - 1, 8, layers, channels] -> [B, F, T, output_dim]."""
        dtype = self.proj1.weight.dtype
        hidden = torch.cat(
            (
                F.relu(self.proj1(first.flatten(2).contiguous().to(dtype))),
                F.relu(self.proj1_vf(later.flatten(2).contiguous().to(dtype))),
            ),
            dim=1,
        )
        return self.norm(self.proj3(F.relu(self.proj2(hidden))).unflatten(-1, self.tokens))


def latent_windows(audio: Tensor) -> tuple[Tensor, Tensor]:
    """Features per pixel frame -> features per latent frame.

    audio [B, pixel frames, 5, layers, channels], each frame with its neighbours -2..2. The four frames behind a later
    latent give, in order: the first's window up to its centre, the two middle centres, the last's from its centre on.
    Returns first [B, 1, 5, ...] and later [B, F - 1, 8, ...]. Raises ValueError unless pixel frames are 4n+1.
    """
    if (audio.shape[1] - 1) % FRAMES_PER_LATENT:
        raise ValueError(f"Audio must cover 4n+1 frames, not {audio.shape[1]}.")
    centre = AUDIO_WINDOW // 2
    groups = audio[:, 1:].unflatten(1, (-1, FRAMES_PER_LATENT))
    later = torch.cat(
        (groups[:, :, 0, : centre + 1], groups[:, :, 1, centre : centre + 1],
         groups[:, :, 2, centre : centre + 1], groups[:, :, 3, centre:]),
        dim=2,
    )  # fmt: skip
    return audio[:, :1], later


def first_tokens(x: Tensor | Fp8Rows, count: int) -> Tensor | Fp8Rows:
    """The first tokens of x [B, L, C], dense."""
    if isinstance(x, Fp8Rows):
        return x._replace(values=x.values[:, :count].contiguous(), scale=x.scale[:, :count].contiguous())
    return x[:, :count].contiguous()


class SingleStreamAttention(nn.Module):
    """Every video token attends to the audio tokens of its own frame."""

    def __init__(self, dim: int, encoder_hidden_states_dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.attention = sdpa()
        self.q_linear = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(encoder_hidden_states_dim, dim * 2, bias=qkv_bias)

    def keys_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Audio tokens [B * F, T, audio channels] -> k, v [B * F, T, H, D]."""
        kv = self.kv_linear(encoder_hidden_states.contiguous()).contiguous()
        k, v = kv.unflatten(-1, (2, *self.heads)).unbind(2)
        return k.contiguous(), v.contiguous()

    def queries(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., C] -> [..., H, D]."""
        return self.q_linear(x).unflatten(-1, self.heads).contiguous()

    def attend(
        self, x: Tensor | Fp8Rows, k: Tensor, v: Tensor, shape: tuple[int, int, int], rope: Tensor | None = None
    ) -> Tensor:
        """x [B, L, C], k, v [B * F, T, H, D], shape (F, height, width) in tokens -> [B, L, C].

        Tokens after the frames that have audio get zeros.

        rope [B, L, D / 2, 2] turns the queries, for several speakers.
        """
        batch, count = (x.values if isinstance(x, Fp8Rows) else x).shape[:2]
        places = int(shape[1]) * int(shape[2])
        frames = int(k.shape[0]) // batch
        voiced = frames * places
        q = self.queries(first_tokens(x, voiced))
        if rope is not None:
            q = turned_heads(q, rope[:, :voiced])
        q = q.reshape(batch * frames, places, *self.heads).contiguous()
        out = self.proj(self.attention(q, k, v).flatten(2).contiguous())
        out = out.view(batch, voiced, -1)
        if voiced == count:
            return out
        return torch.cat((out, out.new_zeros(batch, count - voiced, out.shape[-1])), dim=1).contiguous()


class SingleStreamMultiAttention(SingleStreamAttention):
    """Audio attention for any number of speakers, told apart by rotary positions; with one it is the parent's."""

    def speaker_keys_values(self, encoder_hidden_states: Tensor, speakers: int) -> tuple[Tensor, Tensor]:
        """Audio tokens [B * F, P * T, audio channels], speaker by speaker -> k, v with every speaker's k in place."""
        k, v = self.keys_values(encoder_hidden_states)
        if speakers == 1:
            return k, v
        positions = key_positions(speakers, k.shape[1] // speakers, k.device)
        return turned_heads(k, rotation(positions, self.heads[1])), v

    def query_rope(self, scores: Tensor, shard: Shard = WHOLE) -> Tensor:
        """Speaker scores [B, L, P + 1] of this part of the tokens -> rope [B, L, D / 2, 2] of the queries."""
        return rotation(query_positions(scores, shard), self.heads[1])

    def forward(
        self,
        x: Tensor | Fp8Rows,
        encoder_hidden_states: Tensor,
        shape: tuple[int, int, int],
        x_ref_attn_map: Tensor | None = None,
        human_num: int = 1,
        shard: Shard = WHOLE,
    ) -> Tensor:
        """x [B, L, C], audio [B * F, P * T, audio channels], x_ref_attn_map [B, L, P + 1] for several speakers."""
        k, v = self.speaker_keys_values(encoder_hidden_states, human_num)
        rope = None if human_num == 1 else self.query_rope(x_ref_attn_map, shard)
        return self.attend(x, k, v, shape, rope)
