"""Helpers of the node modules: file lists for widgets, options that are not available, rounding of sizes."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .host import get_host
from .host.protocol import KINDS
from .linked_values import in_form
from .node_results import placed
from .node_tips import with_tips
from .saved_values import ModelFiles, current_values, refuse_unusable, renamed_inputs, tolerant
from .wanvideo.frames import round_frames
from .wanvideo.latents import LATENTS_A_TOKEN
from .wanvideo.modules.vae import WanVAE

log = logging.getLogger("wanvideo")

Inputs = dict[str, dict[str, tuple[object, ...]]]
Latent = dict[str, object]

CATEGORY = "WanVideoWrapper"
# Tooltips that several nodes share.
TILE_TIP = "Less memory; seams fade where tiles overlap"
OFFLOAD_TIP = "Free the GPU afterwards"
SIDE_TIP = "In pixels; rounded down to a multiple of 16, or of 32 for the 5B model"
FRAMES_TIP = "4n+1 frames; 81 are what most models were trained on"
_SIDE = {"min": 64, "max": 8096, "step": 8, "tooltip": SIDE_TIP}
# The inputs of a node that chooses the size of a video.
VIDEO_SIZE = {
    "width": ("INT", {"default": 832, **_SIDE}),
    "height": ("INT", {"default": 480, **_SIDE}),
    "num_frames": ("INT", {"default": 81, "min": 1, "max": 10000, "step": 4, "tooltip": FRAMES_TIP}),
}
SIZE_STEP = 16
IN_ORDER = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Kinds of the widget of a text encoder.
TEXT_ENCODERS = ("text_encoders", "text_encoders_gguf")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp16_fast": torch.float16,
}


def files(*kinds: str, first: Sequence[str] = ()) -> ModelFiles:
    """Names of the model files of these kinds, for a widget. first: options that are no files."""
    host = get_host()
    names = [name for kind in kinds for name in host.list_files(kind)]
    folder = KINDS[kinds[0]][0]
    # ComfyUI lists files once, until R is pressed.
    place = f"models/{folder} and press R" if host.name == "comfyui" else str(host.models_dir(kinds[0]))
    return ModelFiles([*first, *names], default=first[0] if first else None, folder=folder, place=place)


def find_model(name: str) -> Path:
    """A transformer or module file by its widget name."""
    kind = "unet_gguf" if name.lower().endswith(".gguf") else "diffusion_models"
    return get_host().find_file(kind, name)


def find_text_encoder(name: str) -> Path:
    """A text encoder file by its widget name."""
    kind = "text_encoders_gguf" if name.lower().endswith(".gguf") else "text_encoders"
    return get_host().find_file(kind, name)


def reject(node: str, options: Mapping[str, object]) -> None:
    """Raise ValueError for the first option that is set although this version does not have it."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"The input '{name}' of '{node}' is not available in this version; disconnect it.")


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of the widget `name`, counted from 0 and separated by commas; none for an empty text.

    Raises ValueError for anything else.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{name} must be whole numbers from 0 on, separated by commas, like 9, 10; not '{text}'.")
    return tuple(map(int, parts))


def round_size(width: int, height: int, vae: WanVAE | None = None) -> tuple[int, int]:
    """Sides rounded down to what models with this VAE can run, and says so where that changes them.

    Multiples of 16, or of 32 with the 2.2 VAE of the 5B model: a token is two latents wide. Without a VAE 16: which
    model samples is not known, and the sampler rounds once more for the 5B. Raises ValueError for sides without pixels.
    """
    if min(width, height) < 1:
        raise ValueError(f"A video cannot be {width}x{height} pixels large: set both sides, or look what is linked.")
    step = SIZE_STEP if vae is None else LATENTS_A_TOKEN * vae.spatial_factor
    rounded = (max(width // step, 1) * step, max(height // step, 1) * step)
    if rounded != (width, height):
        log.info("%dx%d is rounded to %dx%d: sides must divide by %d.", width, height, *rounded, step)
    return rounded


def whole_frames(num_frames: int) -> int:
    """The largest 4n+1 that is not more; says so where that changes it."""
    rounded = round_frames(num_frames)
    if rounded != num_frames:
        log.info("%d frames are rounded to %d: the VAE works in 4n+1 frames.", num_frames, rounded)
    return rounded


def mappings(*nodes: type) -> tuple[dict[str, type], dict[str, str]]:
    """What ComfyUI reads of a node module: classes and display names, by class name.

    A node without a DESCRIPTION shows the first line of its docstring. Its lists take what older graphs hold.
    """
    for node in nodes:
        node.DESCRIPTION = getattr(node, "DESCRIPTION", "") or inspect.getdoc(node).splitlines()[0]
        _finish_interface(node)
    return {node.__name__: node for node in nodes}, {node.__name__: node.DISPLAY_NAME for node in nodes}


def _finish_interface(node: type) -> None:
    """Give inputs the tooltips that nodes share; let list widgets take older names, and the entry get today's.

    The entry is not called with numbers that no run can use, and gets what links bring in one form; what it gives goes
    where other nodes look for it. Nodes of other packs call it, too: in the order of the original's parameters, which
    is the same here, or by names that it had.
    """
    declare, entry = node.INPUT_TYPES, getattr(node, node.FUNCTION)
    order = [each.name for each in inspect.signature(entry).parameters.values() if each.kind is IN_ORDER][1:]

    @functools.wraps(entry)
    def run(self: object, *values: object, **named: object) -> object:
        declared = node.INPUT_TYPES()
        named = renamed_inputs(node, _by_name(order, values, named, node.DISPLAY_NAME), node.DISPLAY_NAME)
        refuse_unusable(declared, named, node.DISPLAY_NAME)
        named = in_form(declared, current_values(declared, named, node.DISPLAY_NAME), node.DISPLAY_NAME)
        results = entry(self, **named)
        return placed(node.RETURN_TYPES, results, get_host().results_device(), node.DISPLAY_NAME)

    node.INPUT_TYPES = classmethod(lambda cls: tolerant(with_tips(declare.__func__(cls))))
    setattr(node, node.FUNCTION, run)


def _by_name(
    order: Sequence[str], values: Sequence[object], named: Mapping[str, object], node: str
) -> dict[str, object]:
    """The values of a call by their names. Raises TypeError for more in order than there are, and for one given twice.

    order: the names. node: for messages.
    """
    if len(values) > len(order):
        raise TypeError(
            f"{node} takes {len(order)} values in order ({', '.join(order)}), not {len(values)}: give the others by "
            "name."
        )
    in_order = dict(zip(order, values, strict=False))
    if twice := sorted(in_order.keys() & named.keys()):
        raise TypeError(f"{node} got '{twice[0]}' twice, in order and by name: give it once.")
    return in_order | named
