"""Every system on a GPU gives what it gives on the CPU, whose results are held against independent forms."""

import copy

import pytest
import torch
from contract import ALL_CASES, build, in_bfloat16, inputs, placed

pytestmark = pytest.mark.cuda
STEPS = (0, 3, 7)
# In bfloat16 each of the two rounds in its own order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ALL_CASES)
def test_a_system_gives_what_it_gives_on_the_cpu(name, dtype):
    case = ALL_CASES[name]
    model = build(case.extension, config=case.config)[1]
    model = in_bfloat16(model) if dtype == torch.bfloat16 else model
    models = {device: copy.deepcopy(model).to(device) for device in ("cpu", "cuda")}

    def velocity(device, step):
        payload = case.at_step(step).to(torch.device(device), dtype)
        return models[device](placed(inputs(payload, step=step, seed=step), device)).cpu()

    for step in STEPS:
        want, got = velocity("cpu", step), velocity("cuda", step)
        assert got.isfinite().all() and (got - want).norm() < TOLERANCES[dtype] * want.norm(), step
