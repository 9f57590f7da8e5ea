"""Prompts of shots in one text: [1] the first shot, [2] the second one."""

from __future__ import annotations

import re

from torch import Tensor

from .extension import ShotPrompts

FEWEST, MOST = 2, 6


def split(text: str) -> list[str] | None:
    """The shots' prompts; None for a text without [1], or with bars, which part prompts of another kind.

    Raises ValueError for other numbers of shots than 2 to 6.
    """
    if "[1]" not in text or "|" in text:
        return None
    shots = [part.strip() for part in re.split(r"\[\d+\]", text) if part.strip()]
    if not FEWEST <= len(shots) <= MOST:
        raise ValueError(
            f"The prompt has {len(shots)} shots after marks like [1]; EchoShot takes {FEWEST} to {MOST}: write each as "
            "[1] first shot [2] second shot, or leave the marks out."
        )
    return shots


def payloads(prompts: tuple[Tensor, ...]) -> tuple[ShotPrompts, ...]:
    """The shots of these embedded prompts."""
    return (ShotPrompts(prompts, len(prompts)),)
