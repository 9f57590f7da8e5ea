"""Conditioning nodes: pictures and latents in, embeds for the sampler out; latents back to pictures."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .enhance_a_video import EnhanceArgs
from .node_tools import CATEGORY, mappings, reject, round_size
from .wanvideo.i2v import GivenFrames, encode_given
from .wanvideo.images import resize_images, to_images, to_video
from .wanvideo.modules.vae import Tile, WanVAE
from .wanvideo.payloads import ClipEmbeds, ImageEmbeds, latent_frames, round_frames

log = logging.getLogger("wanvideo")

Inputs = dict[str, dict[str, tuple[object, ...]]]
Latent = dict[str, object]
LATENT_CHANNELS = 16
LATENT_FACTOR = 8
TILE_TIP = "Less memory; seams fade where tiles overlap"
STRIDE_TIP = "Pixels from a tile to the next one {}; less than its {}, so that they overlap"
OFFLOAD_TIP = "Free the GPU afterwards"
SIDE_TIP = "In pixels; rounded down to a multiple of 16"
FRAMES_TIP = "4n+1 frames; 81 are what most models were trained on"


class WanVideoClipVisionEncode:
    """CLIP features of one or two pictures, for image-to-video models."""

    DISPLAY_NAME = "WanVideo ClipVision Encode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_CLIPEMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                "clip_vision": ("CLIP_VISION", {"tooltip": "The CLIP ViT-H encoder that the model was trained with"}),
                "image_1": ("IMAGE", {"tooltip": "The start picture; a batch gives one row of features each"}),
                "strength_1": ("FLOAT", {**strength, "tooltip": "Weight of image_1's features"}),
                "strength_2": ("FLOAT", {**strength, "tooltip": "Weight of image_2's features"}),
                "crop": (["center", "disabled"], {"default": "center", "tooltip": "Cut the middle out, or squeeze"}),
                "combine_embeds": (
                    ["average", "sum", "concat", "batch"],
                    {"default": "average", "tooltip": "How the features of two pictures become one"},
                ),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
            },
            "optional": {
                "image_2": ("IMAGE", {"tooltip": "A second picture, such as the end of the video"}),
                "negative_image": ("IMAGE", {"tooltip": "For the pass without the prompt"}),
                "tiles": ("INT", {"default": 0, "min": 0, "max": 16, "step": 2, "tooltip": "Not available: 0"}),
                "ratio": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Of the tiles, so without effect",
                    },
                ),
            },
        }

    def process(
        self,
        clip_vision: object,
        image_1: Tensor,
        strength_1: float,
        strength_2: float,
        crop: str,
        combine_embeds: str,
        force_offload: bool,
        image_2: Tensor | None = None,
        negative_image: Tensor | None = None,
        tiles: int = 0,
        ratio: float = 0.5,
    ) -> tuple[ClipEmbeds]:
        """Features of all pictures, weighted and combined."""
        reject("WanVideo ClipVision Encode", {"tiles": tiles or None})
        images = [image_1] if image_2 is None else [image_1, image_2]
        rows = [row for image in images for row in _clip_features(clip_vision, image, crop)]
        weights = [strength_1, strength_2, *(1.0 for _ in rows[2:])]
        weighted = [row[None] * weight for row, weight in zip(rows, weights, strict=False)]
        combine = {
            "average": lambda parts: torch.stack(parts).mean(dim=0),
            "sum": lambda parts: torch.stack(parts).sum(dim=0),
            "concat": lambda parts: torch.cat(parts, dim=1),
            "batch": lambda parts: torch.cat(parts, dim=0),
        }[combine_embeds]
        negative = None if negative_image is None else _clip_features(clip_vision, negative_image, crop)[:1]
        if force_offload and hasattr(clip_vision, "managed"):
            clip_vision.managed.release()
        return (ClipEmbeds(positive=combine(weighted), negative=negative),)


def _clip_features(clip_vision: object, image: Tensor, crop: str) -> Tensor:
    encoded = clip_vision.encode_image(image[..., :3], crop=crop == "center")
    return encoded.penultimate_hidden_states.float().cpu()


class WanVideoImageToVideoEncode:
    """Encodes start and end pictures as the condition of an image-to-video model."""

    DISPLAY_NAME = "WanVideo ImageToVideo Encode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 64, "max": 8096, "step": 8}
        strength = {"min": 0.0, "max": 10.0, "step": 0.001}
        return {
            "required": {
                "width": ("INT", {"default": 832, **size, "tooltip": SIDE_TIP}),
                "height": ("INT", {"default": 480, **size, "tooltip": SIDE_TIP}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": FRAMES_TIP}),
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength, "tooltip": "Noise on the pictures"}),
                "start_latent_strength": ("FLOAT", {"default": 1.0, **strength, "tooltip": "Below 1: more motion"}),
                "end_latent_strength": (
                    "FLOAT",
                    {"default": 1.0, **strength, "tooltip": "The same for the end picture"},
                ),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
            },
            "optional": {
                "vae": ("WANVAE", {"tooltip": "The VAE of the model; encodes the pictures"}),
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS", {"tooltip": "For Wan 2.1 models; 2.2 models use none"}),
                "start_image": ("IMAGE", {"tooltip": "The first frame, or the first frames"}),
                "end_image": ("IMAGE", {"tooltip": "The last frame, or the last frames"}),
                "control_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "Of control models; not available"}),
                "fun_or_fl2v_model": ("BOOLEAN", {"default": True, "tooltip": "The end picture is the last frame"}),
                "temporal_mask": ("MASK", {"tooltip": "1 where a frame is given"}),
                "extra_latents": ("LATENT", {"tooltip": "Reference latents in front"}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "add_cond_latents": ("ADD_COND_LATENTS", {"advanced": True, "tooltip": "Not available"}),
                "augment_empty_frames": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 10.0, "step": 0.01, "tooltip": "More motion, experimental"},
                ),
                "empty_frame_pad_image": ("IMAGE", {"tooltip": "Instead of grey in frames that are not given"}),
            },
        }

    def process(
        self,
        width: int,
        height: int,
        num_frames: int,
        noise_aug_strength: float,
        start_latent_strength: float,
        end_latent_strength: float,
        force_offload: bool,
        vae: WanVAE | None = None,
        clip_embeds: ClipEmbeds | None = None,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        control_embeds: object = None,
        fun_or_fl2v_model: bool = True,
        temporal_mask: Tensor | None = None,
        extra_latents: Latent | None = None,
        tiled_vae: bool = False,
        add_cond_latents: object = None,
        augment_empty_frames: float = 0.0,
        empty_frame_pad_image: Tensor | None = None,
    ) -> tuple[ImageEmbeds]:
        """Condition latents, mask and CLIP features."""
        reject("WanVideo ImageToVideo Encode", {"control_embeds": control_embeds, "add_cond_latents": add_cond_latents})
        if vae is None:
            raise ValueError("Pictures are encoded by the VAE: connect WanVideoVAELoader to 'vae'.")
        width, height = round_size(width, height)
        given = GivenFrames(
            width=width,
            height=height,
            num_frames=_whole_frames(num_frames),
            start=start_image,
            end=end_image,
            pad=empty_frame_pad_image,
            mask=temporal_mask,
            end_in_video=fun_or_fl2v_model or start_image is None,
            noise=noise_aug_strength,
            start_strength=start_latent_strength,
            end_strength=end_latent_strength,
            spread=augment_empty_frames,
        )
        cond, mask = encode_given(given, vae, tile=Tile() if tiled_vae else None)
        leading = 0
        if extra_latents is not None:
            reference = extra_latents["samples"][0].float()
            leading = reference.shape[1]
            cond = torch.cat((reference, cond), dim=1)
            mask = torch.cat((torch.ones_like(mask[:, :1]).expand(-1, leading, -1, -1), mask), dim=1)
        if force_offload:
            vae.managed.release()
        embeds = ImageEmbeds(
            latent_shape=tuple(cond.shape),
            num_frames=given.num_frames,
            cond=cond,
            mask=mask,
            clip=clip_embeds,
            extra_end_frame=given.extra_end,
            leading_latents=leading,
        )
        return (embeds,)


def _whole_frames(num_frames: int) -> int:
    rounded = round_frames(num_frames)
    if rounded != num_frames:
        log.info("%d frames are rounded to %d: the VAE works in 4n+1 frames.", num_frames, rounded)
    return rounded


class WanVideoEmptyEmbeds:
    """Size and length of a video that starts from text alone."""

    DISPLAY_NAME = "WanVideo Empty Embeds"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 64, "max": 8096, "step": 8}
        return {
            "required": {
                "width": ("INT", {"default": 832, **size, "tooltip": SIDE_TIP}),
                "height": ("INT", {"default": 480, **size, "tooltip": SIDE_TIP}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": FRAMES_TIP}),
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
        control_embeds: object = None,
        extra_latents: Latent | None = None,
    ) -> tuple[ImageEmbeds]:
        """Sizes for the sampler."""
        reject("WanVideo Empty Embeds", {"control_embeds": control_embeds})
        width, height = round_size(width, height)
        frames = _whole_frames(num_frames)
        shape = (LATENT_CHANNELS, latent_frames(frames), height // LATENT_FACTOR, width // LATENT_FACTOR)
        given = () if extra_latents is None else ((0, extra_latents["samples"][0].float()),)
        return (ImageEmbeds(latent_shape=shape, num_frames=frames, given_latents=given),)


class WanVideoEncode:
    """Encodes pictures as latents."""

    DISPLAY_NAME = "WanVideo Encode"
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)

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
        width, height = round_size(image.shape[2], image.shape[1])
        video = to_video(resize_images(image, width, height))[:, : _whole_frames(image.shape[0])]
        if noise_aug_strength > 0:
            noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
            video = video + noise * noise_aug_strength
        tile = Tile(x=tile_x, y=tile_y, stride_x=tile_stride_x, stride_y=tile_stride_y) if enable_vae_tiling else None
        latents = vae.encode(video, tile=tile) * latent_strength
        vae.managed.release()
        return ({"samples": latents[None], "noise_mask": mask},)


class WanVideoDecode:
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

    @classmethod
    def VALIDATE_INPUTS(cls, tile_x: int, tile_y: int, tile_stride_x: int, tile_stride_y: int) -> bool | str:
        """Tiles must overlap."""
        if tile_x <= tile_stride_x or tile_y <= tile_stride_y:
            return "tile_x and tile_y must be larger than their strides, so that tiles overlap."
        return True

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
        """IMAGE of all frames; a video that the talking loop decoded already passes through."""
        if samples.get("video") is not None:
            return (samples["video"].float().clamp(-1, 1).add(1).div(2),)
        latents = samples["samples"][0].float()
        latents = latents[:, int(samples.get("has_ref") or 0) :]
        if samples.get("extra_end_frame"):
            latents = latents[:, :-1]
        tile = Tile(x=tile_x, y=tile_y, stride_x=tile_stride_x, stride_y=tile_stride_y) if enable_vae_tiling else None
        try:
            video = vae.decode(latents, tile=tile)
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


class WanVideoEnhanceAVideo:
    """Amplifies self-attention where frames agree, for more detail and consistency."""

    DISPLAY_NAME = "WanVideo Enhance-A-Video"
    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("FETAARGS",)
    RETURN_NAMES = ("feta_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "weight": ("FLOAT", {"default": 2.0, "min": 0, "max": 100, "step": 0.01, "tooltip": "0 has no effect"}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Share of the steps before it starts"},
                ),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "Share of the steps when it ends"}),
            }
        }

    def setargs(self, weight: float, start_percent: float, end_percent: float) -> tuple[EnhanceArgs]:
        """Collect the settings."""
        return (EnhanceArgs(weight, start_percent, end_percent),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoClipVisionEncode,
    WanVideoImageToVideoEncode,
    WanVideoEmptyEmbeds,
    WanVideoEncode,
    WanVideoDecode,
    WanVideoEnhanceAVideo,
)
