"""Text nodes: prompts in, text embeds out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .host import get_host
from .node_checks import Types, check_loadable, verdict
from .node_tools import CATEGORY, DTYPES, TEXT_ENCODERS, Inputs, files, find_text_encoder, mappings
from .nodes_prompt import PromptExtension
from .registry import PROMPT_FORMS
from .wanvideo.conditioning import Payload
from .wanvideo.loading import WanVideoModel
from .wanvideo.modules.t5 import TextEncoder, encoder_name, load_text_encoder
from .wanvideo.request import TextEmbeds
from .wanvideo.text_cache import TextCache

log = logging.getLogger("wanvideo")

PROMPT = ("STRING", {"default": "", "multiline": True, "tooltip": "What to show"})
NEGATIVE = ("STRING", {"default": "", "multiline": True, "tooltip": "What to avoid; unused where cfg is 1"})
ENCODE_DEVICES = (["gpu", "cpu"], {"default": "gpu", "tooltip": "The cpu is slower and leaves the GPU alone"})
EXTENDER_TIP = "A language model that extends the positive prompt; from Wan Video Prompt Extender Select"
# How Qwen2.5-VL was trained to be asked about a picture.
SEEING = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
NOT_CACHED = "The prompt is not in the cache on disk: connect a text encoder to 't5'."


class VisionClip(Protocol):
    """What is used of ComfyUI's CLIP, or of its stand-in."""

    def tokenize(self, text: str, *, images: list[Tensor], llama_template: str | None) -> object:
        """The text in its template (None: the model's own), with pictures in the place of their marks."""

    def encode_from_tokens_scheduled(self, tokens: object) -> list[list[object]]:
        """CONDITIONING."""


def _encode_prompts(
    prompts: Sequence[str],
    name: str | None,
    encode: Callable[[list[str]], list[Tensor]] | None,
    cache: TextCache | None,
) -> tuple[Tensor, ...]:
    """Embeddings of the prompts, from the cache where they are there. name, encode: None if there is no encoder."""
    found = [None if cache is None else cache.load(prompt, name) for prompt in prompts]
    absent = [prompt for prompt, tensor in zip(prompts, found, strict=True) if tensor is None]
    if absent and encode is None:
        raise ValueError(NOT_CACHED)
    fresh = iter(encode(absent) if absent else [])
    result = []
    for prompt, tensor in zip(prompts, found, strict=True):
        value = next(fresh) if tensor is None else tensor
        if tensor is None and cache is not None:
            cache.save(prompt, name, value)
        result.append(value)
    return tuple(result)


def _encoded(
    prompts: Sequence[str],
    t5: TextEncoder | None,
    force_offload: bool,
    model_to_offload: WanVideoModel | None,
    use_disk_cache: bool,
    device: str,
) -> tuple[Tensor, ...]:
    """Embeddings of the prompts, as the nodes' widgets say."""
    if model_to_offload is not None:
        model_to_offload.managed.release()
    name = None if t5 is None else t5.name
    encode = None if t5 is None else lambda texts: t5.encode(texts, device=_compute_device(device))
    embeddings = _encode_prompts(prompts, name, encode, _cache(use_disk_cache))
    if t5 is not None and force_offload:
        t5.managed.release()
    return embeddings


def _split(prompt: str) -> list[str]:
    """The prompts of one text, by the first way of writing several that it follows."""
    parts = (form.split(prompt) for form in PROMPT_FORMS)
    return next((part for part in parts if part is not None), [prompt.strip()])


def _payloads(prompt: str, embeddings: tuple[Tensor, ...]) -> tuple[Payload, ...]:
    """What goes with the embedded prompts of the text."""
    forms = (form for form in PROMPT_FORMS if form.split(prompt) is not None)
    return next((form.payloads(embeddings) for form in forms), ())


def _cache(wanted: bool) -> TextCache | None:
    return TextCache(get_host().cache_dir() / "text_embeds") if wanted else None


def _compute_device(device: str) -> torch.device | None:
    return torch.device("cpu") if device == "cpu" else None


