"""Pictures, poses and masks of a character's video as the model reads them, for all of it or a part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.modules.vae import Tile, WanVAE
from .extension import Character


def there_and_back(video: Tensor, frames: int) -> Tensor:
    """So many frames [C, frames, H, W]: a video that ends early runs back and forth."""
    last = video.shape[1] - 1
    places = torch.arange(frames) % max(2 * last, 1)
    return video[:, torch.minimum(places, 2 * last - places).clamp(min=0)]


def mask_channels(given: Tensor) -> Tensor:
    """Frames [1, 4n + 1, h, w], 1 where given, as the four channels [4, n + 1, h, w] of latent frames."""
    whole = torch.cat((given[:, :1].expand(-1, VAE_TIME_STRIDE, -1, -1), given[:, 1:]), dim=1)
    return whole.unflatten(1, (-1, VAE_TIME_STRIDE))[0].transpose(0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What drives the video. Videos are [3, n, H, W] in -1..1 at its size, or None.

    reference [3, 1, H, W]. faces [3, n, 512, 512]. kept [1, n, h, w]: 1 where the background stays, at the size of the
    latents. tile: for the VAE.
    """

    vae: WanVAE
    reference: Tensor
    poses: Tensor | None
    faces: Tensor | None
    background: Tensor | None
    kept: Tensor | None
    pose_strength: float
    face_strength: float
    tile: Tile | None = None

    def lasting(self, frames: int) -> Footage:
        """The same with every video that long."""
        names = ("poses", "faces", "background", "kept")
        videos = {name: getattr(self, name) for name in names}
        longer = {name: None if v is None else there_and_back(v, frames) for name, v in videos.items()}
        return Footage(**{**self.__dict__, **longer})

    def part(self, frames: range, before: Tensor | None = None) -> Character:
        """What the model reads for these frames. before [3, 1, H, W]: the first of them, where it is made already."""
        count, places = len(frames), slice(frames.start, frames.stop)
        _, _, height, width = self.reference.shape
        background = torch.zeros(3, 1, height, width).expand(-1, count, -1, -1)
        if self.background is not None:
            background = self.background[:, places]
        sides = (height // self.vae.spatial_factor, width // self.vae.spatial_factor)
        kept = torch.zeros(1, count, *sides) if self.kept is None else self.kept[:, places].clone()
        if before is not None:
            background = torch.cat((before, background[:, 1:]), dim=1)
            kept[:, :1] = 1
        reference = torch.cat((torch.ones(VAE_TIME_STRIDE, 1, *sides), self._encoded(self.reference)))
        rest = torch.cat((mask_channels(kept), self._encoded(background)))
        return Character(
            cond=torch.cat((reference, rest), dim=1)[None],
            pose=None if self.poses is None else self._encoded(self.poses[:, places])[None],
            faces=None if self.faces is None else self.faces[None, :, places],
            pose_strength=torch.tensor(float(self.pose_strength)),
            face_strength=torch.tensor(float(self.face_strength)),
        )

    def shape(self, frames: int) -> tuple[int, int, int, int]:
        """Of the latents of so many frames and the reference."""
        factor = self.vae.spatial_factor
        _, _, height, width = self.reference.shape
        return self.vae.latent_channels, latent_frames(frames) + 1, height // factor, width // factor

    def _encoded(self, video: Tensor) -> Tensor:
        return self.vae.encode(video, tile=self.tile, quiet=True)


def kept_background(mask: Tensor, height: int, width: int) -> Tensor:
    """MASK [n, H, W], 1 where the character is, as frames [1, n, height, width] that are 1 where the background is."""
    return F.interpolate(1 - mask.float()[:, None], size=(height, width), mode="nearest").transpose(0, 1)
