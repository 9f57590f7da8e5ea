"""Conditioning nodes: text, pictures, latents in; embeds for the sampler out; latents back to pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .enhance_a_video import EnhanceArgs
from .host import get_host
from .node_tools import CATEGORY, DTYPES, files, reject, round_size
from .wanvideo.i2v import GivenFrames, encode_given
from .wanvideo.images import resize_images, to_images, to_video
from .wanvideo.loading import WanVideoModel
from .wanvideo.modules.t5 import TextEncoder, load_text_encoder
from .wanvideo.modules.vae import Tile, WanVAE
from .wanvideo.payloads import ClipEmbeds, ImageEmbeds, TextEmbeds, latent_frames, round_frames
from .wanvideo.text_cache import TextCache

log = logging.getLogger("wanvideo")

Inputs = dict[str, dict[str, tuple[object, ...]]]
Latent = dict[str, object]
PROMPT = ("STRING", {"default": "", "multiline": True})
ENCODE_DEVICES = (["gpu", "cpu"], {"default": "gpu"})
LATENT_CHANNELS = 16
LATENT_FACTOR = 8


def _encode_prompts(
    prompts: Sequence[str], name: str, encode: Callable[[list[str]], list[Tensor]] | None, cache: TextCache | None
) -> tuple[Tensor, ...]:
    """Embeddings of the prompts, from the cache where they are there. encode: None if there is no encoder."""
    found = [None if cache is None else cache.load(prompt, name) for prompt in prompts]
    absent = [prompt for prompt, tensor in zip(prompts, found, strict=True) if tensor is None]
    if absent and encode is None:
        raise ValueError("The prompt is not in the cache on disk: connect a text encoder to 't5'.")
    fresh = iter(encode(absent) if absent else [])
    result = []
    for prompt, tensor in zip(prompts, found, strict=True):
        value = next(fresh) if tensor is None else tensor
        if tensor is None and cache is not None:
            cache.save(prompt, name, value)
        result.append(value)
    return tuple(result)


def _split(prompt: str) -> list[str]:
    return [part.strip() for part in prompt.split("|")]


def _cache(wanted: bool) -> TextCache | None:
    return TextCache(get_host().models_dir("text_encoders") / "text_embed_cache") if wanted else None


def _compute_device(device: str) -> torch.device | None:
    return torch.device("cpu") if device == "cpu" else None


class WanVideoTextEncode:
    """Encodes the prompts. Several, separated by '|', follow each other over the video's windows."""

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"positive_prompt": PROMPT, "negative_prompt": PROMPT},
            "optional": {
                "t5": ("WANTEXTENCODER",),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": "Free the GPU afterwards"}),
                "model_to_offload": ("WANVIDEOMODEL", {"tooltip": "A model that leaves the GPU first"}),
                "use_disk_cache": ("BOOLEAN", {"default": False, "tooltip": "Keep embeddings on disk"}),
                "device": ENCODE_DEVICES,
            },
        }

    def process(
        self,
        positive_prompt: str,
        negative_prompt: str,
        t5: TextEncoder | None = None,
        force_offload: bool = True,
        model_to_offload: WanVideoModel | None = None,
        use_disk_cache: bool = False,
        device: str = "gpu",
    ) -> tuple[TextEmbeds]:
        """Embeds of both prompts."""
        if model_to_offload is not None:
            model_to_offload.managed.release()
        name = "any" if t5 is None else t5.path.name
        encode = None if t5 is None else lambda prompts: t5.encode(prompts, device=_compute_device(device))
        parts = _split(positive_prompt)
        both = _encode_prompts([*parts, negative_prompt], name, encode, _cache(use_disk_cache))
        if t5 is not None and force_offload:
            t5.managed.release()
        return (TextEmbeds(positive=both[:-1], negative=both[-1:]),)


