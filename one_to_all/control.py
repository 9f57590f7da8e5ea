"""How poses steer in One-to-All: control blocks behind the first main blocks.

They start from the tokens behind the first main block plus the drawn poses' tokens; what each gives is added behind the
main block that follows. Source: ssj9596/One-to-All-Animation. Shapes: B batch, L tokens, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, Tokens, video_tokens

if TYPE_CHECKING:
    from .extension import Animation


class Places(NamedTuple):
    """Tokens that poses steer: the first `video`, and from `start` to `stop` the reference's, of which there may be
    none. Those between are other systems'."""

    video: int
    start: int
    stop: int

    def of(self, t: Tensor, dim: int = 1) -> Tensor:
        """Of a tensor with all tokens along `dim`, these."""
        if self.start in (self.video, self.stop):
            return t.narrow(dim, 0, self.stop if self.start < self.stop else self.video)
        parts = t.narrow(dim, 0, self.video), t.narrow(dim, self.start, self.stop - self.start)
        return torch.cat(parts, dim=dim)

    def on(self, shard: Shard) -> Places:
        """Those of a part of the sequence."""
        return Places(*(shard.count(place) for place in self))


class PoseControl:
    """The control blocks' way through one forward.

    poses [1, L, C]: for the tokens at `places`; shard: of these.
    """

    def __init__(self, poses: Tensor, strength: float, places: Places, shard: Shard = WHOLE) -> None:
        self._done = 0
        self._poses: Tensor | None = poses
        self._x: Tensor | None = None
        self._strength = strength
        self._places = places
        self._shard = shard

    def on(self, shard: Shard) -> PoseControl:
        """The part of these tokens, before the first block ran. Raises ValueError where others lie between them."""
        video, start, stop = self._places
        if video < start < stop:
            shard.refuse("Poses of One-to-All behind the reference tokens of another system")
        length = self._poses.shape[1]
        return PoseControl(shard.take(self._poses), self._strength, self._places.on(shard), shard.first(length))

    def behind(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens [B, N, C] behind main block `index`, with the control block's share where one belongs to it.

        Where a system left out a main block, its control block runs late and its share is lost, as that belongs to it.
        """
        if self._poses is not None:
            self._x, self._poses = self._places.of(x) + self._poses, None
            return x
        blocks = model.controlnet.blocks
        if self._x is None or index > len(blocks):
            self._x = None
            return x
        read = self._read(inputs)
        for block in blocks[self._done : index]:
            with model.visit(block):
                self._x = block(self._x, read)
        self._done = index
        return self._added(x, model.controlnet_zero[index - 1](self._x) * self._strength)

    def _added(self, x: Tensor, share: Tensor) -> Tensor:
        video, start, stop = self._places
        parts = [x[:, :video] + share[:, :video], x[:, video:start], x[:, start:stop] + share[:, video:], x[:, stop:]]
        return torch.cat([part for part in parts if part.shape[1]], dim=1)

    def _read(self, inputs: BlockInputs) -> BlockInputs:
        """Without the tokens of other systems, and with dense attention."""
        rows = None if inputs.rows is None else self._places.of(inputs.rows, dim=0)
        rope = self._places.of(inputs.rope, dim=0)
        return inputs._replace(rows=rows, rope=rope, attention=None, conds=(), shard=self._shard)


def pose_tokens(model: WanModel, payload: Animation, tokens: Tokens, *, prefixed: bool, width: int) -> Tensor:
    """Drawn poses [1, L, C] for the tokens of the video, zero where they have nothing for them.

    prefixed: the reference's pose follows. Raises ValueError where poses and video differ in size, or the encoder's
    `width` is not the model's.
    """
    _check(payload, tokens, width)
    encoder, (_, height, across) = model.input_hint_block, tokens.grid
    video = encoder(payload.poses).flatten(2).transpose(1, 2)
    before = payload.leading * height * across
    poses = F.pad(video, (0, 0, before, video_tokens(tokens.grid) - before - video.shape[1]))
    if prefixed:
        poses = torch.cat((poses, encoder(payload.prefix).flatten(2).transpose(1, 2)), dim=1)
    return poses.to(tokens.x.dtype).contiguous()


def _check(payload: Animation, tokens: Tokens, width: int) -> None:
    frames, *sides = tokens.latents.shape[2:]
    wanted = [8 * side for side in sides]
    for name, pictures in (("pose_images", payload.poses), ("pose_prefix_image", payload.prefix)):
        if list(pictures.shape[3:]) != wanted:
            raise ValueError(
                f"One-to-All's {name} are {pictures.shape[4]}x{pictures.shape[3]} but the video is "
                f"{wanted[1]}x{wanted[0]}: resize them to the video's width and height."
            )
    count = (payload.poses.shape[2] - 1) // 4 + 1
    if payload.leading + count > frames:
        raise ValueError(
            f"One-to-All's pose_images have {payload.poses.shape[2]} frames, {count} in latents, but the video has "
            f"{frames - payload.leading}: give one for each frame."
        )
    if width != tokens.x.shape[2]:
        raise ValueError(
            f"The pose encoder of this One-to-All file makes tokens of {width} channels but the model's have "
            f"{tokens.x.shape[2]}: load the whole checkpoint of its authors."
        )
