"""Which backend runs in which step and block, through the nodes and in the model."""

from dataclasses import dataclass, replace

import pytest
import talking
import torch
from attention_stand_ins import blackwell  # noqa: F401
from torch import Tensor
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper import attention
from wanvideo_wrapper.attention import ATTENTION_MODES, AttentionSpec, reason, sdpa
from wanvideo_wrapper.attention_backends.radial import RadialAttention
from wanvideo_wrapper.kernels.fp8_rows import quantize
from wanvideo_wrapper.kernels.rope import apply_rope
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan, Rule, plan_for
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.fingerprint import digest
from wanvideo_wrapper.wanvideo.modules.layers import WanRMSNorm
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, HeadsRead, ModelInputs

SPEC = AttentionSpec(device=torch.device("cpu"), heads=2, head_dim=64, dtype=torch.float32)
GRID = (2, 2, 2)


@dataclass(frozen=True)
class Named:
    """Counts its calls, and runs torch's attention."""

    name: str
    calls: list

    def __call__(self, q, k, v, *, mask=None):
        self.calls.append(self.name)
        return sdpa()(q, k, v, mask=mask)


def plan(name, calls=None, **kwargs):
    return AttentionPlan(main=Named(name, [] if calls is None else calls), **kwargs)


def names(plan, step, blocks=4):
    return [backend.name for backend in plan.at(step, GRID, blocks)]


def test_the_first_rule_that_applies_counts():
    made = plan("a", rules=(Rule(plan=plan("b"), blocks=frozenset({1})), Rule(plan=plan("c"), steps=(1, 3))))
    assert names(made, Step(in_run=0)) == ["a", "b", "a", "a"]
    assert names(made, Step(in_run=2)) == ["c", "b", "c", "c"]
    assert names(made.before(Rule(plan=plan("d"))), Step(in_run=2)) == ["d"] * 4


def test_plans_that_run_otherwise_are_told_apart():
    made = [
        plan("a"),
        plan("b"),
        plan("a", rules=(Rule(plan=plan("b"), blocks=frozenset({1})),)),
        plan("a", rules=(Rule(plan=plan("b"), blocks=frozenset({2})),)),
        plan("a", rules=(Rule(plan=plan("b"), ends=True),)),
        AttentionPlan(main=RadialAttention(decay=0.2)),
        AttentionPlan(main=RadialAttention(decay=0.3)),
    ]
    assert len({digest(each.identity()) for each in made}) == len(made)
    assert digest(made[2].identity()) == digest(replace(made[2]).identity())


@pytest.mark.parametrize(
    ("name", "said"), [("sdpa", False), ("cudnn_fp8", False), ("radial_sage_attention", True), ("sol_attn", True)]
)
def test_kernels_of_16_bits_say_so_under_float32(name, said, monkeypatch, caplog):
    monkeypatch.setattr(attention, "resolve", lambda name, spec: sdpa())
    with caplog.at_level("INFO", logger="wanvideo"):
        plan_for(name, replace(SPEC, device=torch.device("cuda")))
        assert ("Its kernel computes in bfloat16; base_precision is float32." in caplog.messages) == said
        caplog.clear()
        plan_for(name, replace(SPEC, device=torch.device("cuda"), dtype=torch.float16))
        assert len(caplog.messages) == 1


