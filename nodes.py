"""Nodes around the VAE, and the embeds of a video that starts from text alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed.host import ranks_of
from .host import get_host
from .node_checks import Types, verdict
from .node_tools import CATEGORY, TILE_TIP, VIDEO_SIZE, Inputs, Latent, mappings, round_size, whole_frames
from .wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from .wanvideo.images import to_images, to_unit, to_video
from .wanvideo.modules.vae import Tile, WanVAE
from .wanvideo.request import ImageEmbeds, payloads_of

LATENT_CHANNELS = 16
LATENT_FACTOR = 8
# Latents of a ring that are decoded anew, behind so many of its end: the original's.
LOOP_START, LOOP_LEAD = 2, 3
STRIDE_TIP = "Pixels from a tile to the next one {}; less than its {}, so that they overlap"


class WanVideoEmptyEmbeds:
    """Size and length of a video that starts from text alone."""

    DISPLAY_NAME = "WanVideo Empty Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                **VIDEO_SIZE,
            },
            "optional": {
                "control_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Of control models; not available"}),
                "extra_latents": ("LATENT", {"tooltip": "The first latent frames (5B image to video)"}),
            },
        }

    def process(
        self,
        width: int,
        height: int,
        num_frames: int,
        control_embeds: ImageEmbeds | None = None,
        extra_latents: Latent | None = None,
    ) -> tuple[ImageEmbeds]:
        """Sizes for the sampler."""
        width, height = round_size(width, height)
        frames = whole_frames(num_frames)
        shape = (LATENT_CHANNELS, latent_frames(frames), height // LATENT_FACTOR, width // LATENT_FACTOR)
        given = () if extra_latents is None else ((0, extra_latents["samples"][0].float()),)
        payloads = payloads_of(control_embeds)
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, payloads=payloads, given_latents=given),)


class Tiled:
    """A node with the inputs of VAE tiles."""

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        enable_vae_tiling: bool = False,
        tile_x: int = 272,
        tile_y: int = 272,
        tile_stride_x: int = 144,
        tile_stride_y: int = 128,
        input_types: Types | None = None,
    ) -> bool:
        """Tiles must overlap."""
        tiles = {"tile_x": tile_x, "tile_y": tile_y, "tile_stride_x": tile_stride_x, "tile_stride_y": tile_stride_y}
        return verdict(cls, _check_tiles, input_types, enable_vae_tiling=enable_vae_tiling, **tiles)


class WanVideoEncode(Tiled):
    """Encodes pictures as latents."""

    DISPLAY_NAME = "WanVideo Encode"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    # In graphs of later forks of the original.
    RENAMED_INPUTS = {"driving_video": "image"}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tile = {"min": 64, "max": 2048, "step": 1}
        stride = {"min": 32, "max": 2048, "step": 32}
        strength = {"min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "The VAE of the model that samples afterwards"}),
                "image": ("IMAGE", {"tooltip": "Frames; the first 4n+1 are encoded"}),
                "enable_vae_tiling": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "tile_x": ("INT", {"default": 272, **tile, "tooltip": "Width of a tile in pixels"}),
                "tile_y": ("INT", {"default": 272, **tile, "tooltip": "Height of a tile in pixels"}),
                "tile_stride_x": ("INT", {"default": 144, **stride, "tooltip": STRIDE_TIP.format("right", "width")}),
                "tile_stride_y": ("INT", {"default": 128, **stride, "tooltip": STRIDE_TIP.format("down", "height")}),
            },
            "optional": {
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength, "tooltip": "Noise on the pictures"}),
                "latent_strength": ("FLOAT", {"default": 1.0, **strength, "tooltip": "Factor on the latents"}),
                "mask": ("MASK", {"tooltip": "1 where the sampler may paint"}),
            },
        }

    def encode(
        self,
        vae: WanVAE,
        image: Tensor,
        enable_vae_tiling: bool,
        tile_x: int,
        tile_y: int,
        tile_stride_x: int,
        tile_stride_y: int,
        noise_aug_strength: float = 0.0,
        latent_strength: float = 1.0,
        mask: Tensor | None = None,
    ) -> tuple[Latent]:
        """Latents of the first 4n+1 frames."""
        width, height = round_size(image.shape[2], image.shape[1], vae)
        video = to_video(image[: whole_frames(image.shape[0])], width, height)
        if noise_aug_strength > 0:
            noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
            # The strength is that of pictures in 0..1, and these are in -1..1.
            video = video + 2 * noise * noise_aug_strength
        tile = Tile(x=tile_x, y=tile_y, stride_x=tile_stride_x, stride_y=tile_stride_y) if enable_vae_tiling else None
        latents = vae.encode(video, tile=tile) * latent_strength
        vae.managed.release()
        return ({"samples": latents[None], "noise_mask": mask},)


class WanVideoEncodeLatentBatch(Tiled):
    """Encodes every picture on its own, as videos of one frame."""

    DISPLAY_NAME = "WanVideo Encode Latent Batch"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    DESCRIPTION = (
        "Encodes every picture of a batch on its own: start pictures of context windows, for reference_latent of "
        "WanVideo Context Options."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        vae, _, *tiles = WanVideoEncode.INPUT_TYPES()["required"].items()
        images = ("IMAGE", {"tooltip": "Pictures, none of which becomes a frame of another's video"})
        return {"required": dict((vae, ("images", images), *tiles))}

    def encode(
        self,
        vae: WanVAE,
        images: Tensor,
        enable_vae_tiling: bool,
        tile_x: int,
        tile_y: int,
        tile_stride_x: int,
        tile_stride_y: int,
    ) -> tuple[Latent]:
        """LATENT [n, C, 1, h, w]."""
        width, height = round_size(images.shape[2], images.shape[1], vae)
        video = to_video(images, width, height)
        tile = Tile(x=tile_x, y=tile_y, stride_x=tile_stride_x, stride_y=tile_stride_y) if enable_vae_tiling else None
        host = get_host()
        latents = []
        with host.progress(video.shape[1], "VAE encoding") as progress:
            for number, picture in enumerate(video.split(1, dim=1), 1):
                host.check_cancelled()
                latents.append(vae.encode(picture, tile=tile, quiet=True))
                progress.update(number)
        vae.managed.release()
        return ({"samples": torch.stack(latents)},)


def _check_tiles(
    enable_vae_tiling: bool, tile_x: int, tile_y: int, tile_stride_x: int, tile_stride_y: int
) -> None:
    if enable_vae_tiling and (tile_x <= tile_stride_x or tile_y <= tile_stride_y):
        raise ValueError("tile_x and tile_y must be larger than their strides, so that tiles overlap.")


def _closed(vae: WanVAE, latents: Tensor, video: Tensor, tile: Tile | None) -> Tensor:
    """The video [3, 4 F, H, W] of a ring of latents [z, F, h, w], whose end leads to its start without a seam.

    The VAE is causal, so that the first latents, decoded as a start, know nothing of the end and are one frame short of
    a stride: they are decoded again behind the last ones.
    """
    before, start = latents[:, -LOOP_LEAD:], latents[:, :LOOP_START]
    joined = vae.decode(torch.cat((before, start), dim=1), tile=tile, ranks=ranks_of(get_host()))
    skipped = VAE_TIME_STRIDE * (before.shape[1] - 1) + 1
    decoded_anew = VAE_TIME_STRIDE * (start.shape[1] - 1) + 1
    return torch.cat((joined[:, skipped:], video[:, decoded_anew:]), dim=1)


class WanVideoDecode(Tiled):
    """Decodes latents to pictures, frame by frame."""

    DISPLAY_NAME = "WanVideo Decode"
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tile = {"min": 40, "max": 2048, "step": 8}
        stride = {"min": 32, "max": 2040, "step": 8}
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "The VAE of the model that sampled"}),
                "samples": ("LATENT", {"tooltip": "From the sampler"}),
                "enable_vae_tiling": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "tile_x": ("INT", {"default": 272, **tile, "tooltip": "Width of a tile in pixels"}),
                "tile_y": ("INT", {"default": 272, **tile, "tooltip": "Height of a tile in pixels"}),
                "tile_stride_x": ("INT", {"default": 144, **stride, "tooltip": STRIDE_TIP.format("right", "width")}),
                "tile_stride_y": ("INT", {"default": 128, **stride, "tooltip": STRIDE_TIP.format("down", "height")}),
            },
            "optional": {
                "normalization": (
                    ["default", "minmax", "none"],
                    {"advanced": True, "tooltip": "minmax: darkest is black, brightest is white; none: no limits"},
                )
            },
        }

    def decode(
        self,
        vae: WanVAE,
        samples: Latent,
        enable_vae_tiling: bool,
        tile_x: int,
        tile_y: int,
        tile_stride_x: int,
        tile_stride_y: int,
        normalization: str = "default",
    ) -> tuple[Tensor]:
        """IMAGE of all frames, a ring closed; a video that the talking loop decoded already passes through."""
        if samples.get("video") is not None:
            return (to_unit(samples["video"]),)
        latents = vae.latents_of(samples)
        last = latents.shape[1] - int(samples.get("trailing_latents") or 0)
        latents = latents[:, int(samples.get("has_ref") or 0) : last]
        if samples.get("extra_end_frame"):
            latents = latents[:, :-1]
        tile = Tile(x=tile_x, y=tile_y, stride_x=tile_stride_x, stride_y=tile_stride_y) if enable_vae_tiling else None
        try:
            video = vae.decode(latents, tile=tile, ranks=ranks_of(get_host()))
            if samples.get("looped"):
                video = _closed(vae, latents, video, tile)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                "The GPU has too little memory to decode frames of this size: turn on enable_vae_tiling; the samples "
                "are kept, only this node runs again."
            ) from error
        finally:
            vae.managed.release()
        if normalization == "minmax":
            low, high = video.aminmax()
            # A video of one colour has no range to stretch; it stays as it is.
            video = (video - low) / (high - low) * 2 - 1 if high > low else video
        if normalization == "none":
            return (video.movedim(0, -1).contiguous(),)
        return (to_images(video),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoEmptyEmbeds, WanVideoEncode, WanVideoEncodeLatentBatch, WanVideoDecode
)
