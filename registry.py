"""All conditioning systems, in the order in which their hooks run. A new system adds its folder and one row here."""

from __future__ import annotations

from collections.abc import Iterable
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


HERE = Path(__file__).parent


def refuse_other_spellings(names: Iterable[str]) -> None:
    """Raises ImportError where one of the folders is spelled as in the original pack. names: of all that are there.

    Where a file system ignores case, files that are put over the original's go into its folders, under their names; but
    Python imports by the exact name.
    """
    there = set(names)
    other = sorted(name for name in there if name.lower() in FOLDERS and name.lower() not in there)
    if other:
        raise ImportError(
            f"This pack was put over the original one, whose folders {', '.join(other)} stayed: delete {HERE} as a "
            "whole, and install this pack anew."
        )


def _modules(name: str) -> tuple[str, ...]:
    """The modules of this name that the folders have."""
    have = (folder for folder in FOLDERS if (HERE / folder / f"{name}.py").is_file())
    return tuple(f"{__package__}.{folder}.{name}" for folder in have)


refuse_other_spellings(path.name for path in HERE.iterdir())
NODE_MODULES = _modules("nodes")
PROMPT_FORMS = tuple(import_module(path) for path in _modules("prompts"))
for _path in _modules("schedules"):
    add_methods(import_module(_path).SCHEDULES)
SYSTEMS = Systems(
    extensions=tuple(import_module(path).EXTENSION for path in _modules("extension")),
    keys=UNBUILT_KEYS,
)
