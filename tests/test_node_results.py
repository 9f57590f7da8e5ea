"""Pictures and masks that a node gives lie where ComfyUI's own nodes leave theirs."""

import logging

import pytest
import torch
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.node_results import placed
from wanvideo_wrapper.node_tools import mappings

KINDS = ("IMAGE", "INT", "MASK", "LATENT", "SIGMAS")
AWAY = torch.device("meta")


def results():
    return torch.rand(2, 4, 4, 3), 7, torch.rand(2, 4, 4), {"samples": torch.rand(1, 16, 1, 2, 2)}, torch.rand(3)


def test_pictures_and_masks_go_there_and_nothing_else():
    given = results()
    picture, number, mask, latents, sigmas = placed(KINDS, given, AWAY, "Node")
    assert (picture.device.type, picture.shape) == ("meta", given[0].shape)
    assert (mask.device.type, mask.shape) == ("meta", given[2].shape)
    assert number == 7 and latents is given[3] and sigmas is given[4]
    assert placed(KINDS, given, torch.device("cpu"), "Node") is given
    shown = {"ui": {}, "result": given}
    assert placed(KINDS, shown, AWAY, "Node") is shown
    assert placed(("IMAGE", "MASK"), (None, given[2]), AWAY, "Node")[0] is None


def test_without_room_they_stay_and_a_line_says_so(caplog, monkeypatch):
    class Full(torch.Tensor):
        def to(self, device):
            raise torch.OutOfMemoryError("full")

    with caplog.at_level(logging.WARNING, "wanvideo"):
        (got,) = placed(("IMAGE",), (torch.rand(2, 4, 4, 3).as_subclass(Full),), AWAY, "WanVideo Decode")
    assert got.shape == (2, 4, 4, 3) and got.device.type == "cpu"
    assert "What WanVideo Decode gives stays in main memory" in caplog.text


class ElsewhereHost(StandaloneHost):
    def results_device(self):
        return AWAY


@pytest.fixture
def elsewhere():
    before = get_host()
    set_host(ElsewhereHost(device="cpu"))
    yield
    set_host(before)


def test_every_node_leaves_them_there(elsewhere):
    class Gives:
        """Gives a picture."""

        RETURN_TYPES, FUNCTION, DISPLAY_NAME = ("IMAGE",), "run", "Gives"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self):
            return (torch.rand(1, 4, 4, 3),)

    classes, _ = mappings(Gives)
    assert classes["Gives"]().run()[0].device.type == "meta"
