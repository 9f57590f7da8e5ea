"""After a step of NaN the error names the block and the backend, or the layer; a healthy run is not looked at."""

from dataclasses import dataclass, replace

import pytest
import talking
import torch
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo import denoise
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan, Rule
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.denoise import NotFiniteError
from wanvideo_wrapper.wanvideo.modules import block, layers
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.windows import ContextOptions

MOVING = ContextOptions(size=17, overlap=8)
STATIC = replace(MOVING, schedule="static_standard")


@dataclass(frozen=True)
class Overflowing:
    """An attention kernel that gives one infinite value."""

    value: float
    name: str = "overflowing"

    def __call__(self, q, k, v, *, mask=None):
        out = sdpa()(q, k, v)
        return torch.cat([out[:, :-1], torch.full_like(out[:, -1:], self.value)], dim=1)


@dataclass(frozen=True)
class OverflowingRows(Overflowing):
    """The same as FP8 rows, which an output projection in FP8 reads as they are."""

    def fused_rows(self, q, k, v, norm_q, norm_k, rope):
        return quantize(self(v(), v(), v()).flatten(2))

    def fused(self, *arguments):
        return self.fused_rows(*arguments).to(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


@pytest.fixture
def asked(folder):
    asked = talking.request(folder, base="text", total=60, scheduler="euler")
    return replace(asked, image=ImageEmbeds(latent_shape=(16, 12, 4, 4), num_frames=45))


def message(asked):
    with pytest.raises(NotFiniteError) as error:
        sample(asked, StandaloneHost(device="cpu"))
    return str(error.value)


def planned(asked, rule):
    return replace(asked, model=replace(asked.model, attention=AttentionPlan(main=sdpa(), rules=(rule,))))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer", ["1.self_attn.norm_q", "1.self_attn.norm_k", "1.norm3"])
def test_norms_that_are_part_of_a_kernel_are_named(asked, fused, layer, monkeypatch):
    monkeypatch.setattr(layers, "_runs_fused", lambda x: fused)
    monkeypatch.setattr(block, "added_by_norm", lambda x: fused)
    layer = f"blocks.{layer}"
    asked.model.transformer.get_submodule(layer).weight.requires_grad_(False).fill_(float("nan"))
    assert f"the weights of layer {layer} are not finite" in message(asked)


@pytest.mark.parametrize("context", [None, MOVING, STATIC])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_attention_is_named(asked, value, context):
    rule = Rule(plan=AttentionPlan(main=Overflowing(value)), blocks=frozenset({1, 2}))
    text = message(planned(replace(asked, context=context), rule))
    assert "at step 1 of 2 (it came from self-attention 'overflowing' in block 1, whose inputs were finite)" in text


@torch.no_grad()
def test_attention_that_gives_fp8_rows_is_named(asked):
    layer = asked.model.transformer.blocks[1].self_attn
    layer.o = Fp8MatmulLinear.quantize(layer.o.weight, layer.o.bias, torch.float8_e4m3fn)
    rule = Rule(plan=AttentionPlan(main=OverflowingRows(float("nan"))), blocks=frozenset({1}))
    assert "self-attention 'overflowing' in block 1, whose inputs were finite" in message(planned(asked, rule))


def test_attention_is_named_under_compiled_blocks(asked):
    torch._dynamo.reset()
    rule = Rule(plan=AttentionPlan(main=Overflowing(float("nan"))), blocks=frozenset({2}))
    bad = planned(asked, rule)
    options = replace(bad.model.options, compile=CompileArgs(backend="eager", fullgraph=True))
    assert "'overflowing' in block 2" in message(replace(bad, model=replace(bad.model, options=options)))


@pytest.mark.parametrize(
    ("layer", "value", "want"),
    [
        ("blocks.1.ffn.2", float("nan"), "the weights of layer blocks.1.ffn.2 are not finite"),
        ("blocks.2.cross_attn.k", 3.4e38, "it came from layer blocks.2.cross_attn.k, whose input was finite"),
        ("blocks.0.audio_cross_attn.kv_linear", float("inf"), "layer blocks.0.audio_cross_attn.kv_linear are not"),
    ],
)
@pytest.mark.parametrize("context", [None, MOVING, STATIC])
def test_layers_are_named(asked, layer, value, want, context):
    weight = asked.model.transformer.get_submodule(layer).weight
    weight.requires_grad_(False).fill_(value)
    assert want in message(replace(asked, context=context))


def test_a_healthy_run_is_not_looked_at(asked, monkeypatch):
    monkeypatch.setattr(denoise, "origin", lambda *_: pytest.fail("a second look"))
    sample(asked, StandaloneHost(device="cpu"))


def test_a_later_step_is_named_without_a_layer(asked):
    rule = Rule(plan=AttentionPlan(main=Overflowing(float("nan"))), steps=(1, 9))
    assert "at step 2 of 2: choose" in message(planned(asked, rule))
