"""What other nodes give to the one that encodes pictures."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import AddedCondition


@dataclass(frozen=True, kw_only=True)
class Toy(AddedCondition):
    needs: ClassVar[str] = "none"
    name: str = "toy"


class FakeVae:
    spatial_factor = 8
    managed = property(lambda self: self)

    def encode(self, video, *, tile=None, quiet=False):
        frames = (video.shape[1] - 1) // 4 + 1
        return video.sum() + torch.ones(16, frames, video.shape[2] // 8, video.shape[3] // 8)

    def release(self):
        """Nothing is held."""


def test_they_get_an_encoded_empty_picture():
    encode = N["WanVideoImageToVideoEncode"]().process
    embeds = encode(96, 64, 9, True, 0.0, 1.0, 1.0, vae=FakeVae(), add_cond_latents=Toy(name="mine"))[0]
    toy = next(payload for payload in embeds.payloads if isinstance(payload, Toy))
    assert toy.name == "mine" and torch.equal(toy.empty, torch.ones(1, 16, 1, 8, 12))
    plain = encode(96, 64, 9, True, 0.0, 1.0, 1.0, vae=FakeVae())[0]
    assert len(plain.payloads) == 1