def test_ends_are_those_of_the_schedule_not_of_the_run():
    made = plan("four bits", rules=(Rule(plan=plan("eight bits"), ends=True),))
    ran = [names(made, Step(index=i, total=6, in_run=max(i - 2, 0)), 1)[0] for i in range(6)]
    assert ran == ["eight bits", *["four bits"] * 4, "eight bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    talking.save(path)
    return path


@pytest.fixture
def asked(folder):
    asked = talking.request(folder, base="text")
    return replace(asked, payloads=(), image=replace(asked.image, loop=None))


def test_the_model_runs_by_its_plan(asked):
    calls = []
    rules = (Rule(plan=plan("ends", calls), steps=(1, 2), blocks=frozenset({0, 2}), verbose=True),)
    model = replace(asked.model, attention=plan("main", calls, rules=rules))
    sample(replace(asked, model=model), talking.StandaloneHost(device="cpu"))
    assert calls == ["main"] * 3 + ["ends", "main", "ends"]
    assert asked.model.transformer.attention_plan is None


def test_override_node(asked):
    (blocks,) = N["WanVideoBlockList"]().create_list("0,2-3\n 5 ")
    assert blocks == [0, 2, 3, 5]
    override = N["WanVideoSetAttentionModeOverride"]().getmodelpath
    (model,) = override(asked.model, "radial_sage_attention", 1, 2, False, blocks=[1])
    chosen = model.attention.at(Step(in_run=1), GRID, 3)
    assert [backend.name for backend in chosen] == ["sdpa", "radial_sage_attention", "sdpa"]
    assert names(model.attention, Step(in_run=0), 3) == ["sdpa"] * 3
    assert names(asked.model.attention, Step(in_run=1), 3) == ["sdpa"] * 3
    with pytest.raises(ValueError, match=r"blocks 0 to 2, but the override names \[7\]"):
        override(asked.model, "sdpa", 0, 1, False, blocks=[0, 7])
    with pytest.raises(ValueError, match="'sageattn' cannot run because"):
        override(asked.model, "sageattn", 0, 1, False)
    with pytest.raises(ValueError, match="'x' is neither"):
        N["WanVideoBlockList"]().create_list("1,x")
    with pytest.raises(ValueError, match="range '5-3' is empty"):
        N["WanVideoBlockList"]().create_list("1,5-3")
    for start, end, blocks in ((3, 3, None), (4, 2, None), (0, 9, [])):
        with pytest.raises(ValueError, match="applies nowhere"):
            override(asked.model, "sdpa", start, end, False, blocks=blocks)


def test_radial_node(asked):
    set_radial = N["WanVideoSetRadialAttention"]().loadmodel
    with pytest.raises(ValueError, match="attention_mode 'radial_sage_attention'"):
        set_radial(asked.model, "sdpa", 1, 1, 2, 0.2, 128)
    model = replace(asked.model, attention=plan_for("radial_sage_attention", SPEC))
    (sparse,) = set_radial(model, "sdpa", 1, 1, 2, 0.4, 64)
    assert names(sparse.attention, Step(in_run=1), 3) == ["sdpa"] * 3
    first, second, third = sparse.attention.at(Step(in_run=2), GRID, 3)
    assert first.name == "sdpa" and second == third == RadialAttention(GRID, 0.4, 64)
    (listed,) = set_radial(model, "sdpa", N["WanVideoBlockList"]().create_list("0, 2")[0], 1, 2, 0.4, 64)
    assert names(listed.attention, Step(in_run=2), 3) == ["sdpa", "radial_sage_attention", "sdpa"]
    (same,) = set_radial(model, "sparse_sage_attention", 1, 1, 0, 0.4, 64)
    first, second, _ = same.attention.at(Step(), GRID, 3)
    assert first.everything and not second.everything


def test_radial_settings_take_the_place_of_earlier_ones(asked):
    set_radial = N["WanVideoSetRadialAttention"]().loadmodel
    override = N["WanVideoSetAttentionModeOverride"]().getmodelpath
    model = replace(asked.model, attention=plan_for("radial_sage_attention", SPEC))
    (first,) = set_radial(model, "sparse_sage_attention", 3, 1, 2, 0.2, 128)
    (first,) = override(first, "sdpa", 1, 2, False, blocks=[2])
    (second,) = set_radial(first, "sdpa", 0, 1, 0, 0.4, 64)
    for step, last in ((0, "radial_sage_attention"), (1, "sdpa"), (5, "radial_sage_attention")):
        chosen = second.attention.at(Step(in_run=step), GRID, 3)
        assert chosen[0] == chosen[1] == RadialAttention(GRID, 0.4, 64) and chosen[2].name == last


def test_radial_settings_reach_an_override(asked):
    (model,) = N["WanVideoSetAttentionModeOverride"]().getmodelpath(asked.model, "radial_sage_attention", 1, 4, False)
    (model,) = N["WanVideoSetRadialAttention"]().loadmodel(model, "sdpa", 1, 1, 0, 0.4, 64)
    assert names(model.attention, Step(in_run=0), 3) == ["sdpa"] * 3
    first, *others = model.attention.at(Step(in_run=1), GRID, 3)
    assert first.name == "sdpa" and others == [RadialAttention(GRID, 0.4, 64)] * 2


def test_ultravico_node(asked):
    set_alpha = N["WanVideoUltraVicoSettings"]().getmodelpath
    with pytest.raises(ValueError, match="attention_mode 'sageattn_ultravico'"):
        set_alpha(asked.model, 0.5)
    model = replace(asked.model, attention=plan_for("sageattn_ultravico", SPEC))
    assert set_alpha(model, 0.5)[0].attention.main.alpha == 0.5
    (overridden,) = N["WanVideoSetAttentionModeOverride"]().getmodelpath(asked.model, "sageattn_ultravico", 0, 9, False)
    assert set_alpha(overridden, 0.25)[0].attention.rules[0].plan.main.alpha == 0.25


class Raw(attention.FusedAttention):
    """A backend that norms and turns raw projections itself."""

    name = "raw"

    def __init__(self):
        self.fused_calls = self.plain_calls = 0

    def __call__(self, q, k, v, *, mask=None):
        self.plain_calls += 1
        return sdpa()(q, k, v)

    def fused(self, q_raw, k_raw, v, norm_q, norm_k, rope):
        self.fused_calls += 1
        q_raw, k_raw, v = q_raw(), k_raw(), v()
        assert isinstance(norm_q, WanRMSNorm) and q_raw.shape == (*v.shape[:2], v.shape[2] * v.shape[3])
        q, k = (apply_rope(n(x).unflatten(-1, v.shape[2:]), rope) for n, x in ((norm_q, q_raw), (norm_k, k_raw)))
        return sdpa()(q, k, v)

    def fused_rows(self, *arguments):
        self.rows = quantize(self.fused(*arguments).flatten(2))
        return self.rows


@torch.no_grad()
def test_raw_projections_reach_a_fused_backend():
    config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=6)
    model, raw = WanModel(config), Raw()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = ModelInputs(latents=torch.randn(1, 16, 2, 4, 4), timestep=torch.tensor([300.0]), text=(torch.randn(3, 8),))
    want = model(inputs)
    with model.attending(AttentionPlan(main=raw)):
        torch.testing.assert_close(model(inputs), want)
    assert (raw.fused_calls, raw.plain_calls) == (2, 0) and model.attention_plan is None


