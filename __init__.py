"""WanVideo nodes for ComfyUI, and the package `wanvideo_wrapper`.

One family of nodes that fails to import never hides another. Test tools import this file without a package; then
nothing is registered.
"""

from __future__ import annotations

import functools
import importlib
import logging

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


def _register(family: str) -> None:
    try:
        module = importlib.import_module(family, package=__package__)
    except Exception as error:
        log.warning("The nodes of %s are not available: %s: %s.", family.lstrip("."), type(error).__name__, error)
        return
    NODE_CLASS_MAPPINGS.update(module.NODE_CLASS_MAPPINGS)
    NODE_DISPLAY_NAME_MAPPINGS.update(module.NODE_DISPLAY_NAME_MAPPINGS)


if __package__:
    for _family in (*FAMILIES, *importlib.import_module(".registry", package=__package__).NODE_MODULES):
        _register(_family)
    _host, _saved = (importlib.import_module(name, package=__package__) for name in (".host", ".saved_values"))
    for _change in (_saved.take_renamed_inputs, _saved.take_defaults):
        _host.before_queuing(functools.partial(_change, classes=NODE_CLASS_MAPPINGS))
    _host.before_queuing(
        lambda prompt: _saved.take_moved_files(prompt, _host.classes_of_all_packs(), NODE_CLASS_MAPPINGS)
    )
    _host.enter_comfyui()
    _host.warn_about_copies()
