"""What VACE contexts are made of: videos split by their masks, masks folded to latents, references on white.

Source: ali-vilab/VACE (WanVace.vace_encode_frames, vace_encode_masks, prepare_source).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.frames import latent_frames, round_frames
from ..wanvideo.images import centered, resize_images, to_video
from ..wanvideo.modules.vae import Tile, WanVAE

LATENT_FACTOR = 8


def encode_context(
    vae: WanVAE, video: Tensor, mask: Tensor, reference: Tensor | None, *, tile: Tile | None = None
) -> Tensor:
    """Context [96, F, h, w] of a video [3, frames, H, W] in -1..1.

    mask [frames, H, W]: 1 where the video is made anew. reference [3, 1, H, W]: a frame in front that is kept whole.
    """
    whole = round_frames(video.shape[1])
    split = (video[:, :whole] * (1 - mask[:whole]), video[:, :whole] * mask[:whole])
    context = torch.cat((*(vae.encode(part, tile=tile) for part in split), fold_mask(mask)))
    if reference is None:
        return context
    kept = vae.encode(reference, tile=tile)
    return torch.cat((F.pad(kept, (0, 0, 0, 0, 0, 0, 0, context.shape[0] - kept.shape[0])), context), dim=1)


def fold_mask(mask: Tensor) -> Tensor:
    """Mask [frames, H, W] -> [64, F, H/8, W/8]: the pixels behind one latent become channels, frames are picked."""
    cells = F.pixel_unshuffle(mask[:, None], LATENT_FACTOR).transpose(0, 1)
    size = (latent_frames(mask.shape[0]), *cells.shape[2:])
    return F.interpolate(cells[None], size=size, mode="nearest-exact")[0]


def reference_frame(images: Tensor, width: int, height: int) -> Tensor:
    """Pictures [n, H, W, 3 or more], side by side on white in the video's proportions: [3, 1, height, width]."""
    picture = torch.cat(tuple(images[..., :3]), dim=1)
    rows, columns = picture.shape[:2]
    target = width / height
    canvas = torch.ones(max(int(columns / target), rows), max(int(rows * target), columns), 3)
    top, left = (canvas.shape[0] - rows) // 2, (canvas.shape[1] - columns) // 2
    canvas[top : top + rows, left : left + columns] = picture
    return to_video(resize_images(centered(canvas[None], width, height), width, height))


def resize_masks(masks: Tensor, width: int, height: int) -> Tensor:
    """Masks [n, H, W] at another size, each pixel from its nearest."""
    return F.interpolate(masks[:, None].float(), size=(height, width), mode="nearest-exact")[:, 0]