def _check_encoder(prompts: Sequence[str], use_disk_cache: bool, types: Types | None) -> None:
    """Raises ValueError where no encoder is linked and the cache does not have all prompts."""
    if "t5" in (types or {}):
        return
    if not use_disk_cache:
        raise ValueError("Prompts are encoded by a text encoder: connect LoadWanVideoT5TextEncoder to 't5'.")
    cache = _cache(True)
    if any(cache.load(prompt, None) is None for prompt in prompts):
        raise ValueError(NOT_CACHED)


class WanVideoTextEncode:
    """Encodes the prompts. Several, separated by '|', follow each other over the video's windows."""

    DISPLAY_NAME = "WanVideo TextEncode"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"positive_prompt": PROMPT, "negative_prompt": NEGATIVE},
            "optional": {
                "t5": ("WANTEXTENCODER", {"tooltip": "The encoder; not needed where use_disk_cache has the prompt"}),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": "Free the GPU afterwards"}),
                "model_to_offload": ("WANVIDEOMODEL", {"tooltip": "A model that leaves the GPU first"}),
                "use_disk_cache": ("BOOLEAN", {"default": False, "tooltip": "Keep embeddings on disk"}),
                "device": ENCODE_DEVICES,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        positive_prompt: str = "",
        negative_prompt: str = "",
        use_disk_cache: bool = False,
        input_types: Types | None = None,
    ) -> bool:
        """An encoder, or prompts that the cache on disk has."""

        def check(**values: object) -> None:
            _check_encoder([*_split(positive_prompt), negative_prompt], use_disk_cache, input_types)

        texts = {"positive_prompt": positive_prompt, "negative_prompt": negative_prompt}
        return verdict(cls, check, input_types, use_disk_cache=use_disk_cache, **texts)

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
        prompts = [*_split(positive_prompt), negative_prompt]
        both = _encoded(prompts, t5, force_offload, model_to_offload, use_disk_cache, device)
        return (TextEmbeds(positive=both[:-1], negative=both[-1:], payloads=_payloads(positive_prompt, both[:-1])),)


class WanVideoTextEncodeSingle:
    """Encodes one prompt."""

    DISPLAY_NAME = "WanVideo TextEncodeSingle"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"prompt": PROMPT}, "optional": WanVideoTextEncode.INPUT_TYPES()["optional"]}

    @classmethod
    def VALIDATE_INPUTS(
        cls, prompt: str = "", use_disk_cache: bool = False, input_types: Types | None = None
    ) -> bool:
        """An encoder, or a prompt that the cache on disk has."""

        def check(**values: object) -> None:
            _check_encoder([prompt.strip()], use_disk_cache, input_types)

        return verdict(cls, check, input_types, prompt=prompt, use_disk_cache=use_disk_cache)

    def process(
        self,
        prompt: str,
        t5: TextEncoder | None = None,
        force_offload: bool = True,
        model_to_offload: WanVideoModel | None = None,
        use_disk_cache: bool = False,
        device: str = "gpu",
    ) -> tuple[TextEmbeds]:
        """Embeds of the whole text, whatever separators it has, without a negative prompt."""
        positive = _encoded([prompt.strip()], t5, force_offload, model_to_offload, use_disk_cache, device)
        return (TextEmbeds(positive=positive),)


