"""Folded audio attention is that of the method in float64, in every form; where it must not run, it does not."""

import math

import pytest
import torch
import torch._dynamo
from lora_files import KINDS, save, spelled
from torch._dynamo.backends.registry import lookup_backend
from wanvideo_wrapper.kernels.fp8_rows import Fp8Rows
from wanvideo_wrapper.multitalk import folding
from wanvideo_wrapper.multitalk.extension import MultiTalk, Speech
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.lora import LoraFile, beside
from wanvideo_wrapper.wanvideo.modules.layers import Residual
from wanvideo_wrapper.wanvideo.modules.model import WanModel

HEADS, DIM, OUT, TOKENS = 2, 48, 12, 4
GRID = (3, 2, 5)
PLACES = GRID[1] * GRID[2]
SYSTEM = MultiTalk(features=6, intermediate_dim=8, context_tokens=TOKENS, output_dim=OUT, voiced=(0,))


@pytest.fixture
def calls(monkeypatch):
    """Folding pays at every size; the shapes of weights that it made."""
    seen, softmax = [], folding.head_softmax
    monkeypatch.setattr(folding, "WORTH", math.inf)
    monkeypatch.setattr(folding, "head_softmax", lambda w, *more: seen.append(tuple(w.shape)) or softmax(w, *more))
    return seen


def block_of(dtype=torch.float32, *, text=8, std=0.3):
    model = WanModel(
        WanConfig(dim=DIM, ffn_dim=32, num_heads=HEADS, num_layers=1, text_dim=text, text_len=4), (SYSTEM,)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype).requires_grad_(False).blocks[0]


def case(dtype=torch.float32, *, batch=1, frames=GRID[0], behind=0, **more):
    """The stream, and speech that differs by row, for the first `frames` frames of the grid."""
    x = torch.randn(batch, math.prod(GRID) + behind, DIM).to(dtype)
    tokens = torch.randn(batch, frames, TOKENS, OUT).to(dtype)
    return x, Speech(tokens, torch.tensor(0.7), GRID, None, 1, **more)


def hear(block, x, cond):
    return SYSTEM.after_cross_attn(block, x.clone(), cond)[0]


def added_float64(block, x, cond, **weights):
    """What is added to the stream: norm, queries, softmax by frame and head, output. weights: in place of stored ones.

    x [B, L, C].
    """
    p = {name: t.double() for name, t in block.audio_cross_attn.state_dict().items()} | weights
    x, tokens = x.double(), cond.tokens.double()
    normed = torch.nn.functional.layer_norm(x, (DIM,), eps=block.norm_x.eps)
    normed = normed * block.norm_x.weight.double() + block.norm_x.bias.double()
    out = torch.zeros_like(x)
    for row, frame in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(tokens.shape[1])).tolist():
        rows = slice(frame * PLACES, (frame + 1) * PLACES)
        q = normed[row, rows] @ p["q_linear.weight"].T + p["q_linear.bias"]
        k, v = (tokens[row, frame] @ p["kv_linear.weight"].T + p["kv_linear.bias"]).chunk(2, dim=-1)
        q, k, v = (t.view(-1, HEADS, DIM // HEADS) for t in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM // HEADS)
        heard = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        out[row, rows] = heard @ p["proj.weight"].T + p["proj.bias"]
    return out * cond.scale.double()


def quantize(block):
    """FP8 weights and products in both projections; the weights' values."""
    attention, stored = block.audio_cross_attn, {}
    for name in ("q_linear", "proj"):
        layer = getattr(attention, name)
        layer = Fp8MatmulLinear.quantize(layer.weight, layer.bias, torch.float8_e4m3fn)
        setattr(attention, name, layer)
        stored[f"{name}.weight"] = layer.expanded(torch.float64)
    return stored


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("batch", "frames", "behind"), [(1, 3, 0), (2, 3, 0), (2, 2, 3)])
def test_equals_float64_and_the_unfolded_form(batch, frames, behind, parts, calls, monkeypatch):
    block = block_of()
    x, cond = case(batch=batch, frames=frames, behind=behind, parts=parts)
    got = hear(block, x, cond)
    assert len(calls) == batch * parts and sum(shape[0] for shape in calls) == batch * frames
    assert {shape[1:] for shape in calls} == {(PLACES, TOKENS * HEADS)}
    assert relative(got - x, added_float64(block, x, cond)) < 2e-6
    assert torch.equal(got[:, frames * PLACES :], x[:, frames * PLACES :])
    monkeypatch.setattr(folding, "WORTH", 0)
    assert relative(hear(block, x, cond), got.double()) < 1e-6 and len(calls) == batch * parts


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2])
def test_a_sum_that_is_not_added_up_is_the_sum(parts, calls):
    block = block_of()
    (x, cond), (y, _) = case(batch=2, frames=2, behind=3, parts=parts), case(batch=2, behind=3)
    got, _ = SYSTEM.after_cross_attn(block, Residual(x.clone(), y.clone()), cond)
    assert relative(got, hear(block, x + y, cond).double()) < 1e-6 and len(calls) == 4 * parts


