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


def test_a_model_stays_with_the_device_that_it_was_loaded_for(asked):
    """ComfyUI-MultiGPU lets ComfyUI name the device of the node that came last."""
    managed = ComfyManaged(nn.Linear(4, 4), asked.host, lambda device: None, None)
    asked.management.get_torch_device = lambda: torch.device("meta")
    assert managed.acquire() == CPU
    assert ComfyManaged(nn.Linear(4, 4), asked.host, lambda device: None, None).acquire().type == "meta"


@pytest.mark.parametrize(("state", "mode"), [("NORMAL_VRAM", "normal"), ("LOW_VRAM", "low"), ("NO_VRAM", "none")])
def test_options_for_little_memory(asked, state, mode):
    asked.management.vram_state = States[state]
    assert asked.host.memory_mode() == mode and asked.host.reserved_memory() == 500_000_000


class Newer(Patcher):
    """What ComfyUI asks of a ModelPatcher since it has dynamic VRAM; this one is not dynamic."""

    def is_dynamic(self):
        return False

    def loaded_size(self):
        return self.model.model_loaded_weight_memory


class Dynamic(Newer):
    """One of ComfyUI's own, which gives back as many bytes as are asked for."""

    def __init__(self, size):
        super().__init__(nn.Module(), CPU, CPU)
        self.size, self.model.model_loaded_weight_memory = size, size

    def is_dynamic(self):
        return True

    def partially_unload(self, device, size):
        freed = min(size, self.loaded_size())
        self.model.model_loaded_weight_memory -= freed
        return freed


@pytest.fixture
def paging(asked, monkeypatch):
    """ComfyUI with dynamic VRAM: a GPU of 1000 bytes, where models that are not dynamic make dynamic ones give back."""
    management, total = asked.management, 1000
    loaded = management.current_loaded_models

    def unload(patcher, needed):
        """As LoadedModel.model_unload: by parts where that is enough, else all of it."""
        if needed >= patcher.loaded_size() or patcher.partially_unload(patcher.offload_device, needed) < needed:
            patcher.detach(True)
            loaded[:] = [entry for entry in loaded if entry.model is not patcher]

    def free():
        return total - sum(entry.model.loaded_size() for entry in loaded)

    def load(models, memory_required=0, force_full_load=False):
        (patcher,) = models
        needed = memory_required + (patcher.size if patcher.is_dynamic() else patcher.model_size())
        for entry in [entry for entry in loaded if entry.model is not patcher]:
            missing = needed - free()
            if missing > 0 and not (patcher.is_dynamic() and entry.model.is_dynamic()):
                unload(entry.model, missing)
        if not patcher.is_dynamic():
            patcher.partially_load(CPU)
        if all(entry.model is not patcher for entry in loaded):
            loaded.append(SimpleNamespace(model=patcher, model_unload=lambda: patcher.detach(True)))

    patching = sys.modules["comfy.model_patcher"]
    patching.ModelPatcher, patching.ModelPatcherDynamic, patching.CoreModelPatcher = Newer, Dynamic, Dynamic
    management.load_models_gpu = load
    return SimpleNamespace(load=load, free=free, loaded=loaded, host=asked.host)


def test_with_dynamic_vram_pages_of_others_make_room_for_ours(paging):
    other, moves = Dynamic(900), []
    paging.load([other])
    managed = ComfyManaged(nn.Linear(4, 4), paging.host, moves.append, lambda: 300)
    assert not managed._patcher.is_dynamic()
    managed.acquire(200)
    assert other.loaded_size() == 500 and paging.free() == 200 and moves == [CPU]
    managed.release()
    assert [entry.model for entry in paging.loaded] == [other] and moves == [CPU] * 2


def test_with_dynamic_vram_ours_leave_as_a_whole_and_come_back(paging):
    moves = []
    managed = ComfyManaged(nn.Linear(4, 4), paging.host, moves.append, lambda: 300)
    managed.acquire()
    arriving = Dynamic(800)
    paging.load([arriving])
    assert len(moves) == 2 and [entry.model for entry in paging.loaded] == [arriving] and paging.free() == 200
    managed.acquire()
    assert arriving.loaded_size() == 700 and len(moves) == 3 and len(paging.loaded) == 2
    managed.release()
    managed.release()
    assert len(moves) == 4, "What has left already is not moved again."
