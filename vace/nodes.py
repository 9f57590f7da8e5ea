"""Nodes of VACE: its module, its contexts, and frames with masks for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..node_tools import CATEGORY, Inputs, files, find_model, mappings, round_size, whole_frames
from ..wanvideo.frames import latent_frames
from ..wanvideo.guidance import per_step
from ..wanvideo.images import to_video
from ..wanvideo.load_plan import ModuleFile
from ..wanvideo.modules.vae import Tile, WanVAE
from ..wanvideo.request import ImageEmbeds, payloads_of
from .encoding import encode_context, reference_frame, resize_masks
from .extension import LATENT_CHANNELS, Vace, VaceContext, VaceExtension
from .start_to_end import Placed

log = logging.getLogger("wanvideo")

NUM_FRAMES = {"default": 81, "min": 1, "max": 10000, "step": 4}


class WanVideoVACEEncode:
    """Encodes a video, its masks and references as a VACE context."""

    DISPLAY_NAME = "WanVideo VACE Encode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("vace_embeds",)
    DESCRIPTION = (
        "Encodes a control video, masks and reference pictures for a VACE model (https://github.com/ali-vilab/VACE). "
        "Several of these nodes in a chain add up, each with a strength and a range of its own."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 64, "max": 8096, "step": 8}
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        side = "Of the video to make; rounded down to a multiple of 16"
        return {
            "required": {
                "vae": ("WANVAE", {"tooltip": "A Wan 2.1 VAE, which VACE models were trained with"}),
                "width": ("INT", {"default": 832, **size, "tooltip": side}),
                "height": ("INT", {"default": 480, **size, "tooltip": side}),
                "num_frames": ("INT", {**NUM_FRAMES, "tooltip": "Frames of the video to make: 4n+1"}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001, "tooltip": "One number, or one a step"},
                ),
                "vace_start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": "From this part of the steps"}),
                "vace_end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "To this part of the steps"}),
            },
            "optional": {
                "input_frames": ("IMAGE", {"tooltip": "Control video, or the video to change; empty: all is new"}),
                "ref_images": ("IMAGE", {"tooltip": "What the video shall show; several are put side by side"}),
                "input_masks": ("MASK", {"tooltip": "1 where it is made anew; empty: everywhere"}),
                "prev_vace_embeds": ("WANVIDIMAGE_EMBEDS", {"tooltip": "VACE embeds that act as well"}),
                "tiled_vae": ("BOOLEAN", {"default": False, "tooltip": "Less memory for the VAE"}),
            },
        }

    def process(
        self,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        strength: float | Sequence[float],
        vace_start_percent: float,
        vace_end_percent: float,
        input_frames: Tensor | None = None,
        ref_images: Tensor | None = None,
        input_masks: Tensor | None = None,
        prev_vace_embeds: ImageEmbeds | None = None,
        tiled_vae: bool = False,
    ) -> tuple[ImageEmbeds]:
        """Embeds with this context and those before it."""
        if vae.latent_channels != LATENT_CHANNELS:
            raise ValueError("VACE models were trained with the Wan 2.1 VAE: load that one in WanVideoVAELoader.")
        width, height = round_size(width, height, vae)
        size = (LATENT_CHANNELS, latent_frames(num_frames), height // vae.spatial_factor, width // vae.spatial_factor)
        earlier = () if prev_vace_embeds is None else _contexts(prev_vace_embeds, size)
        video, mask = _video_and_mask(input_frames, input_masks, (num_frames, height, width))
        reference = None if ref_images is None else reference_frame(ref_images.float().cpu(), width, height)
        latents = encode_context(vae, video, mask, reference, tile=Tile() if tiled_vae else None)
        vae.managed.release()
        context = VaceContext(
            latents=latents[None],
            strengths=per_step(strength),
            start=vace_start_percent,
            end=vace_end_percent,
            references=0 if reference is None else 1,
        )
        contexts = (context, *earlier)
        leading = max(each.references for each in contexts)
        embeds = ImageEmbeds(
            latent_shape=(size[0], size[1] + leading, *size[2:]),
            num_frames=whole_frames(num_frames),
            payloads=(Vace(contexts),),
            leading_latents=leading,
        )
        return (embeds,)


def _video_and_mask(images: Tensor | None, masks: Tensor | None, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Video [3, frames, H, W] in -1..1 and mask [frames, H, W]; grey, and made anew, where nothing is given."""
    frames, height, width = size
    video = torch.zeros(3, frames, height, width)
    if images is not None:
        video = to_video(images[:frames].float().cpu(), width, height)
    mask = _mask(masks, video.shape[1:])
    missing = frames - video.shape[1] if latent_frames(video.shape[1]) < latent_frames(frames) else 0
    if missing:
        log.warning(
            "input_frames has %d frames, and the video %d: what comes behind them is made anew. Set num_frames to %d "
            "to end with them.",
            video.shape[1], frames, video.shape[1],
        )  # fmt: skip
    return functional.pad(video, (0, 0, 0, 0, 0, missing)), functional.pad(mask, (0, 0, 0, 0, 0, missing), value=1.0)


