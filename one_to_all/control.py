"""How poses steer in One-to-All: control blocks behind the first main blocks.

They start from the tokens behind the first main block plus the drawn poses' tokens; what each gives is added behind the
main block that follows. Source: ssj9596/One-to-All-Animation.

Shapes: B batch, P pixel frames, L tokens, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.frames import latent_frames
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, Tokens, video_tokens

# Side of a latent.
PIXELS = 8


class DrawnPoses(NamedTuple):
    """poses [1, 3, P, H, W] in -1..1 of the video; prefix [1, 3, 1, H, W]: of the reference, None without one.

    leading: latent frames in front of the video's, which have no pose.
    """

    poses: Tensor
    prefix: Tensor | None
    leading: int


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
        own = shard.first(self._poses.shape[1])
        return PoseControl(shard.take(self._poses), self._strength, self._places.on(shard), own)

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


def pose_tokens(encoder: nn.Module, drawn: DrawnPoses, tokens: Tokens) -> Tensor:
    """Tokens [1, L, C] of drawn poses for those of the video, zero where they have nothing for them, then the prefix's.

    Raises ValueError where poses and video differ in size, or the encoder's width is not the model's.
    """
    _check_sizes(drawn, tokens)
    video = encoder(drawn.poses).flatten(2).transpose(1, 2)
    width, wanted = video.shape[2], tokens.x.shape[2]
    if width != wanted:
        raise ValueError(
            f"The pose encoder of this One-to-All file makes tokens of {width} channels but the model's have {wanted}: "
            "load the whole checkpoint of its authors."
        )
    _, height, across = tokens.grid
    before = drawn.leading * height * across
    poses = F.pad(video, (0, 0, before, video_tokens(tokens.grid) - before - video.shape[1]))
    if drawn.prefix is not None:
        poses = torch.cat((poses, encoder(drawn.prefix).flatten(2).transpose(1, 2)), dim=1)
    return poses.to(tokens.x.dtype).contiguous()


def _check_sizes(drawn: DrawnPoses, tokens: Tokens) -> None:
    frames, *sides = tokens.latents.shape[2:]
    wanted = [PIXELS * side for side in sides]
    for name, pictures in (("pose_images", drawn.poses), ("pose_prefix_image", drawn.prefix)):
        if pictures is not None and list(pictures.shape[3:]) != wanted:
            raise ValueError(
                f"One-to-All's {name} are {pictures.shape[4]}x{pictures.shape[3]} but the video is "
                f"{wanted[1]}x{wanted[0]}: resize them to the video's width and height."
            )
    count = latent_frames(drawn.poses.shape[2])
    if drawn.leading + count > frames:
        raise ValueError(
            f"One-to-All's pose_images have {drawn.poses.shape[2]} frames, {count} in latents, but the video has "
            f"{frames - drawn.leading}: give one for each frame."
        )
