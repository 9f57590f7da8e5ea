"""LoRAs merged into the weights: summed in float32, added to the file's own values, rounded once."""

import lora_files
import pytest
import torch
from lora_files import KINDS, randn, save, spelled
from safetensors.torch import load_file
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile, MergedLoras
from wanvideo_wrapper.wanvideo.modules.model import WanModel

HOST = StandaloneHost(device="cpu")
Q, OUT, NORM = "blocks.1.self_attn.q", "blocks.2.cross_attn.o", "blocks.0.norm3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    tiny.transformer(in_dim=16).save(path, torch.float32)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return WanModel(WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=3, in_dim=16, text_dim=tiny.TEXT_DIM))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_several_files(model, checkpoint, kind, tmp_path):
    weight = checkpoint.tensor(f"{Q}.weight")
    for rank in (4, 8, 32, 128):
        first, want = KINDS[kind](weight, rank)
        second, more = lora_files.pair_alpha(weight, 32)
        files = [
            LoraFile(path=save(tmp_path / "1.safetensors", spelled("musubi", Q, first)), strength=0.7),
            LoraFile(path=save(tmp_path / "2.safetensors", spelled("diffusers", Q, second)), strength=-0.3),
        ]
        merged = MergedLoras(files, model, checkpoint)
        want = 0.7 * want - 0.3 * more
        assert ((merged.weight(Q).double() - want).norm() / want.norm()).item() < 2e-6, rank
        assert merged.weight(OUT) is None


@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn", "fp4_experimental"])
@pytest.mark.parametrize("kind", ["pair", "lokr_both", "dora_peft", "diff"])
def test_weights_are_rounded_once(checkpoint, option, kind, tmp_path):
    weight = checkpoint.tensor(f"{Q}.weight")
    first, delta = KINDS[kind](weight, 8)
    norm, bias = randn(128), randn(128)
    tensors = spelled("kijai", Q, first | {".diff_b": bias}) | spelled("kijai", NORM, {".diff": norm, ".diff_b": bias})
    files = tuple(LoraFile(path=save(tmp_path / f"{i}.safetensors", tensors), strength=s)
                  for i, s in enumerate((0.25, 0.5)))  # fmt: skip
    options = LoadOptions(base_dtype=torch.bfloat16, quantization=option, loras=files)
    transformer = load_wan_model(checkpoint.path, options, HOST, SYSTEMS).transformer
    layer, want = transformer.get_submodule(Q), (weight.double() + 0.75 * delta).float()
    if option == "disabled":
        # Adding to a weight that was rounded before would miss by as much as one rounding, for most values.
        off = (layer.weight != want.bfloat16()).double().mean()
        assert layer.weight.dtype == torch.bfloat16 and off < 1e-3
    else:
        # A sum in another order may fall on the other side of a boundary of a value, or of the scale of a block.
        kinds = {"fp8_e4m3fn": (Fp8Linear, (torch.float8_e4m3fn,), 2e-3), "fp4_experimental": (Nvfp4Linear, (), 2e-2)}
        cls, arguments, most = kinds[option]
        exact = cls.quantize(want, None, *arguments).expanded(torch.float32)
        assert ((layer.expanded(torch.float32) - exact).norm() / exact.norm()).item() < most
    stored = load_file(checkpoint.path)
    for name, change in ((f"{Q}.bias", bias), (f"{NORM}.weight", norm), (f"{NORM}.bias", bias)):
        got = transformer.get_parameter(name)
        assert torch.allclose(got.float(), (stored[name] + 0.75 * change).to(got.dtype).float(), rtol=1e-6, atol=1e-6)


def test_strengths_by_the_step_cannot_be_merged(model, checkpoint, tmp_path):
    parts, _ = lora_files.pair(torch.empty(128, 128), 4)
    file = LoraFile(path=save(tmp_path / "l.safetensors", spelled("kijai", Q, parts)), strength=(0.5, 1.0))
    with pytest.raises(ValueError, match="turn merge_loras off"):
        MergedLoras([file], model, checkpoint)
