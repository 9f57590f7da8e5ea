"""Every naming, kind and rank of LoRA on every storage, merged, beside and compiled, against explicit float64 deltas.

`make lora-table` runs all 8,704 cases; other runs draw a share of them by TEST_SEED.
"""

import itertools
import math
import os
import random
from typing import NamedTuple

import pytest
import torch
from layouts import relative
from lora_files import KINDS, NAMINGS, peft_header, save, spelled
from saved_models import save_fp8, save_gguf, save_nvfp4
from torch._dynamo.testing import CompileCounter
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile, beside

HOST = StandaloneHost(device="cpu")
CPU = torch.device("cpu")
RANKS = (4, 8, 32, 128)
LAYERS = [f"blocks.0.{layer}" for layer in ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")]
# How a file is made; precision of activations; what rounding a merged weight may cost. GGUF merges to bfloat16.
STORAGES = {
    "bf16": (lambda model, path: model.save(path), [torch.bfloat16], 0.003),
    "FP8": (lambda model, path: save_fp8(model, path, scaled=True), [torch.bfloat16, torch.float32], 0.04),
    "NVFP4": (save_nvfp4, [torch.bfloat16, torch.float32], 0.15),
    "GGUF": (lambda model, path: save_gguf(model, path, form="Q4_0"), [torch.bfloat16, torch.float32], 0.003),
}
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
RUNS = {"-": (), "A": (0,), "B": (1,), "+": (0, 1)}


class Case(NamedTuple):
    naming: str
    kind: str
    rank: int


CASES = list(itertools.starmap(Case, itertools.product(NAMINGS, KINDS, RANKS)))


def drawn(cases, share):
    """All of them under LORA_TABLE=all, else a share."""
    cases = list(cases)
    return cases if os.environ.get("LORA_TABLE") == "all" else random.sample(cases, math.ceil(share * len(cases)))


@pytest.fixture(scope="module", params=STORAGES)
def stored(request, tmp_path_factory):
    """The storage, a file in it, and the model of that file."""
    path = tmp_path_factory.mktemp("model") / f"m.{'gguf' if request.param == 'GGUF' else 'safetensors'}"
    STORAGES[request.param][0](tiny.transformer(in_dim=16, layers=1, seed=random.randrange(2**30)), path)
    return request.param, path, load(path)


def load(path, *loras):
    options = LoadOptions(base_dtype=torch.bfloat16, loras=loras)
    return load_wan_model(path, options, HOST, SYSTEMS).transformer


@torch.no_grad()
def values(layer):
    return (layer.expanded(torch.float32) if hasattr(layer, "expanded") else layer.weight.float()).double()


def lora(case, name, weight, path, *, merge):
    """The file, and what it adds to the weight: 0.5 to 2 times as much as there is, so that no error hides."""
    parts, delta = KINDS[case.kind](weight.float(), case.rank)
    # Without any alpha, PEFT's own files have a factor of their own.
    header = peft_header(case.rank, case.rank) if "peft" in case.naming else None
    strength = random.choice((-1, 1)) * random.uniform(0.5, 2) * (weight.norm() / delta.norm()).item()
    file = LoraFile(path=save(path, spelled(case.naming, name, parts), header), strength=strength, merge=merge)
    return file, strength * delta


def check_output(got, base, change, x, case):
    """`got` is `base` plus x times the change, as far as the activations' precision goes."""
    base, want = base.double(), x.double() @ change.T
    assert relative(got.double() - base, want) < ROUNDING[x.dtype] * (1 + base.norm() / want.norm()), case


def test_merged(stored, tmp_path):
    storage, path, model = stored
    for case in drawn(CASES, 0.1):
        name = random.choice(LAYERS)
        weight = values(model.get_submodule(name))
        file, change = lora(case, name, weight, tmp_path / "l.safetensors", merge=True)
        got, want = values(load(path, file).get_submodule(name)), weight + change
        assert relative(got, want) < STORAGES[storage][2], case
        # Rounding goes up as often as down, so that it hardly adds to the projection on the change.
        assert abs(((got - weight) * change).sum() / change.square().sum() - 1) < 0.02, case


@torch.no_grad()
def test_beside(stored, tmp_path):
    storage, _, model = stored
    for index, case in enumerate(drawn(CASES, 0.1)):
        name, dtype = random.choice(LAYERS), random.choice(STORAGES[storage][1])
        layer = model.get_submodule(name)
        x = torch.randn(1, 5, layer.in_features).to(dtype)
        file, change = lora(case, name, values(layer), tmp_path / f"{index}.safetensors", merge=False)
        base = layer(x)
        with beside(model, (file,), CPU, dtype):
            check_output(layer(x), base, change, x, case)
        assert torch.equal(layer(x), base), case
        file.path.unlink()


@torch.no_grad()
def test_compiled_in_every_order(stored, tmp_path):
    """None, A, B and both: each is right whatever ran before, and compiles at most once."""
    storage, path, _ = stored
    for kind, order in drawn(itertools.product(KINDS, itertools.permutations(RUNS)), 0.01):
        cases = random.choice(CASES)._replace(kind=kind), random.choice(CASES)
        name, dtype = random.choice(LAYERS), random.choice(STORAGES[storage][1])
        model, compiler = load(path), CompileCounter()
        layer = model.get_submodule(name)
        x, weight = torch.randn(1, 5, layer.in_features).to(dtype), values(layer)
        base = layer(x)
        made = [lora(case, name, weight, tmp_path / f"{i}.safetensors", merge=False) for i, case in enumerate(cases)]
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, layer=layer: layer(x), backend=compiler, fullgraph=True)
        for run in order:
            with beside(model, [made[i][0] for i in RUNS[run]], CPU, dtype):
                got = compiled(x)
            if run == "-":
                assert torch.equal(got, base), (order, *cases)
            else:
                check_output(got, base, sum(made[i][1] for i in RUNS[run]), x, (run, order, *cases))
        # Runs whose slots are alike share a graph: A and B of one rank, and both where two ranks of 4 make one of 8.
        assert 2 <= compiler.frame_count <= len(RUNS), (order, *cases)
