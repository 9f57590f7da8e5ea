"""What ComfyUI's memory management is told: how much of a model comes, what it computes with, what to leave alone."""

import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from wanvideo_wrapper.host.comfy import ComfyHost, ComfyManaged

CPU = torch.device("cpu")


class Patcher:
    """As much of ComfyUI's ModelPatcher as its memory management asks for."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        model.model_loaded_weight_memory = 0

    def model_size(self):
        return sum(p.nbytes for p in self.model.parameters())


class States(enum.Enum):
    NORMAL_VRAM, LOW_VRAM, NO_VRAM = range(3)


@pytest.fixture
def asked(monkeypatch):
    """Stands in for ComfyUI: notes what was asked of `load_models_gpu`, and loads."""
    calls, management, patching = [], ModuleType("comfy.model_management"), ModuleType("comfy.model_patcher")

    def load(models, memory_required=0, force_full_load=False):
        calls.append((models[0].model_size(), memory_required))
        models[0].partially_load(CPU)
        management.current_loaded_models.append(
            SimpleNamespace(model=models[0], model_unload=lambda: models[0].detach())
        )

    management.load_models_gpu, management.current_loaded_models = load, []
    management.extra_reserved_memory, management.soft_empty_cache = lambda: 5.0e8, lambda: None
    management.get_torch_device = management.unet_offload_device = lambda: CPU
    management.VRAMState, management.vram_state = States, States.NORMAL_VRAM
    patching.ModelPatcher = Patcher
    comfy = ModuleType("comfy")
    comfy.model_management, comfy.model_patcher = management, patching
    for module in (comfy, management, patching):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(calls=calls, management=management, host=object.__new__(ComfyHost))


def test_room_is_made_for_what_comes_and_for_what_it_computes(asked):
    moves, sizes = [], [100]
    managed = ComfyManaged(nn.Linear(4, 4), asked.host, moves.append, lambda: sizes[0])
    assert managed.acquire(70) == CPU
    sizes[0] = 40
    managed.acquire(90)
    assert asked.calls == [(100, 70), (40, 90)]
    managed.release()
    assert moves == [CPU] * 3 and not asked.management.current_loaded_models


def test_a_model_that_does_not_say_comes_whole(asked):
    ComfyManaged(nn.Linear(4, 4), asked.host, None, None).acquire()
    assert asked.calls == [(80, 0)]


@pytest.mark.parametrize(("state", "mode"), [("NORMAL_VRAM", "normal"), ("LOW_VRAM", "low"), ("NO_VRAM", "none")])
def test_options_for_little_memory(asked, state, mode):
    asked.management.vram_state = States[state]
    assert asked.host.memory_mode() == mode and asked.host.reserved_memory() == 500_000_000
