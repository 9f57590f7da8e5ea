"""Texts put together (KJNodes, ComfyUI-Custom-Scripts)."""

from __future__ import annotations

import re

from ...node_tools import Inputs

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


def _substituted(pattern: str, text: str, whole: str) -> str:
    try:
        return re.sub(pattern, text, whole)
    except re.error as error:
        raise ValueError(f"text_b '/{pattern:.80}/' is no regular expression ({error}); correct it.") from error


NODE_CLASS_MAPPINGS = {
    "StringConstantMultiline": StringConstantMultiline,
    "JoinStrings": JoinStrings,
    "StringFunction|pysssss": StringFunction,
}
