"""LoRA files that bring weights of a system: found by their names, loaded with the model, at the node's strength."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.lora_weights import refuse
from wanvideo_wrapper.wanvideo.systems import Systems

HOST = StandaloneHost(device="cpu")


@dataclass(frozen=True)
class Marks(Extension):
    """One more layer in every block."""

    strength: float = 1.0
    payload: ClassVar[type] = Payload
    lora_layers: ClassVar[tuple[str, ...]] = ("blocks.*.mark",)

    @classmethod
    def detect(cls, shapes) -> Self | None:
        return cls() if "blocks.0.mark.weight" in shapes else None

    def at_strength(self, strength):
        return replace(self, strength=strength)

    def build(self, model):
        for block in model.blocks:
            block.mark = nn.Linear(4, 4, bias=False)


SYSTEMS = Systems(extensions=(Marks,))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    tiny.transformer(in_dim=16).save(path)
    return path


def marks(count=3, prefix="diffusion_model."):
    return {f"{prefix}blocks.{i}.mark.weight": torch.randn(4, 4) for i in range(count)}


def file(path, tensors, **more):
    save_file(tensors, path)
    return LoraFile(path=path, **more)


def load(base, *files):
    return load_wan_model(base, LoadOptions(base_dtype=torch.float32, loras=files), HOST, SYSTEMS)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_the_weights_are_the_models(base, tmp_path, prefix):
    tensors = marks(prefix=prefix)
    model = load(base, file(tmp_path / "lora.safetensors", tensors, strength=0.5))
    for index, block in enumerate(model.transformer.blocks):
        assert torch.equal(block.mark.weight, tensors[f"{prefix}blocks.{index}.mark.weight"])
    assert model.transformer.extensions == (Marks(strength=0.5),)


def test_the_rest_of_the_file_changes_layers(base, tmp_path):
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    pair = {"blocks.1.self_attn.q.lora_down.weight": down, "blocks.1.self_attn.q.lora_up.weight": up}
    both = load(base, file(tmp_path / "lora.safetensors", marks(prefix="") | pair, merge=True)).transformer
    before = load(base).transformer
    change = both.blocks[1].self_attn.q.weight - before.blocks[1].self_attn.q.weight
    torch.testing.assert_close(change, up @ down, rtol=1e-4, atol=1e-5)
    assert before.extensions == () and hasattr(both.blocks[2], "mark")


def test_what_cannot_be_is_refused(base, tmp_path):
    lora = file(tmp_path / "lora.safetensors", marks())
    for wrong, says in [
        (replace(lora, strength=(0.5, 1.0)), "give one number"),
        (replace(lora, blocks=("blocks.1.",)), "choose none of them"),
        (replace(lora, skip_layers=("mark",)), "choose none of them"),
        (file(tmp_path / "longer.safetensors", marks(5)), "at least 5 blocks"),
        (file(tmp_path / "part.safetensors", marks(2)), "lacks 1 of the"),
    ]:
        with pytest.raises(ValueError, match=says):
            load(base, wrong)
    with pytest.raises(ValueError, match=r"lora\.safetensors brings layers of its own.*WanVideoModelLoader"):
        refuse((lora,), SYSTEMS)
