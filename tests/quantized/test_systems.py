"""Every system in a model with FP8 and with FP4 weights; on a GPU it is what the memory checker watches.

The cases are those of the contract tests. Their layers have sizes that no kernel likes, which is when one reads past an
end. On the CPU the products are eager, and layouts are checked.
"""

import pytest
import torch
from contract import ALL_CASES, build, in_bfloat16, inputs, placed
from torch import nn
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.quantized.fp8 import FP8_DTYPES, Fp8Linear
from wanvideo_wrapper.quantized.linear import QuantizedLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.quantization import NVFP4, QUANTIZATIONS

ON_GPU = [pytest.param(name, "cuda", marks=[pytest.mark.cuda, pytest.mark.sm89]) for name in ALL_CASES]
# By option: how far a model of three tiny blocks with random weights may be from the one in bfloat16.
TOLERANCES = {"fp8_e4m3fn_fast": 0.15, "fp4_scaled": 0.45}
# What every block has: four layers of attention and two of the feed-forward.
LEAST = 3 * 6


def quantized(model, option, device):
    """The model on the device with its linear layers as the loader makes them; the number of them."""
    row = QUANTIZATIONS[option]
    kind, form = (Nvfp4Linear, ()) if row.storage == NVFP4 else (Fp8Linear, (FP8_DTYPES[row.storage],))
    kind = kind.fast_kind(torch.device(device)) if row.fast else kind
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and quantizable(model, name)]
    for name in layers:
        plain = model.get_submodule(name)
        bias = None if plain.bias is None else plain.bias.data
        model.set_submodule(name, kind.quantize(plain.weight.data, bias, *form))
    return model.to(device), len(layers)


@torch.no_grad()
@pytest.mark.parametrize(("name", "device"), [*((name, "cpu") for name in ALL_CASES), *ON_GPU])
@pytest.mark.parametrize("option", TOLERANCES)
def test_a_system_beside_quantized_layers(name, option, device, monkeypatch):
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    case = ALL_CASES[name]
    model = in_bfloat16(build(case.extension, config=case.config)[1])
    payload = case.payload.to(torch.device("cpu"), torch.bfloat16)
    want = model(inputs(payload))
    model, count = quantized(model, option, device)
    assert count >= LEAST and sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == count
    given = placed(inputs(payload.to(torch.device(device), torch.bfloat16)), device)
    got = model(given).cpu()
    assert got.isfinite().all() and (got - want).norm() < TOLERANCES[option] * want.norm()