class Reader(Extension):
    """Notes the heads that it is shown."""

    def __init__(self, *read):
        self.heads, self.read = None, HeadsRead(*read)

    def reads_heads(self, cond):
        return self.read

    def self_attn(self, block, heads, cond):
        self.heads = heads
        return heads, cond


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("readers", "together"),
    [
        (((),), (None, None, True)),
        (((8, 3, False),), (8, 3, False)),
        (((0, 0, True),), (0, 0, True)),
        (((2, 3, False), (6, 5, False)), (6, 5, False)),
        (((4, None, False), (None, 3, True)), (None, None, True)),
    ],
)
def test_who_reads_the_heads_does_not_cost_the_fused_kernel(readers, together, fast):
    config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8, text_len=6)
    attention, raw = WanModel(config).blocks[0].self_attn, Raw()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if fast:
        attention.o = Fp8MatmulLinear.quantize(attention.o.weight, attention.o.bias, torch.float8_e4m3fn)
    hooks = tuple((Reader(*read), (None,)) for read in readers)
    x, rope = torch.randn(1, 8, 64), rope_table(GRID, 32, device=torch.device("cpu"))
    inputs = BlockInputs(None, None, rope, None, GRID, raw)
    got, _ = attention(x, inputs, hooks, None)
    seen, (queries, keys, result) = hooks[0][0].heads, together
    assert (raw.fused_calls, raw.plain_calls) == (1, 0) and hasattr(raw, "rows") == (fast and not result)
    want, _ = attention(x, inputs._replace(attention=sdpa()), hooks, None)
    plain = hooks[0][0].heads
    torch.testing.assert_close(got, want, **({} if result or not fast else {"atol": 0.03, "rtol": 0.05}))
    for mine, whole, count in ((seen.q, plain.q, queries), (seen.k, plain.k, keys)):
        assert (mine is None) == (whole is None) == (count == 0)
        if count != 0:
            assert whole.shape == (1, 8, 2, 32)
            torch.testing.assert_close(mine, whole[:, :count])
    assert isinstance(seen.out, Tensor) == (result or not fast)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("name", ATTENTION_MODES)
