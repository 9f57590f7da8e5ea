"""EchoShot: several shots of one person in one video, told apart by phases of rotary embeddings.

In self-attention the positions of each shot's frames jump ahead, so that shots lie apart in time. In text
cross-attention all shots read all prompts, queries and keys of one shot turned by the same phase.

Source: EchoShot (Wang et al. 2025; D2I-ai/EchoShot, models/model.py). It has no weights of its own: its checkpoint is a
Wan 2.1 1.3B in all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import AttentionCall, attend
from ..kernels.rope import apply_rope
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.config import ROPE_THETA
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import CrossAttention, ModelInputs, Tokens, video_tokens

# Positions by which a shot lies behind the one before it, in frames and among prompts.
FRAME_JUMP, TEXT_JUMP = 4, 4
# How far the padding of the prompts lies behind the last shot's number.
PADDING_JUMP = 10
# Prompts of all shots together are padded to this many times the length of one.
TEXT_LENGTHS = 4
ALL_SHOWN = torch.ones(1, dtype=torch.bool)


@dataclass(frozen=True)
class ShotPrompts(Payload):
    """prompts: one [tokens, text_dim] a shot.

    places: of each latent frame that the forward sees, its shot; None: shots share out the frames of the forward.
    shown [B] of truth values: the passes that read the prompts; the text of the others stands for every shot.
    """

    prompts: tuple[Tensor, ...]
    shots: int
    places: tuple[int, ...] | None = None
    shown: Tensor = ALL_SHOWN
    needs: ClassVar[str] = "EchoShot works with every Wan model that reads text; this one was built without extensions."

    def window(self, window: Window) -> Self:
        """Frames keep the shot that they have in the whole video; references belong to the nearest one."""
        total = window.total or len(window.latents)
        frames = total - window.leading - window.trailing
        shots = shots_of(frames, self.shots)
        nearest = (min(max(place - window.leading, 0), frames - 1) for place in window.latents)
        return replace(self, places=tuple(shots[place] for place in nearest))

    def without(self, names: frozenset[str]) -> Self:
        """Of the prompt: the same shots under the negative one."""
        return replace(self, shown=~ALL_SHOWN) if "text" in names else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Which passes read the prompts is asked by the host in every forward."""
        return replace(super().to(device, dtype), shown=self.shown)


def shots_of(frames: int, shots: int) -> tuple[int, ...]:
    """The shot of every latent frame: equal shares, the rest to the last. Raises ValueError for too few frames."""
    if frames < shots:
        raise ValueError(
            f"A video of {frames} latent frames cannot hold {shots} shots: raise num_frames, or write fewer shots."
        )
    return tuple(min(frame // (frames // shots), shots - 1) for frame in range(frames))


class ShotText(NamedTuple):
    """Text source: prompts [B, T, C] one behind the other, and phases.

    queries [V, D/2, 2]: of the video's tokens; others behind them, of references, belong to no shot and do not turn.
    keys [B, T, D/2, 2]: of the prompts' tokens. lengths: how many of them each row has.
    """

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    lengths: tuple[int, ...]
    tokenwise = False

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """All queries to all prompts, each turned by its shot's phase."""
        k, v = cross.keys_values(self.tokens)
        # Other sources may leave only the first queries to this one.
        count = min(self.queries.shape[0], q.shape[1])
        q = torch.cat((apply_rope(q[:, :count], self.queries[:count]), q[:, count:]), dim=1)
        return attend(cross.attention, AttentionCall(q, apply_rope(k, self.keys), v, k_lens=self.lengths))

    def on(self, shard: Shard) -> ShotText:
        """The phases of this part's tokens."""
        return self._replace(queries=shard.take(self.queries, dim=0))


def phases(positions: Tensor, head_dim: int, device: torch.device) -> Tensor:
    """Rotations [..., D/2, 2] of whole heads, whose channels all turn with the one position [...]."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions.double()[..., None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)


@dataclass(frozen=True)
class EchoShot(Extension):
    """Present in every model, idle without its payload."""

    payload: ClassVar[type] = ShotPrompts

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Reads the model's own text layers."""
        return cls() if "text_embedding.0.weight" in shapes else None

    def prepare(
        self, model: WanModel, payload: ShotPrompts, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Other positions of the video's tokens, and a text source of all shots."""
        shots = payload.places or shots_of(tokens.grid[0], payload.shots)
        count, device = video_tokens(tokens.grid), tokens.x.device
        rope = torch.cat((_placed(model, tokens.grid, shots, inputs.riflex_index, device), tokens.rope[count:]))
        queries = torch.tensor(shots).repeat_interleave(tokens.grid[1] * tokens.grid[2]) * TEXT_JUMP
        shown = payload.shown.expand(len(inputs.text)).tolist()
        passes = zip(shown, inputs.text, strict=True)
        rows = [payload.prompts if own else (text,) * payload.shots for own, text in passes]
        text = _shot_text(model, rows, queries, tokens)
        return tokens._replace(rope=rope, text=text), None


def _shot_text(model: WanModel, rows: Sequence[Sequence[Tensor]], queries: Tensor, tokens: Tokens) -> ShotText:
    """The prompts of each row one behind the other, with the padding that they have without other rows."""
    lengths = [[len(prompt) for prompt in row] for row in rows]
    padded = tuple(max(TEXT_LENGTHS * model.config.text_len, sum(row)) for row in lengths)
    joined = [torch.cat(row) for row in rows]
    joined = [functional.pad(text, (0, 0, 0, count - len(text))) for text, count in zip(joined, padded, strict=True)]
    keys = torch.full((len(rows), max(padded)), len(rows[0]) - 1 + PADDING_JUMP)
    for row, own in zip(keys, lengths, strict=True):
        row[: sum(own)] = torch.arange(len(own)).repeat_interleave(torch.tensor(own)) * TEXT_JUMP
    turned = (phases(positions, model.config.head_dim, tokens.x.device) for positions in (queries, keys))
    return ShotText(model.embed_text(joined, tokens.x.dtype), *turned, padded)


def _placed(
    model: WanModel, grid: tuple[int, int, int], shots: Sequence[int], riflex_index: int, device: torch.device
) -> Tensor:
    """Rotations of the video's tokens, each frame ahead by its shot's jumps."""
    frames, height, width = grid
    rope = [
        model.rope(
            (1, height, width), start=(frame + shot * FRAME_JUMP, 0, 0), riflex_index=riflex_index,
            riflex_frames=frames, device=device,
        )
        for frame, shot in zip(range(frames), shots, strict=True)
    ]  # fmt: skip
    return torch.cat(rope)


EXTENSION = EchoShot