def _mask(masks: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Masks [n, H, W] of a video of this shape (frames, H, W); one stands for all frames."""
    frames, height, width = shape
    if masks is None:
        return torch.ones(*shape)
    mask = resize_masks(masks[:frames].cpu(), width, height)
    if len(mask) not in (1, frames):
        raise ValueError(
            f"input_masks has {len(mask)} masks for {frames} frames: give one for each frame, or one for all "
            "(WanVideoVACEStartToEndFrame repeats them)."
        )
    return mask.expand(*shape)


def _contexts(embeds: ImageEmbeds, size: tuple[int, int, int, int]) -> tuple[VaceContext, ...]:
    """The contexts of earlier embeds. Raises ValueError if there are none, or they are of another size."""
    contexts = next((payload.contexts for payload in payloads_of(embeds) if isinstance(payload, Vace)), None)
    if contexts is None:
        raise ValueError("prev_vace_embeds are no VACE embeds: connect another WanVideoVACEEncode, or nothing.")
    channels, frames, *sides = embeds.latent_shape
    before = (channels, frames - embeds.leading_latents, *sides)
    if before != size:
        raise ValueError(
            f"prev_vace_embeds are of {before[1:]} latents (frames, height, width) but these are of {size[1:]}: give "
            "both the same width, height and num_frames."
        )
    return contexts


class WanVideoVACEModelSelect:
    """Chooses a VACE module; the model loader reads it."""

    DISPLAY_NAME = "WanVideo VACE Module Select"
    CATEGORY = CATEGORY
    FUNCTION = "getvacepath"
    RETURN_TYPES = ("VACEPATH",)
    RETURN_NAMES = ("extra_model",)
    DESCRIPTION = "A VACE module for a text-to-video model that has none merged in. Connect it to 'extra_model'."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = {"tooltip": "A VACE module in models/diffusion_models, of the size of the model (14B or 1.3B)"}
        return {"required": {"vace_model": (files("unet_gguf", "diffusion_models"), tip)}}

    def getvacepath(self, vace_model: str) -> tuple[ModuleFile]:
        """Find it."""
        return (ModuleFile(find_model(vace_model), VaceExtension.file),)


class WanVideoExtraModelSelect:
    """Chooses a file of further weights; the model loader reads it."""

    DISPLAY_NAME = "WanVideo Extra Model Select"
    CATEGORY = CATEGORY
    FUNCTION = "getmodelpath"
    RETURN_TYPES = ("VACEPATH",)
    RETURN_NAMES = ("extra_model",)
    DESCRIPTION = "A module whose weights are added to the model (VACE and others). Several can be chained."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        module = (files("unet_gguf", "diffusion_models"), {"tooltip": "A module in models/diffusion_models"})
        earlier = ("VACEPATH", {"default": None, "tooltip": "Modules that are loaded as well"})
        return {"required": {"extra_model": module}, "optional": {"prev_model": earlier}}

    def getmodelpath(
        self, extra_model: str, prev_model: ModuleFile | tuple[ModuleFile, ...] | None = None
    ) -> tuple[tuple[ModuleFile, ...]]:
        """Those before it, and this one."""
        earlier = (prev_model,) if isinstance(prev_model, ModuleFile) else prev_model or ()
        return ((*earlier, ModuleFile(find_model(extra_model))),)


class WanVideoVACEStartToEndFrame:
    """Puts pictures at their places in a video, with masks that leave the rest to VACE."""

    DISPLAY_NAME = "WanVideo VACE Start To End Frame"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("images", "masks")
    DESCRIPTION = "Frames and masks for WanVideo VACE Encode from first, last and control pictures."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        level = {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Brightness of empty frames"}
        start = {"default": 0, "min": 0, "max": 10000, "step": 1, "tooltip": "Frame of the first start picture"}
        end = {"default": -1, "min": -10000, "max": 10000, "step": 1, "tooltip": "Frame of the last end picture"}
        return {
            "required": {
                "num_frames": ("INT", {**NUM_FRAMES, "tooltip": "Frames of the video"}),
                "empty_frame_level": ("FLOAT", level),
            },
            "optional": {
                "start_image": ("IMAGE", {"tooltip": "Pictures from start_index on"}),
                "end_image": ("IMAGE", {"tooltip": "Pictures up to end_index"}),
                "control_images": ("IMAGE", {"tooltip": "Control video for the frames between; they are made anew"}),
                "inpaint_mask": ("MASK", {"tooltip": "1 where the frames between are made anew; empty: everywhere"}),
                "start_index": ("INT", start),
                "end_index": ("INT", end),
            },
        }

    def process(
        self,
        num_frames: int,
        empty_frame_level: float,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        control_images: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        start_index: int = 0,
        end_index: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Frames and masks."""
        placed = Placed(
            num_frames=num_frames,
            level=empty_frame_level,
            start=start_image,
            end=end_image,
            control=control_images,
            inpaint=inpaint_mask,
            start_index=start_index,
            end_index=end_index,
        )
        return placed.frames_and_masks()


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoVACEEncode, WanVideoVACEModelSelect, WanVideoExtraModelSelect, WanVideoVACEStartToEndFrame
)