@torch.no_grad()
@pytest.mark.parametrize("name", ["q_linear", "proj"])
def test_projections_need_no_bias(name, calls):
    block = block_of()
    getattr(block.audio_cross_attn, name).bias = None
    x, cond = case()
    without = {f"{name}.bias": torch.zeros(DIM, dtype=torch.float64)}
    assert relative(hear(block, x, cond) - x, added_float64(block, x, cond, **without)) < 2e-6 and calls


@torch.no_grad()
def test_what_all_keys_have_in_common_costs_no_precision(calls, monkeypatch):
    """Scores are rounded to the activation's type. Of bfloat16 16 of 24 bits would go to what softmax does not see."""
    block = block_of(torch.bfloat16)
    block.audio_cross_attn.kv_linear.bias[:DIM] = torch.randn(DIM) * 20
    x, cond = case(torch.bfloat16)
    want = added_float64(block, x, cond)
    folded = relative(hear(block, x, cond) - x, want)
    monkeypatch.setattr(folding, "WORTH", 0)
    assert folded < 1.5 * relative(hear(block, x, cond) - x, want) and len(calls) == 1


@torch.no_grad()
def test_an_fp8_weight_meets_activations_that_are_not_rounded_to_fp8(calls, monkeypatch):
    block = block_of(torch.bfloat16)
    stored = quantize(block)
    x, cond = case(torch.bfloat16)
    want = added_float64(block, x, cond, **stored)
    folded = relative(hear(block, x, cond) - x, want)
    monkeypatch.setattr(folding, "WORTH", 0)
    assert folded < 0.5 * relative(hear(block, x, cond) - x, want) and len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(("frames", "behind"), [(3, 0), (2, 3)])
def test_products_in_fp8_read_what_the_norm_rounded(frames, behind):
    """Not a second rounding of 16 bits; also where some tokens hear nothing."""
    block, read = block_of(torch.bfloat16), []
    stored = quantize(block)
    x, cond = case(torch.bfloat16, batch=2, frames=frames, behind=behind)
    block.audio_cross_attn.q_linear.register_forward_pre_hook(lambda layer, args: read.append(args[0]))
    got = hear(block, x, cond)
    assert [type(rows) for rows in read] == [Fp8Rows] and read[0].values.shape[:2] == (2, frames * PLACES)
    assert relative(got - x, added_float64(block, x, cond, **stored)) < 0.08
    assert torch.equal(got[:, frames * PLACES :], x[:, frames * PLACES :])


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2])
def test_a_sum_that_is_not_added_up_is_normed_in_fp8(speakers):
    """What is heard is left to the next norm; the same as of the sum itself."""
    block, read = block_of(torch.bfloat16), []
    quantize(block)
    (x, cond), (y, _) = case(torch.bfloat16, batch=2), case(torch.bfloat16, batch=2)
    if speakers == 2:
        tokens = torch.cat((cond.tokens, cond.tokens.flip(2)), dim=2)
        cond = cond._replace(tokens=tokens, speakers=2, scores=torch.rand(*x.shape[:2], 3))
    want = hear(block, x + y, cond)
    block.audio_cross_attn.q_linear.register_forward_pre_hook(lambda layer, args: read.append(type(args[0])))
    got, _ = SYSTEM.after_cross_attn(block, Residual(x, y), cond)
    assert read == [Fp8Rows] and relative(got.added(), want.double()) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("layer", ["q_linear", "kv_linear", "proj"])
