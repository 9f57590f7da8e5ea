"""Nodes that let a language model extend prompts."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .host import get_host
from .node_checks import Types, check_loadable, verdict
from .node_tools import CATEGORY, DTYPES, OFFLOAD_TIP, Inputs, files, mappings
from .wanvideo.model_file import part_paths
from .wanvideo.modules.qwen import Qwen, load_qwen
from .wanvideo.system_prompts import SYSTEM_PROMPTS
from .wanvideo.text_cache import content_digest

log = logging.getLogger("wanvideo")

LOADER = "Qwen Loader"
MODEL_TIP = "A Qwen2.5 Instruct model in models/text_encoders, of 3B or 7B, say"
TOKENS = {"default": 512, "min": 1, "max": 2048, "step": 1, "tooltip": "Longest answer; a word has one or two tokens"}
INSTRUCTIONS = {"tooltip": "What the model is told to make of the prompt, and the language of its answer"}
OWN = {"default": "", "forceInput": True, "tooltip": "Instructions of your own in the place of system_prompt"}
SEED = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "Another seed gives another prompt"}


@dataclass(frozen=True, kw_only=True)
class PromptExtension:
    """How WanVideo TextEncode Cached extends prompts (socket WANVIDEOPROMPTEXTENDER_ARGS). system: instructions."""

    model: str
    system: str
    most: int
    seed: int

    def extended(self, prompt: str, *, precision: str, device: str) -> str:
        """The model's answer. It is loaded for this one, and freed; the last answers are kept."""
        path = get_host().find_file("text_encoders", self.model)
        text = _answer(path, content_digest(part_paths(path)), self, prompt, precision, device)
        log.info("The extended prompt is: %s", text)
        return text


# Other prompts beside it may change, for which the model need not be loaded again.
@functools.lru_cache(maxsize=32)
def _answer(path: Path, digest: str, how: PromptExtension, prompt: str, precision: str, device: str) -> str:
    """digest: of the file, which may be replaced under its name."""
    qwen = load_qwen(path, dtype=DTYPES[precision], host=get_host())
    try:
        return qwen.answer(how.system, prompt, most=how.most, seed=how.seed, device=_place(device))
    finally:
        qwen.managed.release()


def _place(device: str) -> torch.device | None:
    return torch.device("cpu") if device == "cpu" else None


def _instructions(chosen: str | None, own: str | None) -> str:
    """What is connected, even if it is empty, comes first."""
    return SYSTEM_PROMPTS.get(chosen, "") if own is None else own


def _check_model(node: type, types: Types | None, model: str) -> bool:
    """Whether the file is a language model, by its header."""

    def check(model: str) -> None:
        check_loadable(get_host().find_file("text_encoders", model), LOADER)

    return verdict(node, check, types, model=model)


class QwenLoader:
    """Loads the language model that extends prompts."""

    DISPLAY_NAME = LOADER
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("QWENMODEL",)
    RETURN_NAMES = ("QWENMODEL",)
    DESCRIPTION = "Loads a Qwen2.5 language model from models/text_encoders, for Wan Video Prompt Extender."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        places, where = ["main_device", "offload_device"], "Where it waits: offload_device is main memory"
        precisions = {"default": "bf16", "tooltip": "Of its weights; bf16 is what it was trained in"}
        return {
            "required": {
                "model": (files("text_encoders"), {"tooltip": MODEL_TIP}),
                "load_device": (places, {"advanced": True, "tooltip": where}),
                "precision": (["fp16", "bf16", "fp32"], precisions),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "", input_types: Types | None = None) -> bool:
        """A language model, by its header."""
        return _check_model(cls, input_types, model)

    def load(self, model: str, load_device: str, precision: str) -> tuple[Qwen]:
        """Load it."""
        host = get_host()
        qwen = load_qwen(host.find_file("text_encoders", model), dtype=DTYPES[precision], host=host)
        if load_device == "main_device":
            qwen.managed.acquire()
        return (qwen,)


class WanVideoPromptExtender:
    """Makes a long prompt of a short one."""

    DISPLAY_NAME = "Wan Video Prompt Extender"
    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("STRING",)
    DESCRIPTION = "Lets a language model make of a short prompt one of the kind that Wan was trained with."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "qwen": ("QWENMODEL", {"tooltip": "From Qwen Loader"}),
                "prompt": ("STRING", {"multiline": True, "tooltip": "What the video is to show, in few words"}),
                "max_new_tokens": ("INT", TOKENS),
                "device": (["gpu", "cpu"], {"default": "gpu", "tooltip": "The cpu takes minutes"}),
                "force_offload": ("BOOLEAN", {"default": True, "tooltip": OFFLOAD_TIP}),
            },
            "optional": {
                "system_prompt": (list(SYSTEM_PROMPTS), INSTRUCTIONS),
                "custom_system_prompt": ("STRING", OWN),
                "seed": ("INT", SEED),
            },
        }

    def generate(
        self,
        qwen: Qwen,
        prompt: str,
        device: str,
        force_offload: bool,
        max_new_tokens: int,
        system_prompt: str | None = None,
        custom_system_prompt: str | None = None,
        seed: int = 0,
    ) -> tuple[str]:
        """The model's answer."""
        system = _instructions(system_prompt, custom_system_prompt)
        text = qwen.answer(system, prompt, most=max_new_tokens, seed=seed, device=_place(device))
        if force_offload:
            qwen.managed.release()
        return (text,)


class WanVideoPromptExtenderSelect:
    """Chooses how WanVideo TextEncode Cached extends the positive prompt."""

    DISPLAY_NAME = "Wan Video Prompt Extender Select"
    CATEGORY = CATEGORY
    FUNCTION = "set"
    RETURN_TYPES = ("WANVIDEOPROMPTEXTENDER_ARGS",)
    RETURN_NAMES = ("extender_args",)
    DESCRIPTION = "For WanVideo TextEncode Cached, which loads the language model for the prompt and frees it again."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (files("text_encoders"), {"tooltip": MODEL_TIP}),
                "max_new_tokens": ("INT", TOKENS),
                "system_prompt": (list(SYSTEM_PROMPTS), INSTRUCTIONS),
            },
            "optional": {"custom_system_prompt": ("STRING", OWN), "seed": ("INT", SEED)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "", input_types: Types | None = None) -> bool:
        """A language model, by its header."""
        return _check_model(cls, input_types, model)

    def set(
        self,
        model: str,
        system_prompt: str,
        max_new_tokens: int,
        custom_system_prompt: str | None = None,
        seed: int = 0,
    ) -> tuple[PromptExtension]:
        """Collect the settings."""
        system = _instructions(system_prompt, custom_system_prompt)
        return (PromptExtension(model=model, system=system, most=max_new_tokens, seed=seed),)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(
    QwenLoader, WanVideoPromptExtender, WanVideoPromptExtenderSelect
)
