"""What nodes give to nodes, told in one sentence where another pack looks into it as into that of the original pack."""

from __future__ import annotations

from typing import NoReturn


class Opaque:
    """Answers names and keys that only the original's objects have."""

    def __getattr__(self, name: str) -> object:
        if hasattr(type(self), name):
            # A property that failed: its own error.
            return object.__getattribute__(self, name)
        raise AttributeError(_sentence(self, f"attribute {name!r}"))

    def __getitem__(self, key: object) -> NoReturn:
        raise TypeError(_sentence(self, f"item {key!r}"))


def _sentence(value: object, what: str) -> str:
    return (
        f"{type(value).__name__} of this pack has no {what}: a node of another pack looks into it as into that of the "
        "original WanVideoWrapper; use a node of this pack in its place."
    )