class WanVideoTextEncodeSingle:
    """Encodes one prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"prompt": PROMPT}, "optional": WanVideoTextEncode.INPUT_TYPES()["optional"]}

    def process(
        self,
        prompt: str,
        t5: TextEncoder | None = None,
        force_offload: bool = True,
        model_to_offload: WanVideoModel | None = None,
        use_disk_cache: bool = False,
        device: str = "gpu",
    ) -> tuple[TextEmbeds]:
        """Embeds without a negative prompt."""
        both = WanVideoTextEncode().process(
            prompt, "", t5, force_offload, model_to_offload, use_disk_cache, device
        )[0]
        return (TextEmbeds(positive=both.positive),)


class WanVideoTextEncodeCached:
    """Loads the text encoder only for prompts that are not on disk yet, and frees it at once."""

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS", "WANVIDEOTEXTEMBEDS", "STRING")
    RETURN_NAMES = ("text_embeds", "negative_text_embeds", "positive_prompt")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model_name": (files("text_encoders"), {"tooltip": "A umt5-xxl encoder in models/text_encoders"}),
                "precision": (["fp32", "bf16"], {"default": "bf16"}),
                "positive_prompt": PROMPT,
                "negative_prompt": PROMPT,
                "quantization": (["disabled", "fp8_e4m3fn"], {"default": "disabled"}),
                "use_disk_cache": ("BOOLEAN", {"default": True, "tooltip": "Keep embeddings on disk"}),
                "device": ENCODE_DEVICES,
            },
            "optional": {"extender_args": ("WANVIDEOPROMPTEXTENDER_ARGS",)},
        }

    def process(
        self,
        model_name: str,
        precision: str,
        positive_prompt: str,
        negative_prompt: str,
        quantization: str = "disabled",
        use_disk_cache: bool = True,
        device: str = "gpu",
        extender_args: object = None,
    ) -> tuple[TextEmbeds, TextEmbeds, str]:
        """Both embeds, the negative ones alone, and the prompt."""
        reject("WanVideo TextEncode Cached", {"extender_args": extender_args})
        host = get_host()
        path = host.find_file("text_encoders", model_name)

        def encode(prompts: list[str]) -> list[Tensor]:
            encoder = load_text_encoder(path, dtype=DTYPES[precision], quantization=quantization, host=host)
            result = encoder.encode(prompts, device=_compute_device(device))
            encoder.managed.release()
            return result

        prompts = [*_split(positive_prompt), negative_prompt]
        both = _encode_prompts(prompts, f"{path.name} {precision}", encode, _cache(use_disk_cache))
        negative = TextEmbeds(positive=both[-1:])
        return TextEmbeds(positive=both[:-1], negative=both[-1:]), negative, positive_prompt


class WanVideoTextEmbedBridge:
    """Takes prompts that ComfyUI's own CLIPTextEncode encoded with a Wan text encoder."""

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"positive": ("CONDITIONING",)}, "optional": {"negative": ("CONDITIONING",)}}

    def process(self, positive: list[list[object]], negative: list[list[object]] | None = None) -> tuple[TextEmbeds]:
        """The same embeddings as text embeds."""
        tensors = [None if c is None else (c[0][0][0].float().cpu(),) for c in (positive, negative)]
        return (TextEmbeds(positive=tensors[0], negative=tensors[1] or ()),)


