"""Where the pack runs: inside ComfyUI, or on its own (command line, tests). Everything asks `get_host()`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .comfy import ComfyHost
from .protocol import CancelledError, Host, Managed, Place, Progress
from .standalone import StandaloneHost

__all__ = [
    "CancelledError", "ComfyHost", "Host", "Managed", "Place", "Progress", "StandaloneHost", "get_host", "set_host",
    "before_queuing", "classes_of_all_packs", "enter_comfyui", "warn_about_copies",
]  # fmt: skip

log = logging.getLogger("wanvideo")

# Of this pack, the original and its forks.
OWN_FILES = ("__init__.py", "nodes_model_loading.py", "nodes_sampler.py", "fp8_optimization.py")

_current: Host | None = None


def get_host() -> Host:
    """The host: ComfyUI's where ComfyUI is the process, else a StandaloneHost with its defaults."""
    if _current is None:
        set_host(ComfyHost() if _inside_comfyui() else StandaloneHost())
    return _current


def _inside_comfyui() -> bool:
    return "folder_paths" in sys.modules and "comfy.model_management" in sys.modules


def enter_comfyui() -> None:
    """Inside ComfyUI, name this pack's folders to it before it lists any node.

    It reads a folder once for a whole answer to the front end, and its own nodes come first: named later, the files of
    this pack would be missing from the lists, and their nodes red, until the user asks for the lists again.
    """
    if _inside_comfyui():
        get_host()


def set_host(host: Host) -> None:
    """Choose the host, before any model is loaded."""
    global _current
    _current = host


def before_queuing(change: Callable[[object], None]) -> None:
    """Let `change` edit each prompt (API form) that is posted to ComfyUI's server, before the server judges it."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if "folder_paths" not in sys.modules or server is None:
        return

    def edit(posted: dict[str, object]) -> dict[str, object]:
        change(posted.get("prompt"))
        return posted

    server.add_on_prompt_handler(edit)


def classes_of_all_packs() -> Mapping[str, type]:
    """ComfyUI's table of nodes by class name, those of other packs too; empty outside ComfyUI."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def warn_about_copies() -> None:
    """Say so where ComfyUI has a second copy of these nodes, which would take turns with this one."""
    if "folder_paths" not in sys.modules:
        return
    here = Path(__file__).resolve().parents[1]
    for folder in sys.modules["folder_paths"].get_folder_paths("custom_nodes"):
        for other in copies_in(Path(folder), here):
            log.warning("%s holds another copy of the WanVideo nodes; remove or disable one of the two.", other)


def copies_in(folder: Path, here: Path) -> list[Path]:
    """Packs in a custom_nodes folder that register these nodes too, told by their files: folders have any name.

    ComfyUI's list of such folders may name one that does not exist, as extra_model_paths.yaml wrote it.
    """
    packs = (path for path in sorted(folder.glob("*")) if not path.name.endswith(".disabled"))
    return [pack for pack in packs if pack.resolve() != here and all((pack / name).is_file() for name in OWN_FILES)]
