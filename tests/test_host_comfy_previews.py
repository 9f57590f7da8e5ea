"""Previews in ComfyUI: by its own previewer or by another pack's, which may fail without the run."""

import sys
from types import ModuleType

import pytest
import torch
from wanvideo_wrapper.host.comfy import ComfyProgress

LATENTS = torch.randn(16, 5, 4, 6, generator=torch.Generator().manual_seed(1))


class Bar:
    """As much of ComfyUI's progress bar as is used."""

    def __init__(self, total):
        self.seen = []

    def update_absolute(self, done, total, picture):
        self.seen.append((done, picture))


class Previewer:
    """Shows what it gets."""

    def decode_latent_to_preview_image(self, kind, latents):
        return kind, latents, 512


@pytest.fixture
def preview(monkeypatch):
    """Stands in for ComfyUI's module of that name; `made` are the forms that previewers were asked for."""
    preview, formats, utils = map(ModuleType, ("latent_preview", "comfy.latent_formats", "comfy.utils"))
    formats.Wan21, formats.Wan22, utils.ProgressBar = lambda: "2.1", lambda: "2.2", Bar
    comfy = ModuleType("comfy")
    comfy.latent_formats, comfy.utils = formats, utils
    for module in (preview, formats, utils, comfy):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    preview.made, preview.previewer = [], Previewer()

    def get_previewer(device, form):
        preview.made.append((device, form))
        return preview.previewer

    preview.get_previewer = get_previewer
    return preview


def shown(latents=LATENTS, steps=3):
    """What the bar gets in so many steps."""
    progress = ComfyProgress(steps, "Sampling")
    for step in range(1, steps + 1):
        progress.update(step, preview=latents)
    assert [done for done, _ in progress._bar.seen] == list(range(1, steps + 1))
    return [picture for _, picture in progress._bar.seen]


@pytest.mark.parametrize(("channels", "form"), [(16, "2.1"), (48, "2.2")])
def test_a_previewer_is_made_once_a_run_for_the_kind_of_latents(preview, channels, form):
    shown(torch.randn(channels, 5, 4, 6))
    assert preview.made == [(torch.device("cpu"), form)]


def test_other_packs_get_the_whole_video_and_comfyuis_own_the_middle_frame(preview, monkeypatch):
    for kind, latents, size in shown():
        assert (kind, size) == ("JPEG", 512) and torch.equal(latents, LATENTS[None])
    monkeypatch.setattr(Previewer, "__module__", "latent_preview")
    assert all(torch.equal(latents, LATENTS[None, :, 2:3]) for _, latents, _ in shown())


def test_without_a_previewer_there_are_no_pictures(preview):
    preview.previewer = None
    assert shown() == [None] * 3 and len(preview.made) == 1


def test_a_previewer_that_fails_costs_its_pictures_alone_and_is_told_once(preview, caplog):
    class Failing:
        def decode_latent_to_preview_image(self, kind, latents):
            raise ValueError("not enough values to unpack (expected 5, got 4)")

    preview.previewer = Failing()
    assert shown() == [None] * 3
    (line,) = caplog.messages
    assert "ValueError: not enough values to unpack" in line and "another preview method" in line
