"""Module files are told apart, and measured against the model, before anything is loaded."""

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


def test_a_module_of_another_system(tmp_path):
    with pytest.raises(ValueError, match=r"^module.safetensors is a FantasyTalking module, not a MultiTalk"):
        load(tmp_path, talking_module(), 3)
