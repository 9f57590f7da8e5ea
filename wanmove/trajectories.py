"""Wan-Move: what the first condition frame shows where a track starts is copied to later frames where the track is.

Source: ali-vilab/Wan-Move (wan/modules/trajectory.py); Wan-Move (Chu et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..image_to_video.extension import ImageCondition
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.frames import VAE_TIME_STRIDE

VAE_SIDE_STRIDE = 8
NOWHERE = -1


def latent_positions(tracks: Tensor, visible: Tensor, size: tuple[int, int]) -> Tensor:
    """Row and column of every track in every latent frame, [N, F, 2] long; -1 where it is not seen.

    tracks [frames, N, 2]: x, y in pixels; visible [frames, N]; size: (width, height) in pixels.
    """
    tracks, visible = tracks[::VAE_TIME_STRIDE], visible[::VAE_TIME_STRIDE].bool()
    inside = visible & (tracks >= 0).all(-1) & (tracks < tracks.new_tensor(size)).all(-1)
    cells = torch.div(tracks, VAE_SIDE_STRIDE, rounding_mode="floor").long().flip(-1)
    return torch.where(inside[..., None], cells, NOWHERE).transpose(0, 1)


def moved(cond: Tensor, positions: Tensor, strength: float = 1.0) -> Tensor:
    """The condition [B, C, F, H, W] with the features of every track's start where the track is later.

    positions [B, N, frames, 2] as in `latent_positions`. strength: 0 leaves the frames as they are, 1 replaces them.
    Where tracks meet, the last one counts. As the authors have it, a track that is not seen at first brings what the
    last cell of the frame shows.
    """
    result = cond.clone()
    for row, (frame, track) in enumerate(zip(cond, positions, strict=True)):
        height, width = frame.shape[2:]
        number, time = (track[:, 1:] >= 0).all(-1).nonzero(as_tuple=True)
        target = (time + 1) * height * width + track[number, time + 1, 0] * width + track[number, time + 1, 1]
        # On a GPU it is not defined which of several writes to one place comes last.
        last = target.new_full((frame[0].numel(),), -1).scatter_reduce(0, target, number, "amax")
        places = (last >= 0).nonzero()[:, 0]
        start = track[last[places], 0]
        source, flat = frame[:, 0, start[:, 0], start[:, 1]], frame.flatten(1)
        result[row].view(flat.shape)[:, places] = torch.lerp(flat[:, places], source, strength)
    return result


@dataclass(frozen=True, kw_only=True)
class MovedPart(ImageCondition):
    """The condition of one window with moved features; still [1, 4 + C, F, H, W]: mask and pictures without them."""

    still: Tensor

    def without(self, names: frozenset[str]) -> ImageCondition:
        """Passes without the prompt see the picture without motion."""
        if "text" not in names:
            return self
        mask = self.mask.shape[1]
        return ImageCondition(self.still[:, mask:], self.still[:, :mask])


@dataclass(frozen=True, kw_only=True)
class MovedPicture(ImageCondition):
    """The condition of a picture whose features move: positions [1, N, F, 2], as in `latent_positions`, and strength.

    The mask moves with the picture.
    """

    positions: Tensor
    strength: float = 1.0

    def window(self, window: Window) -> MovedPart:
        """The window's condition; tracks bring what its first frame shows where they are then."""
        plain = super().window(window)
        still = torch.cat((plain.mask, plain.cond), dim=1)
        seen = [place for place in window.latents if place < self.positions.shape[2]]
        condition = moved(still, self.positions[:, :, seen], self.strength) if seen else still
        mask = plain.mask.shape[1]
        return MovedPart(cond=condition[:, mask:], mask=condition[:, :mask], still=still)

    @classmethod
    def of(cls, payloads: tuple[Payload, ...], positions: Tensor, strength: float) -> tuple[Payload, ...]:
        """The payloads with the tracks in their picture. Raises ValueError without a plain one."""
        picture = next((p for p in payloads if isinstance(p, ImageCondition)), None)
        if type(picture) is not ImageCondition:
            what = "there is none" if picture is None else f"they hold a {type(picture).__name__} already"
            raise ValueError(
                f"Wan-Move moves what a start picture shows, but {what}: connect the image embeds of "
                "WanVideoImageToVideoEncode, and one node of tracks only."
            )
        picture_with = cls(cond=picture.cond, mask=picture.mask, positions=positions[None], strength=strength)
        return tuple(picture_with if payload is picture else payload for payload in payloads)
