"""StoryMem: pictures of earlier shots as latent frames in front of a video, at positions before its first frame.

Source: Kevin-thu/StoryMem (wan/memory2video.py); StoryMem (Zhang et al. 2025). A LoRA on an image-to-video model reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from ..image_to_video.extension import ImageCondition
from ..wanvideo.conditioning import Payload
from ..wanvideo.extension import Extension
from ..wanvideo.modifier import Modifier, Run
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import ModelInputs, Tokens, video_tokens

if TYPE_CHECKING:
    from ..host import Host
    from ..wanvideo.request import Latent, SampleRequest


@dataclass(frozen=True)
class MemoryPositions(Payload):
    """The first `count` latent frames are memory: they lie `stride` frames apart, up to `stride` before the video."""

    count: int
    stride: int
    needs: ClassVar[str] = "StoryMem works with every Wan model; this one was built without extensions."


@dataclass(frozen=True)
class StoryMem(Extension):
    """It has no weights. Idle without its payload, where memory simply comes before the video in time."""

    payload: ClassVar[type] = MemoryPositions

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Nothing in a file tells it."""
        return cls()

    def prepare(
        self, model: WanModel, payload: MemoryPositions, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, None]:
        """Memory at negative times, the video from 0 on: frames turn by as much as they move in time.

        So positions that another system gave to the video move along.
        """
        frames, height, width = tokens.grid
        count, stride = payload.count, payload.stride
        moves = [-(count - place) * stride - place for place in range(count)] + [-count] * (frames - count)
        span = -min(moves)
        how = {"riflex_index": inputs.riflex_index, "riflex_frames": frames, "device": tokens.x.device}
        turns = model.rope((span + 1, 1, 1), start=(-span, 0, 0), **how)[[span + move for move in moves]]
        video = tokens.rope[: video_tokens(tokens.grid)].unflatten(0, (frames, height * width))
        cosine, sine = turns[:, None].unbind(-1)
        turned = torch.stack(
            (video[..., 0] * cosine - video[..., 1] * sine, video[..., 0] * sine + video[..., 1] * cosine), dim=-1
        )
        rope = torch.cat((turned.flatten(0, 1), tokens.rope[video_tokens(tokens.grid) :]))
        return tokens._replace(rope=rope), None


@dataclass(frozen=True)
class WithoutMemory(Modifier):
    """The result without the first `count` latent frames."""

    count: int

    def around_run(self, run: Run) -> Run:
        """Both results of the run, cut."""

        def cut(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
            return tuple(self._cut(latent) for latent in run(request, host))

        return cut

    def _cut(self, latent: Latent) -> Latent:
        samples = {"samples": latent["samples"][:, :, self.count :]}
        return {**latent, **samples, "has_ref": latent.get("has_ref", 0) - self.count}


def with_memory(payloads: tuple[Payload, ...], memory: Tensor) -> tuple[Payload, ...]:
    """The payloads with memory [C, n, H, W] in front of their picture. Raises ValueError where it does not fit."""
    picture = next((p for p in payloads if type(p) is ImageCondition), None)
    if picture is None:
        raise ValueError(
            "StoryMem puts pictures of earlier shots in front of a start picture: connect the image embeds of "
            "WanVideoImageToVideoEncode."
        )
    if (memory.shape[0], *memory.shape[2:]) != (picture.cond.shape[1], *picture.cond.shape[3:]):
        raise ValueError(
            f"The memory is {tuple(memory.shape)} in latents, but the video is {tuple(picture.cond.shape[1:])} "
            "(channels, frames, height, width): connect the VAE that the start picture was encoded with."
        )
    ones = torch.ones_like(picture.mask[:, :, :1]).expand(-1, -1, memory.shape[1], -1, -1)
    longer = replace(
        picture, cond=torch.cat((memory[None].to(picture.cond), picture.cond), dim=2),
        mask=torch.cat((ones, picture.mask), dim=2),
    )  # fmt: skip
    return tuple(longer if payload is picture else payload for payload in payloads)


EXTENSION = StoryMem