def test_a_lora_beside_a_layer_acts(layer, calls, tmp_path):
    """One of keys and values changes nothing: their layer is called as ever."""
    block = block_of()
    weight = getattr(block.audio_cross_attn, layer).weight
    parts, delta = KINDS["pair"](weight, 4)
    path = save(tmp_path / "lora.safetensors", spelled("bare", f"blocks.0.audio_cross_attn.{layer}", parts))
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList((block,))
    x, cond = case()
    with beside(model, (LoraFile(path=path, merge=False, strength=0.5),), x.device, x.dtype):
        got = hear(block, x, cond)
    changed = {f"{layer}.weight": weight.double() + 0.5 * delta}
    assert relative(got - x, added_float64(block, x, cond, **changed)) < 2e-6
    assert bool(calls) == (layer == "kv_linear")
    assert relative(hear(block, x, cond) - x, added_float64(block, x, cond)) < 2e-6 and calls


@torch.no_grad()
@pytest.mark.parametrize("name", ["q_linear", "proj"])
def test_a_layer_that_is_watched_is_called(name, calls):
    block, seen = block_of(), []
    x, cond = case()
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(getattr(block.audio_cross_attn, name), register)(lambda *_: seen.append(name))
        hear(block, x, cond)
        handle.remove()
    assert seen == [name, name] and not calls


@pytest.mark.autograd
def test_gradients_pass(calls):
    block = block_of().requires_grad_(True)
    x, cond = case()
    hear(block, x, cond).square().sum().backward()
    assert block.audio_cross_attn.q_linear.weight.grad.abs().max() > 0 and not calls
    block.requires_grad_(False)
    hear(block, x.requires_grad_(), cond).sum().backward()
    assert x.grad.abs().max() > 0 and not calls
    with torch.no_grad():
        hear(block, x, cond)
    hear(block, x.detach(), cond)
    assert len(calls) == 2


@torch.no_grad()
def test_several_speakers_are_not_folded(calls):
    block = block_of()
    x, cond = case()
    hear(block, x, cond._replace(speakers=2, scores=torch.rand(*x.shape[:2], 3)))
    assert not calls


@pytest.mark.parametrize(
    ("keys", "head_dim", "places", "pays"),
    [(32, 128, 2304, True), (32, 128, 1560 // 8, False), (32, 64, 2304, False), (32, 128, 1560 // 4, True)],
)
def test_where_it_pays(keys, head_dim, places, pays):
    assert folding.is_worth_it(keys, head_dim, places) == pays


@torch.no_grad()
@pytest.mark.parametrize(("text", "dense"), [(8, True), (8, False), (0, True)])
def test_the_stream_is_changed_where_it_lies_only_if_it_is_the_blocks_own(text, dense, calls):
    """Without text the stream is the one that hooks before saw, and may keep."""
    block = block_of(text=text)
    x, cond = case()
    given = x.clone() if dense else x.clone().mT.contiguous().mT
    got, _ = SYSTEM.after_cross_attn(block, given, cond)
    assert (got is given) == (text > 0 and dense) and torch.equal(given, x) != (got is given)
    assert relative(got - x, added_float64(block, x, cond)) < 2e-6 and calls


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True])
def test_traced_as_one_graph(fp8, monkeypatch):
    """Once for every strength; what it is given stays as it is."""
    monkeypatch.setattr(folding, "WORTH", math.inf)
    block, x, cond = block_of(), *case(batch=2, behind=3, parts=2)
    if fp8:
        quantize(block)
    conds = [cond._replace(scale=torch.tensor(scale)) for scale in (0.7, -1.2)]
    want = [hear(block, x, each) for each in conds]
    torch._dynamo.reset()
    graphs, given = [], x.clone()

    def backend(graph, inputs):
        graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(
        lambda x, cond: SYSTEM.after_cross_attn(block, x, cond)[0], fullgraph=True, backend=backend
    )
    got = [compiled(given, each) for each in conds]
    assert torch.equal(given, x) and len(graphs) == 1 and "head_softmax" in graphs[0]
    for a, b in zip(got, want, strict=True):
        assert relative(a - x, (b - x).double()) < 1e-5
