"""A module file may hold a model of the system's own beside what the transformer reads of it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.families import Kind
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.systems import Systems


@dataclass(frozen=True)
class First(Extension):
    file: ClassVar[Kind] = Kind("first module", "", (r"^first$",), own=("beside.", "another."))

    @classmethod
    def detect(cls, shapes):
        return cls() if "first" in shapes else None

    def owns(self, key):
        return key == "first"

    def build(self, model):
        model.first = torch.nn.Parameter(torch.zeros(3))


@dataclass(frozen=True)
class Second(Extension):
    file: ClassVar[Kind] = Kind("second module", "", (r"^second$",), own=("beside.",))

    @classmethod
    def detect(cls, shapes):
        return cls() if "second" in shapes else None

    def owns(self, key):
        return key == "second"

    def build(self, model):
        model.second = torch.nn.Parameter(torch.zeros(3))


def test_the_transformer_reads_its_part_alone(tmp_path):
    """Both files have a model of their own under the same name, which would be one tensor twice."""
    tiny.transformer(in_dim=16).save(tmp_path / "t2v.safetensors")
    values = {name: torch.randn(3) for name in ("first", "second")}
    first = {"first": values["first"], "beside.weight": torch.randn(2), "another.weight": torch.randn(2)}
    tiny.Tiny(tensors=first).save(tmp_path / "first.safetensors", torch.float32)
    second = {"second": values["second"], "beside.weight": torch.randn(4)}
    tiny.Tiny(tensors=second).save(tmp_path / "second.safetensors", torch.float32)
    modules = (ModuleFile(tmp_path / "first.safetensors"), ModuleFile(tmp_path / "second.safetensors"))
    model = load_wan_model(
        tmp_path / "t2v.safetensors",
        LoadOptions(base_dtype=torch.float32, modules=modules),
        StandaloneHost(device="cpu"),
        Systems(extensions=(First, Second)),
    )
    assert not model.report.unused
    for name, value in values.items():
        assert torch.equal(getattr(model.transformer, name), value)