class WanVideoClipVisionEncode:
    """CLIP features of one or two pictures, for image-to-video models."""

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_CLIPEMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.001})
        return {
            "required": {
                "clip_vision": ("CLIP_VISION",),
                "image_1": ("IMAGE",),
                "strength_1": strength,
                "strength_2": strength,
                "crop": (["center", "disabled"], {"default": "center", "tooltip": "Cut the middle out, or squeeze"}),
                "combine_embeds": (["average", "sum", "concat", "batch"], {"default": "average"}),
                "force_offload": ("BOOLEAN", {"default": True}),
            },
            "optional": {
                "image_2": ("IMAGE",),
                "negative_image": ("IMAGE", {"tooltip": "For the pass without the prompt"}),
                "tiles": ("INT", {"default": 0, "min": 0, "max": 16, "step": 2, "tooltip": "Not available: 0"}),
                "ratio": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}),
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
                "width": ("INT", {"default": 832, **size}),
                "height": ("INT", {"default": 480, **size}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4}),
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength, "tooltip": "Noise on the pictures"}),
                "start_latent_strength": ("FLOAT", {"default": 1.0, **strength}),
                "end_latent_strength": ("FLOAT", {"default": 1.0, **strength}),
                "force_offload": ("BOOLEAN", {"default": True}),
            },
            "optional": {
                "vae": ("WANVAE",),
                "clip_embeds": ("WANVIDIMAGE_CLIPEMBEDS",),
                "start_image": ("IMAGE",),
                "end_image": ("IMAGE",),
                "control_embeds": ("WANVIDIMAGE_EMBEDS",),
                "fun_or_fl2v_model": ("BOOLEAN", {"default": True, "tooltip": "The end picture is the last frame"}),
                "temporal_mask": ("MASK", {"tooltip": "1 where a frame is given"}),
                "extra_latents": ("LATENT", {"tooltip": "Reference latents in front"}),
                "tiled_vae": ("BOOLEAN", {"default": False}),
                "add_cond_latents": ("ADD_COND_LATENTS", {"advanced": True}),
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
        reject(
            "WanVideo ImageToVideo Encode", {"control_embeds": control_embeds, "add_cond_latents": add_cond_latents}
        )
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

    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)
    RETURN_NAMES = ("image_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        size = {"min": 64, "max": 8096, "step": 8}
        return {
            "required": {
                "width": ("INT", {"default": 832, **size}),
                "height": ("INT", {"default": 480, **size}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4}),
            },
            "optional": {
                "control_embeds": ("WANVIDIMAGE_EMBEDS",),
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


TILE_TIP = "Less memory; seams fade where tiles overlap"


class WanVideoEncode:
    """Encodes pictures as latents."""

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
                "vae": ("WANVAE",),
                "image": ("IMAGE",),
                "enable_vae_tiling": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "tile_x": ("INT", {"default": 272, **tile}),
                "tile_y": ("INT", {"default": 272, **tile}),
                "tile_stride_x": ("INT", {"default": 144, **stride}),
                "tile_stride_y": ("INT", {"default": 128, **stride}),
            },
            "optional": {
                "noise_aug_strength": ("FLOAT", {"default": 0.0, **strength}),
                "latent_strength": ("FLOAT", {"default": 1.0, **strength}),
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
                "vae": ("WANVAE",),
                "samples": ("LATENT",),
                "enable_vae_tiling": ("BOOLEAN", {"default": False, "tooltip": TILE_TIP}),
                "tile_x": ("INT", {"default": 272, **tile}),
                "tile_y": ("INT", {"default": 272, **tile}),
                "tile_stride_x": ("INT", {"default": 144, **stride}),
                "tile_stride_y": ("INT", {"default": 128, **stride}),
            },
            "optional": {"normalization": (["default", "minmax", "none"], {"advanced": True})},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, tile_x: int, tile_y: int, tile_stride_x: int, tile_stride_y: int
    ) -> bool | str:
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
            low, high = video.min(), video.max()
            video = (video - low) / (high - low) * 2 - 1
        if normalization == "none":
            return (video.movedim(0, -1).contiguous(),)
        return (to_images(video),)


class WanVideoEnhanceAVideo:
    """Amplifies self-attention where frames agree, for more detail and consistency."""

    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("FETAARGS",)
    RETURN_NAMES = ("feta_args",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "weight": ("FLOAT", {"default": 2.0, "min": 0, "max": 100, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent}),
            }
        }

    def setargs(self, weight: float, start_percent: float, end_percent: float) -> tuple[EnhanceArgs]:
        """Collect the settings."""
        return (EnhanceArgs(weight, start_percent, end_percent),)


NODE_CLASS_MAPPINGS = {
    "WanVideoTextEncode": WanVideoTextEncode,
    "WanVideoTextEncodeSingle": WanVideoTextEncodeSingle,
    "WanVideoTextEncodeCached": WanVideoTextEncodeCached,
    "WanVideoTextEmbedBridge": WanVideoTextEmbedBridge,
    "WanVideoClipVisionEncode": WanVideoClipVisionEncode,
    "WanVideoImageToVideoEncode": WanVideoImageToVideoEncode,
    "WanVideoEmptyEmbeds": WanVideoEmptyEmbeds,
    "WanVideoEncode": WanVideoEncode,
    "WanVideoDecode": WanVideoDecode,
    "WanVideoEnhanceAVideo": WanVideoEnhanceAVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "WanVideoTextEncode": "WanVideo TextEncode",
    "WanVideoTextEncodeSingle": "WanVideo TextEncodeSingle",
    "WanVideoTextEncodeCached": "WanVideo TextEncode Cached",
    "WanVideoTextEmbedBridge": "WanVideo TextEmbed Bridge",
    "WanVideoClipVisionEncode": "WanVideo ClipVision Encode",
    "WanVideoImageToVideoEncode": "WanVideo ImageToVideo Encode",
    "WanVideoEmptyEmbeds": "WanVideo Empty Embeds",
    "WanVideoEncode": "WanVideo Encode",
    "WanVideoDecode": "WanVideo Decode",
    "WanVideoEnhanceAVideo": "WanVideo Enhance-A-Video",
}
