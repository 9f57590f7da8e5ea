"""WanVideo nodes for ComfyUI, and the package `wanvideo_wrapper`.

One family of nodes that fails to import never hides another. Test tools import this file without a package; then
nothing is registered.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from types import ModuleType

log = logging.getLogger("wanvideo")

FAMILIES = (
    ".nodes",
    ".nodes_prompt",
    ".nodes_text",
    ".nodes_model_loading",
    ".nodes_model_options",
    ".nodes_lora",
    ".nodes_memory",
    ".nodes_gpus",
    ".nodes_attention",
    ".nodes_schedule",
    ".nodes_sampler",
    ".nodes_utility",
    ".nodes_latents",
    ".nodes_pictures",
    ".nodes_deprecated",
    ".nodes_demo",
    ".nodes_doctor",
    ".cache_methods.nodes_cache",
)
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"


def _copy_loaded_before() -> ModuleType | None:
    """This package where another pack, or ComfyUI, has imported it under another name."""
    for name, module in list(sys.modules.items()):
        # Past its own __getattr__, at which a module that waits to be loaded is, and may fail.
        parts = object.__getattribute__(module, "__dict__") if isinstance(module, ModuleType) else {}
        if name != __name__ and parts.get("__file__") == __file__ and parts.get("NODE_CLASS_MAPPINGS"):
            return module
    return None


def _share(copy: ModuleType) -> None:
    """Use its modules under this name, too: a second set of classes would not know the objects of the first."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{copy.__name__}."):
            sys.modules[__name__ + name.removeprefix(copy.__name__)] = module
    NODE_CLASS_MAPPINGS.update(copy.NODE_CLASS_MAPPINGS)
    NODE_DISPLAY_NAME_MAPPINGS.update(copy.NODE_DISPLAY_NAME_MAPPINGS)


def _of_the_original(module: str, name: str) -> object:
    """What other packs look up in the original's modules: any node, and where it computes.

    ComfyUI-MultiGPU sets the devices, too. Nothing reads them here: it also lets ComfyUI itself name the device.
    """
    if name in ("device", "offload_device"):
        return getattr(_host.get_host(), name)()
    if name in NODE_CLASS_MAPPINGS:
        return NODE_CLASS_MAPPINGS[name]
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _register(family: str) -> None:
    try:
        module = importlib.import_module(family, package=__package__)
    except Exception as error:
        log.warning("The nodes of %s are not available: %s: %s.", family.lstrip("."), type(error).__name__, error)
        return
    NODE_CLASS_MAPPINGS.update(module.NODE_CLASS_MAPPINGS)
    NODE_DISPLAY_NAME_MAPPINGS.update(module.NODE_DISPLAY_NAME_MAPPINGS)
    module.__getattr__ = functools.partial(_of_the_original, module.__name__)


if __package__ and (_copy := _copy_loaded_before()):
    _share(_copy)
elif __package__:
    _host, _saved = (importlib.import_module(name, package=__package__) for name in (".host", ".saved_values"))
    for _family in (*FAMILIES, *importlib.import_module(".registry", package=__package__).NODE_MODULES):
        _register(_family)
    for _change in (_saved.take_renamed_inputs, _saved.take_defaults):
        _host.before_queuing(functools.partial(_change, classes=NODE_CLASS_MAPPINGS))
    _host.before_queuing(
        lambda prompt: _saved.take_moved_files(prompt, _host.classes_of_all_packs(), NODE_CLASS_MAPPINGS)
    )
    _host.enter_comfyui()
    _host.warn_about_copies()
