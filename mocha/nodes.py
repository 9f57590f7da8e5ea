"""The node of MoCha."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..node_tools import CATEGORY, OFFLOAD_TIP, TILE_TIP, Inputs, mappings, round_size, whole_frames
from ..wanvideo.images import to_video
from ..wanvideo.modules.vae import Tile, WanVAE
from ..wanvideo.request import ImageEmbeds
from .extension import SubjectReplacement

MARKED = 0.5


class MochaEmbeds:
    """A video in which one subject takes the place of another."""

    DISPLAY_NAME = "Mocha Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)
    DESCRIPTION = (
        "MoCha: who is marked in the first frame of a video is replaced by who is in a picture. For the MoCha model."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        video = "The video; it gives size and length of the result (the first 4n+1 frames)"
        first = "Who takes the place, before a plain background; as large as the video"
        second = "Another picture, such as the face, as large as the video"
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "The VAE of the model (Wan 2.1)"}),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
                "input_video": ("IMAGE", {"tooltip": video}),
                "mask": ("MASK", {"tooltip": "Who is replaced, in the first frame alone: one mask"}),
                "ref1": ("IMAGE", {"tooltip": first}),
            },
            "optional": {
                "ref2": ("IMAGE", {"tooltip": second}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
            },
        }

    def process(
        self,
        vae: WanVAE,
        force_offload: bool,
        input_video: Tensor,
        mask: Tensor,
        ref1: Tensor,
        ref2: Tensor | None = None,
        tiled_vae: bool = False,
    ) -> tuple[ImageEmbeds]:
        """Embeds of video, mask and pictures. Raises ValueError for several masks, or pictures of another size."""
        if mask.dim() == 3 and len(mask) != 1:
            raise ValueError(
                f"MoCha needs one mask, of the first frame, but got {len(mask)}: pass on the first one alone."
            )
        given = {name: picture for name, picture in (("ref1", ref1), ("ref2", ref2)) if picture is not None}
        for name, picture in given.items():
            if len(picture) != 1 or picture.shape[1:3] != input_video.shape[1:3]:
                raise ValueError(
                    f"{name} is {_size(picture)} but input_video {_size(input_video)}: give one picture, resized to "
                    "the width and height of the video."
                )
        width, height = round_size(input_video.shape[2], input_video.shape[1], vae)
        frames = whole_frames(len(input_video))
        tile = Tile() if tiled_vae else None
        videos = (input_video[:frames], *given.values())
        source, *pictures = [vae.encode(to_video(images, width, height), tile=tile) for images in videos]
        if force_offload:
            vae.managed.release()
        shown = F.interpolate(mask.float().reshape(1, 1, *mask.shape[-2:]), size=source.shape[2:], mode="nearest")
        marks = torch.where(shown > MARKED, 1.0, -1.0)[:, :, None].expand(-1, source.shape[0], -1, -1, -1)
        subject = SubjectReplacement(source[None], marks.contiguous(), torch.cat(pictures, dim=1)[None])
        return (ImageEmbeds(latent_shape=tuple(source.shape), num_frames=frames, payloads=(subject,)),)


def _size(images: Tensor) -> str:
    return f"{len(images)} of {images.shape[2]}x{images.shape[1]}"


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(MochaEmbeds)
