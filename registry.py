"""All conditioning systems, in the order in which their hooks run. A new system adds its folder and one row here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from .unbuilt import UNBUILT_KEYS
from .wanvideo.schedulers import add_methods
from .wanvideo.systems import Systems

# Folders with `extension.py` (its class under the name EXTENSION), `nodes.py`, `prompts.py` (a way to write several
# prompts as one: `split`, None where the text is not written that way, and `payloads` of the embedded parts), or
# `schedules.py` (SCHEDULES: rows of the scheduler's options). Ovi, whose sound ends the sequence, appends last.
FOLDERS = (
    "longcat",
    "diffusion_forcing",
    "echoshot",
    "prompt_segments",
    "bindweave",
    "nag",
    "scail",
    "fun_control",
    "unilumos",
    "ati",
    "image_to_video",
    "wanmove",
    "svi",
    "steadydancer",
    "lucy_edit",
    "realisdance",
    "minimax_remover",
    "fun_camera",
    "clip_image",
    "longcat_avatar",
    "multitalk",
    "mtv_crafter",
    "humo",
    "fantasytalking",
    "fantasyportrait",
    "s2v",
    "animate",
    "enhance_a_video",
    "uni3c",
    "recammaster",
    "unianimate",
    "controlnet",
    "phantom",
    "mocha",
    "vace",
    "stand_in",
    "slg",
    "freeinit",
    "pusa",
    "vibt",
    "time_to_move",
    "video_loop",
    "experimental",
    "flashvsr",
    "longvie2",
    "one_to_all",
    "story_mem",
    "lynx",
    "ovi",
)


def _modules(name: str) -> tuple[str, ...]:
    """The modules of this name that the folders have."""
    have = (folder for folder in FOLDERS if (Path(__file__).parent / folder / f"{name}.py").is_file())
    return tuple(f"{__package__}.{folder}.{name}" for folder in have)


NODE_MODULES = _modules("nodes")
PROMPT_FORMS = tuple(import_module(path) for path in _modules("prompts"))
for _path in _modules("schedules"):
    add_methods(import_module(_path).SCHEDULES)
SYSTEMS = Systems(
    extensions=tuple(import_module(path).EXTENSION for path in _modules("extension")),
    keys=UNBUILT_KEYS,
)
