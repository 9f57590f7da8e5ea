"""Models of a system's own: told by their kind, filled, quantized where asked, brought to the device for their turn."""

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, quantize_rows
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.families import Kind
from wanvideo_wrapper.wanvideo.fingerprint import digest
from wanvideo_wrapper.wanvideo.own_model import BesideModel, OwnModel, load_own, open_own
from wanvideo_wrapper.wanvideo.quantization import Plan
from wanvideo_wrapper.wanvideo.systems import Systems

CPU = torch.device("cpu")
KIND = Kind("toy model", "Toy Loader", (r"^toy\.inner\.weight$",), whole=True)


class Toy(Extension):
    file: ClassVar[Kind] = KIND

    @classmethod
    def detect(cls, shapes):
        return None


TOYS = Systems(extensions=(Toy, *SYSTEMS.extensions))


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.toy = nn.Module()
        self.toy.inner, self.toy.outer = nn.Linear(32, 16), nn.Linear(16, 8)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    tensors = {k: torch.randn(v.shape) for k, v in ToyModel().state_dict().items()}
    save_file(tensors, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def load(path, plan_of=lambda name: None, dtype=torch.float32):
    with torch.device("meta"):
        model = ToyModel()
    checkpoint = open_own(path, KIND, TOYS)
    host = StandaloneHost(device="cpu")
    managed = load_own(model, checkpoint, what=KIND.name, plan_of=plan_of, dtype_of=lambda name: dtype, host=host)
    return checkpoint, OwnModel(path, ("fp32",), managed)


def test_it_holds_what_the_file_holds(path):
    checkpoint, model = load(path)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, checkpoint.tensor(name))
    assert load(path, dtype=torch.bfloat16)[1].module.toy.inner.weight.dtype == torch.bfloat16


def test_layers_with_a_plan_are_quantized(path):
    plan = Plan(convert="fp8_e4m3fn", fast=False, device=CPU, base=torch.float32)
    checkpoint, model = load(path, lambda name: plan if name == "toy.inner" else None)
    assert isinstance(model.module.toy.inner, Fp8Linear) and type(model.module.toy.outer) is nn.Linear
    values, scale = quantize_rows(checkpoint.tensor("toy.inner.weight"), torch.float8_e4m3fn)
    torch.testing.assert_close(model.module.toy.inner.expanded(torch.float32), values.float() * scale)


def test_other_kinds_of_files_are_named(path, tmp_path):
    tiny.transformer(in_dim=16).save(tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="is a Wan transformer, not a toy model; load it with 'WanVideo Model Loader'"):
        open_own(tmp_path / "wan.safetensors", KIND, TOYS)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="an unknown kind of file, not a toy model; choose another file"):
        open_own(tmp_path / "x.safetensors", KIND, TOYS)
    save_file({"toy.inner.weight": torch.ones(16, 32)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="lacks 3 of the 4 tensors of a toy model"):
        load(tmp_path / "part.safetensors")


class Watched:
    def __init__(self, module):
        self.module, self.events = module, []

    def acquire(self):
        self.events.append("acquire")

    def release(self):
        self.events.append("release")


def test_it_is_held_inside_and_released_after_a_failure(path):
    watched, turns = Watched(ToyModel()), SimpleNamespace(streamed=False)
    model = BesideModel(path, (), watched, turns)
    with pytest.raises(KeyError), model.held(streamed=True):
        assert watched.events == ["acquire"] and turns.streamed
        raise KeyError
    assert watched.events == ["acquire", "release"] and model.module is watched.module


def test_runs_are_told_apart_by_file_and_options_not_by_place(path):
    _, model = load(path)
    again = OwnModel(path, ("fp32",), Watched(ToyModel()))
    assert digest(model) == digest(again) and hash(model) == hash(again) and model == again
    assert digest(replace(model, options=("bf16",))) != digest(model)
