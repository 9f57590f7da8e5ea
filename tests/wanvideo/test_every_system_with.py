"""Every system with what changes how a model runs: waiting blocks, LoRAs, a step cache, windows."""

from dataclasses import replace

import pytest
import torch
from contract import ALL_CASES, inputs, randomize
from safetensors.torch import save_file
from swap_stand_in import DEVICE, LateCopies
from torch import nn
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.lora.beside import beside
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.step_cache import StepCache, StepMemory

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=ALL_CASES.values(), ids=ALL_CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return randomize(WanModel(case.config, (case.extension,)))


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_waiting_blocks(case, model):
    """Of every list, and the embeddings: equal to the bit, and nothing stays on the device."""
    copies = LateCopies()
    given = [inputs(case.at_step(step), step=step) for step in range(2)]
    want = [model(each) for each in given]
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.swap = BlockSwapArgs(share=1.0)
    placement(DEVICE)
    with placement.swapping(DEVICE):
        got = [model(each) for each in given]
    assert all(map(torch.equal, got, want))
    blocks = sum(map(len, model.stacks().values()))
    assert copies.copied >= 2 * blocks and copies.bytes_on_device() == 0


class Cache(StepCache):
    def maker(self, model):
        raise NotImplementedError


class Memory(StepMemory):
    """Leaves out the blocks of every other step."""

    def blocks(self, moment, step, run):
        follows = self.goes_on(step)
        return self.skip(moment.tokens, step) if follows else self.run_and_keep(moment.tokens, step, run)


@torch.no_grad()
def test_a_step_whose_blocks_are_left_out(case, model):
    """With the same inputs it is the step before."""
    memory, ran = Memory(Cache(), CPU), []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    given = [replace(inputs(case.payload), step=Step(index=2, total=8, in_run=place)) for place in (2, 3)]
    first, second = (model(each, memory) for each in given)
    hook.remove()
    assert len(ran) == 1 and memory.skipped == [3]
    assert (second - first).norm() < 1e-5 * first.norm()


@torch.no_grad()
def test_a_lora_beside_all_layers_equals_one_in_the_weights(case, model, tmp_path):
    given, pairs, sums = inputs(case.payload), {}, {}
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and quantizable(model, name)]
    for seed, name in enumerate(layers):
        weight = model.get_submodule(name).weight
        down, up = rand(2, weight.shape[1], seed=seed) * 0.5, rand(weight.shape[0], 2, seed=1000 + seed) * 0.5
        pairs |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        sums[name] = weight + 0.7 * up @ down
    save_file(pairs, tmp_path / "lora.safetensors")
    plain = model(given)
    with beside(model, [LoraFile(path=tmp_path / "lora.safetensors", strength=0.7, merge=False)], CPU, torch.float32):
        got = model(given)
    assert torch.equal(model(given), plain)
    for name, weight in sums.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    want = model(given)
    assert (want - plain).norm() > 2e-4 * plain.norm() and (got - want).norm() < 1e-5 * want.norm()