class WanVideoTextEncodeCached:
    """Loads the text encoder only for prompts that are not on disk yet, and frees it at once."""

    DISPLAY_NAME = "WanVideo TextEncode Cached"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS", "WANVIDEOTEXTEMBEDS", "STRING")
    RETURN_NAMES = ("text_embeds", "negative_text_embeds", "positive_prompt")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model_name": (files(*TEXT_ENCODERS), {"tooltip": "A umt5-xxl encoder in models/text_encoders"}),
                "precision": (["fp32", "bf16"], {"default": "bf16", "tooltip": "Of the encoder's weights"}),
                "positive_prompt": PROMPT,
                "negative_prompt": NEGATIVE,
                "quantization": (
                    ["disabled", "fp8_e4m3fn"],
                    {"default": "disabled", "tooltip": "fp8 takes half the memory"},
                ),
                "use_disk_cache": ("BOOLEAN", {"default": True, "tooltip": "Keep embeddings on disk"}),
                "device": ENCODE_DEVICES,
            },
            "optional": {"extender_args": ("WANVIDEOPROMPTEXTENDER_ARGS", {"tooltip": EXTENDER_TIP})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str = "", input_types: Types | None = None) -> bool:
        """A text encoder, by its header."""

        def check(model_name: str) -> None:
            check_loadable(find_text_encoder(model_name), "WanVideo T5 Text Encoder Loader")

        return verdict(cls, check, input_types, model_name=model_name)

    def process(
        self,
        model_name: str,
        precision: str,
        positive_prompt: str,
        negative_prompt: str,
        quantization: str = "disabled",
        use_disk_cache: bool = True,
        device: str = "gpu",
        extender_args: PromptExtension | None = None,
    ) -> tuple[TextEmbeds, TextEmbeds, str]:
        """Both embeds, the negative ones alone, and the prompt as it was encoded."""
        if extender_args is not None:
            positive_prompt = extender_args.extended(positive_prompt, precision=precision, device=device)
        host = get_host()
        path = find_text_encoder(model_name)

        def encode(prompts: list[str]) -> list[Tensor]:
            encoder = load_text_encoder(path, dtype=DTYPES[precision], quantization=quantization, host=host)
            result = encoder.encode(prompts, device=_compute_device(device))
            encoder.managed.release()
            return result

        prompts = [*_split(positive_prompt), negative_prompt]
        name = encoder_name(path, DTYPES[precision], quantization)
        both = _encode_prompts(prompts, name, encode, _cache(use_disk_cache))
        negative = TextEmbeds(positive=both[-1:])
        whole = TextEmbeds(positive=both[:-1], negative=both[-1:], payloads=_payloads(positive_prompt, both[:-1]))
        return whole, negative, positive_prompt


class WanVideoTextEmbedBridge:
    """Takes prompts that ComfyUI's own CLIPTextEncode encoded with a Wan text encoder."""

    DISPLAY_NAME = "WanVideo TextEmbed Bridge"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"positive": ("CONDITIONING", {"tooltip": "What to show"})},
            "optional": {"negative": ("CONDITIONING", {"tooltip": "What to avoid"})},
        }

    def process(self, positive: list[list[object]], negative: list[list[object]] | None = None) -> tuple[TextEmbeds]:
        """The same embeddings as text embeds. Raises ValueError for a conditioning that is empty."""
        prompts = _bridged("positive", positive)
        return (TextEmbeds(positive=prompts, negative=() if negative is None else _bridged("negative", negative)),)


def _bridged(name: str, conditioning: list[list[object]]) -> tuple[Tensor]:
    if not conditioning:
        raise ValueError(f"The conditioning at '{name}' is empty: connect CLIPTextEncode.")
    tensor = conditioning[0][0]
    if len(conditioning) > 1 or len(tensor) > 1:
        log.warning("Several prompts are combined at '%s'; the first alone is read.", name)
    return (tensor[0].float().cpu(),)


class TextImageEncodeQwenVL:
    """Encodes a prompt, and a picture that it speaks of, with Qwen2.5-VL."""

    DISPLAY_NAME = "TextImageEncodeQwenVL"
    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("QWENVL_EMBEDS",)
    RETURN_NAMES = ("qwenvl_embeds",)
    DESCRIPTION = "What Qwen2.5-VL makes of a prompt and a picture, for BindWeave."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        clip = "Qwen2.5-VL 7B, from ComfyUI's Load CLIP with type qwen_image"
        return {
            "required": {"clip": ("CLIP", {"tooltip": clip}), "prompt": PROMPT},
            "optional": {"image": ("IMAGE", {"tooltip": "One picture, which the model reads with the prompt"})},
        }

    def add(self, clip: VisionClip, prompt: str, image: Tensor | None = None) -> tuple[Tensor]:
        """[1, tokens, channels]: from the prompt on without a picture, from the picture on with one."""
        if image is not None and len(image) > 1:
            log.warning("Qwen2.5-VL reads the first of %d pictures.", len(image))
        images = [] if image is None else [image[:1, ..., :3]]
        tokens = clip.tokenize(prompt, images=images, llama_template=SEEING if images else None)
        return (clip.encode_from_tokens_scheduled(tokens)[0][0],)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    WanVideoTextEncode,
    WanVideoTextEncodeSingle,
    WanVideoTextEncodeCached,
    WanVideoTextEmbedBridge,
    TextImageEncodeQwenVL,
)
