"""What nodes answer to VALIDATE_INPUTS: in ComfyUI when a graph is queued, in `wanvideo run` before its first node."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from .registry import SYSTEMS
from .saved_values import CASTS, KIND_NAMES, Choices, cast, option_of
from .wanvideo.checkpoint import open_checkpoint

# Types of the links that arrive, by input name; ComfyUI calls the parameter `input_types`.
Types = Mapping[str, object]


def verdict(
    node: type, check: Callable[..., object], types: Types | None = None, /, **values: object
) -> Literal[True]:
    """True. Raises ValueError, with one sentence, or OSError if these widget values cannot run.

    Raised, because ComfyUI repeats what VALIDATE_INPUTS returns for each of its parameters, and shows an error once.

    ComfyUI leaves the limits and choices of every value that VALIDATE_INPUTS names to the node, and the types of all
    links where it names `input_types`, so both are judged here first; and values that are no number at all, which it
    hands on. check(**values) then raises ValueError or OSError for values that do not fit, and gets today's names of
    options and files, as the node will; it is not asked where another node makes one of them, which is not known yet.
    """
    links = types or {}
    declared = node.INPUT_TYPES()
    inputs = {**declared.get("required", {}), **declared.get("optional", {})}
    problem = _wrong_link(inputs, links) or _outside(inputs, {k: v for k, v in values.items() if k not in links})
    if problem:
        raise ValueError(problem)
    if not links.keys() & values.keys():
        check(**{name: option_of(inputs[name][0], value) for name, value in values.items()})
    return True


def need_link(types: Types | None, name: str, why: str) -> None:
    """Raise ValueError with the sentence `why` where nothing is linked to the input `name`."""
    if name not in (types or {}):
        raise ValueError(why)


def check_loadable(path: Path, *loaders: str) -> None:
    """Read the header of a model file that one of the nodes `loaders` (display names) is to load.

    Raises ValueError if it is damaged, or of a kind that another node loads.
    """
    kind = SYSTEMS.kind_of(open_checkpoint(path).shapes)
    if kind is not None and kind.loader not in loaders:
        instead = f"load it with '{kind.loader}'" if kind.loader else "no node of this pack loads it"
        raise ValueError(f"{path.name} is a {kind.name}: {instead}, and choose another file here.")


def _wrong_link(inputs: Mapping[str, tuple[object, ...]], links: Types) -> str:
    for name, made in links.items():
        wanted = inputs[name][0] if name in inputs else "*"
        if not isinstance(made, str) or not isinstance(wanted, str) or "*" in (made, wanted):
            continue
        makes, takes = set(made.split(",")), set(wanted.split(","))
        if not makes & takes and not ("INT" in makes and "FLOAT" in takes):
            return f"'{name}' takes {wanted}, but {made} is linked to it."
    return ""


def _is_of(kind: str, value: object) -> bool:
    try:
        return value is not None and cast(kind, value) is not None
    except (TypeError, ValueError, OverflowError):
        return False


def _outside(inputs: Mapping[str, tuple[object, ...]], values: Mapping[str, object]) -> str:
    for name, value in values.items():
        kind, *rest = inputs[name]
        if isinstance(kind, list):
            if value not in kind:
                choices = kind if isinstance(kind, Choices) else Choices(kind)
                return choices.refusal(name, value, f"'{value}'")
            continue
        options = rest[0] if rest else {}
        if kind in CASTS and not _is_of(kind, value):
            return f"'{name}' must be {KIND_NAMES[kind]}, not {value!r}: set it in the node."
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = options.get("min", -math.inf), options.get("max", math.inf)
            # "Not between" instead of "outside", so that NaN fails too.
            if not low <= value <= high:
                return f"'{name}' must be between {low} and {high}, not {value}."
    return ""
