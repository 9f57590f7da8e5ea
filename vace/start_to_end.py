"""Frames and masks for VACE from pictures that stand at given places of a video; the rest is left to be made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..wanvideo.images import resize_images
from .encoding import resize_masks


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Pictures for a video of num_frames. start, end, control: IMAGE tensors or None; level: of empty frames, 0..1.

    start_index: place of the first start picture; end_index: place of the last end picture, negative from the end.
    control: fills frames that neither takes, which are made anew all the same. inpaint [n, H, W]: which parts of those
    frames are; repeated where it is too short.
    """

    num_frames: int
    level: float
    start: Tensor | None = None
    end: Tensor | None = None
    control: Tensor | None = None
    inpaint: Tensor | None = None
    start_index: int = 0
    end_index: int = -1

    def frames_and_masks(self) -> tuple[Tensor, Tensor]:
        """Frames [num_frames, H, W, 3] and masks [num_frames, H, W]: 1 where VACE paints.

        Raises ValueError without any picture.
        """
        if self.start is None and self.end is None:
            return self._control_alone()
        height, width = (self.end if self.start is None else self.start).shape[1:3]
        frames = torch.full((self.num_frames, height, width, 3), self.level)
        masks = torch.ones(self.num_frames, height, width)
        for images, first in self._places():
            part = images[max(-first, 0) : max(self.num_frames - first, 0)]
            where = slice(max(first, 0), max(first, 0) + len(part))
            if len(part):
                frames[where], masks[where] = _sized(part, width, height), 0
        if self.control is not None:
            count = min(len(self.control), self.num_frames)
            free = (masks.mean(dim=(1, 2)) > 0.5).nonzero().flatten()
            free = free[free < count]
            if len(free):
                frames[free] = _sized(self.control[free], width, height)
        return frames, masks if self.inpaint is None else masks * self._inpainted(width, height)

    def _inpainted(self, width: int, height: int) -> Tensor:
        """The inpaint masks, one a frame."""
        index = torch.arange(self.num_frames) % len(self.inpaint)
        return resize_masks(self.inpaint, width, height)[index]

    def _places(self) -> list[tuple[Tensor, int]]:
        """Start and end pictures with the frame that their first one stands at."""
        last = self.end_index if self.end_index >= 0 else self.num_frames + self.end_index
        start = [] if self.start is None else [(self.start, self.start_index)]
        return [*start, *([] if self.end is None else [(self.end, last - len(self.end) + 1)])]

    def _control_alone(self) -> tuple[Tensor, Tensor]:
        """The control frames as they are, empty ones behind them; none of it is masked but by the inpaint masks."""
        if self.control is None:
            raise ValueError("There are no pictures: connect start_image, end_image or control_images.")
        frames = torch.full((self.num_frames, *self.control.shape[1:]), self.level)
        count = min(len(self.control), self.num_frames)
        frames[:count] = self.control[:count]
        height, width = frames.shape[1:3]
        return frames, torch.zeros(frames.shape[:3]) if self.inpaint is None else self._inpainted(width, height)


def _sized(images: Tensor, width: int, height: int) -> Tensor:
    return resize_images(images[..., :3].float().cpu(), width, height)
