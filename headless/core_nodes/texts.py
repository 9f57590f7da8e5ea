"""Texts put together and chosen (KJNodes, ComfyUI-Custom-Scripts, ComfyUI-Impact-Pack)."""

from __future__ import annotations

import logging
import re

from ...node_tools import Inputs

log = logging.getLogger("wanvideo")

ANSWERS = ["yes", "no"]
CONNECTED = ("STRING", {"default": "", "forceInput": True})


class StringConstantMultiline:
    """A text, in one line or as it is."""

    FUNCTION = "stringify"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "string": ("STRING", {"default": "", "multiline": True}),
                "strip_newlines": ("BOOLEAN", {"default": True}),
            }
        }

    def stringify(self, string: str, strip_newlines: bool) -> tuple[str]:
        """The text; lines are joined by nothing."""
        return (string.replace("\n", "").strip() if strip_newlines else string,)


class JoinStrings:
    """Two texts with a delimiter between them."""

    FUNCTION = "joinstring"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"delimiter": ("STRING", {"default": " "})},
            "optional": {"string1": CONNECTED, "string2": CONNECTED},
        }

    def joinstring(self, delimiter: str, string1: str = "", string2: str = "") -> tuple[str]:
        """string1, delimiter, string2."""
        return (f"{string1}{delimiter}{string2}",)


class StringFunction:
    """Appends texts to each other, or replaces one in another (StringFunction|pysssss)."""

    FUNCTION = "exec"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        text = ("STRING", {"default": "", "multiline": True})
        return {
            "required": {"action": (["append", "replace"],), "tidy_tags": (ANSWERS,)},
            "optional": {"text_a": text, "text_b": text, "text_c": text},
        }

    def exec(self, action: str, tidy_tags: str, text_a: str = "", text_b: str = "", text_c: str = "") -> tuple[str]:
        """The three in a row, or text_a with text_c for text_b, which is a regular expression between slashes.

        tidy_tags: commas between the three; runs of spaces and commas become one.
        """
        tidy = tidy_tags == "yes"
        if action == "append":
            result = (", " if tidy else "").join(text for text in (text_a, text_b, text_c) if text)
        elif text_b.startswith("/") and text_b.endswith("/"):
            result = _substituted(text_b[1:-1], text_c, text_a)
        else:
            result = text_a.replace(text_b, text_c)
        if tidy:
            result = re.sub(",{2,}", ",", re.sub(r"\s{2,}", " ", result).replace(" ,", ",")).strip()
        return (result,)


class ImpactStringSelector:
    """One of several texts: of the lines, or of the parts that begin with '#'."""

    FUNCTION = "doit"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "strings": ("STRING", {"default": "", "multiline": True}),
                "multiline": ("BOOLEAN", {"default": False}),
                "select": ("INT", {"default": 0, "min": 0, "step": 1}),
            }
        }

    def doit(self, strings: str, multiline: bool, select: int) -> tuple[str]:
        """The text of this number; after the last one they begin anew."""
        if not multiline:
            lines = strings.split("\n")
            return (lines[select % len(lines)],)
        parts = [part.strip() for part in re.split("^(?=#)", strings, flags=re.MULTILINE) if part.strip()]
        return (parts[select % len(parts)].removeprefix("#") if parts else strings,)


class ImpactWildcardProcessor:
    """A text that ComfyUI's editor fills in when it queues a graph; here what it filled in last."""

    FUNCTION = "doit"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        text = ("STRING", {"default": "", "multiline": True})
        return {
            "required": {
                "wildcard_text": text,
                "populated_text": text,
                "mode": ("STRING", {"default": "populate"}),
                "seed": ("INT", {"default": 0, "min": 0}),
            }
        }

    def doit(self, wildcard_text: str, populated_text: str, mode: str, seed: int) -> tuple[str]:
        """Text without wildcards as it is, else what was filled in. Raises ValueError where nothing was."""
        if mode != "populate" or not wildcard_text:
            return (populated_text,)
        if not re.search(r"\{.*\}|__.+__|<lora:", wildcard_text, re.DOTALL):
            return (wildcard_text,)
        if not populated_text:
            raise ValueError(f"'{wildcard_text:.80}' has wildcards that ComfyUI fills in: write the text itself.")
        log.info("Wildcards are filled in by ComfyUI; what it filled in last is taken: %s", populated_text)
        return (populated_text,)


def _substituted(pattern: str, text: str, whole: str) -> str:
    try:
        return re.sub(pattern, text, whole)
    except re.error as error:
        raise ValueError(f"text_b '/{pattern:.80}/' is no regular expression ({error}); correct it.") from error


NODE_CLASS_MAPPINGS = {
    "ImpactStringSelector": ImpactStringSelector,
    "ImpactWildcardProcessor": ImpactWildcardProcessor,
    "StringConstantMultiline": StringConstantMultiline,
    "JoinStrings": JoinStrings,
    "StringFunction|pysssss": StringFunction,
}
