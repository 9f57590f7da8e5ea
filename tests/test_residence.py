"""Weights on a device and back: what was in main memory is still there, and what changed on the device is kept."""

import pytest
import torch
from swap_stand_in import DEVICE
from torch import nn
from wanvideo_wrapper.host import residence
from wanvideo_wrapper.host.residence import ModuleResidence, Residence, tensors_of

CPU = torch.device("cpu")
PLACES = [DEVICE, pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def copies(monkeypatch, request):
    """Another name for the CPU gets copies, as a device would."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(residence.Staging, "copy", lambda self, source: source.clone())


def module():
    made = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    made[1].running_mean.normal_()
    return made.requires_grad_(False)


@pytest.mark.parametrize("inference", [False, True], ids=["", "in ComfyUI's mode"])
@pytest.mark.parametrize("device", PLACES)
def test_leaving_a_device_copies_nothing(device, inference):
    with torch.inference_mode(inference):
        leave_a_device(device)


@pytest.mark.autograd
@pytest.mark.parametrize("made", [False, True])
def test_weights_may_move_in_another_mode_than_they_were_made_in(made):
    with torch.inference_mode(made):
        model = module()
    with torch.inference_mode(not made):
        leave_a_device(DEVICE, model)


def leave_a_device(device, model=None):
    model = model or module()
    before = [(tensor, tensor.data_ptr(), tensor.clone()) for tensor in tensors_of(model)]
    place = ModuleResidence(model)
    for _ in range(2):
        place(device)
        assert all(tensor.data_ptr() != address for tensor, address, _ in before if tensor.numel())
        assert all(tensor.device.type == device.type for tensor, _, _ in before)
        assert all(torch.equal(tensor.cpu(), value) for tensor, _, value in before)
        place(CPU)
        assert all(tensor.data_ptr() == address for tensor, address, _ in before)
    assert [id(tensor) for tensor in tensors_of(model)] == [id(tensor) for tensor, _, _ in before]
    assert all(torch.equal(tensor, value) for tensor, _, value in before)


@pytest.mark.autograd
@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("how", ["in place", "replaced", "made there", "forgotten"])
def test_what_changed_on_the_device_is_copied_back(how, device):
    change_on_a_device(how, device)


def change_on_a_device(how, device):
    weight = nn.Parameter(torch.randn(7), requires_grad=False)
    # Held, so that nothing else gets its memory.
    home, keeper, new = weight.data, Residence(), torch.randn(7)
    keeper.move([weight], device)
    if how == "in place":
        weight.copy_(new)
    elif how == "replaced":
        weight.data = new.to(device, copy=True)
    elif how == "made there":
        weight = nn.Parameter(new.to(device, copy=True), requires_grad=False)
    else:
        new = weight.cpu().clone()
        keeper.forget()
    keeper.move([weight], CPU)
    assert weight.device == CPU and weight.data_ptr() != home.data_ptr() and torch.equal(weight, new)


@pytest.mark.parametrize("how", ["replaced", "made there", "forgotten"])
def test_what_changed_in_inference_mode_is_copied_back(how):
    with torch.inference_mode():
        change_on_a_device(how, DEVICE)


@pytest.mark.parametrize("device", PLACES)
def test_a_second_stay_brings_what_main_memory_has_by_then(device):
    weight, keeper = nn.Parameter(torch.randn(7), requires_grad=False), Residence()
    keeper.move([weight], device)
    keeper.move([weight], CPU)
    weight.add_(1)
    want = weight.clone()
    keeper.move([weight], device)
    assert torch.equal(weight.cpu(), want)
