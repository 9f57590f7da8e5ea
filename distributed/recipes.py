"""A sampler's request for another process: everything of it but loaded models, which that process loads by itself.

A model goes as a recipe: a function and the values that its loader node was given, file paths among them. Files are
memory-mapped, so that weights used as they are in the file lie in host memory once. The module is what `torch.save`
takes as `pickle_module`: it has a `Pickler`. What it writes is read by processes of the same run alone.
"""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ..host import Host, get_host
from ..registry import SYSTEMS
from ..wanvideo.load_plan import LoadOptions
from ..wanvideo.loading import WanVideoModel, load_wan_model
from ..wanvideo.modules.vae import WanVAE
from ..wanvideo.schedulers import Schedule, make_schedule

Recipe = Callable[..., object]

# Of this process's models: a number by which other processes know each while it lives here.
_numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
_next = itertools.count()
# Models that this process loaded by recipe, by the number of the process that asked for it.
_loaded: dict[int, object] = {}


class Pickler(pickle.Pickler):
    """Writes recipes in the place of models. Raises ValueError for a model without one."""

    def reducer_override(self, value: object) -> object:
        """How objects are written that must not go as they are."""
        if isinstance(value, WanVideoModel):
            changes = {name: getattr(value, name) for name in ("attention", "loras", "block_swap", "payloads")}
            recipe = partial(_transformer, value.path, value.options)
            return _changed, (_number(value.transformer), recipe, changes)
        if isinstance(value, WanVAE) and value.recipe is not None:
            return _restored, (_number(value), value.recipe)
        if isinstance(value, Schedule):
            return make_schedule, (value.spec,)
        if isinstance(value, nn.Module):
            raise ValueError(
                f"A model is connected that cannot go to the other GPUs ({type(value).__name__}): disconnect "
                "WanVideoMultiGPU from the model loader, or run the workflow by `wanvideo run --gpus`."
            )
        return NotImplemented


def living() -> tuple[int, ...]:
    """Numbers of the models that are still used here."""
    return tuple(_numbers.values())


def keep(numbers: Collection[int]) -> None:
    """Let go of the models that were loaded by recipe, but for these."""
    for number in set(_loaded) - set(numbers):
        del _loaded[number]


def _number(value: object) -> int:
    if value not in _numbers:
        _numbers[value] = next(_next)
    return _numbers[value]


def _restored(number: int, recipe: Recipe) -> object:
    if number not in _loaded:
        _loaded[number] = recipe(host=get_host())
    return _loaded[number]


def _changed(number: int, recipe: Recipe, changes: dict[str, object]) -> WanVideoModel:
    return replace(_restored(number, recipe), **changes)


def _transformer(path: Path, options: LoadOptions, host: Host) -> WanVideoModel:
    return load_wan_model(path, options, host, SYSTEMS)
