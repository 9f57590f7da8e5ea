"""All conditioning systems, in the order in which their hooks run. A new system adds its folder and one row here."""

from __future__ import annotations

from collections.abc import Mapping

from ..enhance_a_video import EnhanceAVideo
from ..multitalk.extension import MultiTalk
from .extension import Extension
from .extensions.clip_image import ClipImageExtension
from .extensions.prompt_segments import PromptSegmentsExtension

EXTENSIONS: tuple[type[Extension], ...] = (PromptSegmentsExtension, ClipImageExtension, MultiTalk, EnhanceAVideo)


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Extension, ...]:
    """The systems whose weights are among these tensors, in registry order.

    shapes: published name -> shape. Raises ValueError, naming both, if two systems claim one key.
    """
    found = tuple(e for e in (kind.detect(shapes) for kind in EXTENSIONS) if e is not None)
    for key in shapes:
        owners = [type(e).__name__ for e in found if e.owns(key)]
        if len(owners) > 1:
            raise ValueError(f"Both {' and '.join(owners)} claim the key '{key}'; the checkpoint is ambiguous.")
    return found
