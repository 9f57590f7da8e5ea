"""Several prompts in one text, separated by '|'."""

from __future__ import annotations

from .extension import segments


def split(text: str) -> list[str] | None:
    """The prompts; None for a text without a separator."""
    return [part.strip() for part in text.split("|")] if "|" in text else None


payloads = segments
