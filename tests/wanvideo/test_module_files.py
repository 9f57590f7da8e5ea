"""Module files are told apart, and measured against the model, before anything is loaded."""

from dataclasses import replace

import pytest
import torch
from fantasy_models import talking_module
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk.extension import MultiTalk
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model


def load(folder, module, layers, kind=MultiTalk.file):
    tiny.transformer(in_dim=36, layers=layers).save(folder / "base.safetensors")
    module.save(folder / "module.safetensors")
    modules = (ModuleFile(folder / "module.safetensors", kind),)
    options = LoadOptions(base_dtype=torch.float32, modules=modules)
    return load_wan_model(folder / "base.safetensors", options, StandaloneHost(device="cpu"), SYSTEMS)


def test_a_module_of_a_larger_model(tmp_path):
    module = talking_module(layers=3)
    assert load(tmp_path, module, 3, None).config.num_layers == 3
    with pytest.raises(ValueError, match=r"^module.safetensors belongs .* at least 3 blocks, but the chosen one has 2"):
        load(tmp_path, module, 2, None)


def test_a_module_that_does_not_fit_is_named_and_not_the_model(tmp_path):
    module = talking_module()
    cut = next(key for key in module.tensors if key.startswith("blocks.1."))
    with pytest.raises(ValueError, match=rf"^base.safetensors with module.safetensors lacks 1 of .* '{cut}': one of"):
        load(tmp_path, replace(module, tensors={k: v for k, v in module.tensors.items() if k != cut}), 3, None)
    wide = {key: torch.randn(3, 5) if key == cut else value for key, value in module.tensors.items()}
    with pytest.raises(ValueError, match=rf"^module.safetensors: '{cut}' has the shape \(3, 5\) where"):
        load(tmp_path, replace(module, tensors=wide), 3, None)


def test_a_module_of_another_system(tmp_path):
    with pytest.raises(ValueError, match=r"^module.safetensors is a FantasyTalking module, not a MultiTalk"):
        load(tmp_path, talking_module(), 3)