def test_compiled_blocks_equal_eager_on_a_gpu(name):
    """Every option that runs there, through inductor with full graphs; the others skip with the reason."""
    spec = AttentionSpec(device=torch.device("cuda"), heads=2, head_dim=128)
    why = reason(name, spec)
    if why is not None:
        pytest.skip(why)
    torch._dynamo.reset()
    config = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=2, text_dim=8, text_len=6)
    model = WanModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.to("cuda", torch.bfloat16)
    inputs = ModelInputs(
        latents=torch.randn(1, 16, 6, 16, 12, device="cuda"), timestep=torch.tensor([300.0], device="cuda"),
        text=(torch.randn(3, 8, device="cuda"),),
    )  # fmt: skip
    with model.attending(plan_for(name, spec)):
        want = model(inputs)
        for block in model.blocks:
            block.compile(fullgraph=True)
        got = model(inputs)
    assert got.isfinite().all() and (got - want).norm() / want.norm() < 3e-2


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_rows_go_straight_into_an_fp8_output_projection(fast):
    config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8, text_len=6)
    attention, raw = WanModel(config).blocks[0].self_attn, Raw()
    if fast:
        attention.o = Fp8MatmulLinear.quantize(attention.o.weight, attention.o.bias, torch.float8_e4m3fn)
    x, rope = torch.randn(1, 8, 64), rope_table(GRID, 32, device=torch.device("cpu"))
    inputs = BlockInputs(None, None, rope, None, GRID, raw)
    got, _ = attention(x, inputs, (), None)
    assert hasattr(raw, "rows") == fast and raw.fused_calls == 1
    want, _ = attention(x, inputs._replace(attention=sdpa()), (), None)
    torch.testing.assert_close(got, want, atol=0.02 if fast else 1e-5, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("name", ["radial_sage_attention", "sageattn_3"])
def test_steps_do_not_recompile(name, blackwell):  # noqa: F811
    """Two backends in turns over eight steps: one graph each, by the second step that has it."""
    config = WanConfig(dim=128, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8, text_len=6)
    model, graphs = WanModel(config), []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def counter(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    made = plan_for(name, SPEC)
    if name == "radial_sage_attention":
        made = made.before(Rule(plan=AttentionPlan(main=sdpa()), ends=True))
    text = (torch.randn(3, 8),)
    model.blocks[0].compile(fullgraph=True, backend=counter)
    with model.attending(made):
        for i in range(8):
            model(ModelInputs(
                latents=torch.randn(1, 16, 2, 4, 4), timestep=torch.tensor([300.0 + i]), text=text,
                step=Step(index=i, total=8, in_run=i),
            ))  # fmt: skip
    assert len(graphs) == 2
