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


@dataclass(frozen=True)
class ShotPrompts(Payload):
    """prompts: one [tokens, text_dim] a shot; empty in passes without the prompt, whose text stands for every shot.

    places: of each latent frame that the forward sees, its shot; None: shots share out the frames of the forward.
    """

    prompts: tuple[Tensor, ...]
    shots: int
    places: tuple[int, ...] | None = None
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
        return replace(self, prompts=()) if "text" in names else self


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
    keys [T, D/2, 2]: of the prompts' tokens.
    """

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    tokenwise = False

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """All queries to all prompts, each turned by its shot's phase."""
        k, v = cross.keys_values(self.tokens)
        # Other sources may leave only the first queries to this one.
        count = min(self.queries.shape[0], q.shape[1])
        q = torch.cat((apply_rope(q[:, :count], self.queries[:count]), q[:, count:]), dim=1)
        return cross.attention(q, apply_rope(k, self.keys), v)

    def on(self, shard: Shard) -> ShotText:
        """The phases of this part's tokens."""
        return self._replace(queries=shard.take(self.queries, dim=0))


def phases(positions: Sequence[int], head_dim: int, device: torch.device) -> Tensor:
    """Rotations [len(positions), D/2, 2] of whole heads, whose channels all turn with the one position."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies)
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
        rows = [payload.prompts or (text,) * payload.shots for text in inputs.text]
        lengths = [len(prompt) for prompt in rows[0]]
        if any([len(prompt) for prompt in row] != lengths for row in rows):
            raise ValueError("The passes of a batch have prompts of different lengths: turn batched_cfg off.")
        padded = max(TEXT_LENGTHS * model.config.text_len, sum(lengths))
        joined = [functional.pad(text := torch.cat(row), (0, 0, 0, padded - len(text))) for row in rows]
        keys = [shot * TEXT_JUMP for shot, length in enumerate(lengths) for _ in range(length)]
        keys += [payload.shots - 1 + PADDING_JUMP] * (padded - len(keys))
        queries = [shot * TEXT_JUMP for shot in shots for _ in range(tokens.grid[1] * tokens.grid[2])]
        head_dim = model.config.head_dim
        text = ShotText(
            model.embed_text(joined, tokens.x.dtype), phases(queries, head_dim, device), phases(keys, head_dim, device)
        )
        return tokens._replace(rope=rope, text=text), None


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
