"""One toy system a hook, whose effect on the velocity is known in closed form: no hook's call can vanish unnoticed."""

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from contract import build, inputs
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.extension import Extension, Transformer
from wanvideo_wrapper.wanvideo.modules.block import WanAttentionBlock
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.shard import Ranks, Shard
from wanvideo_wrapper.wanvideo.tokens import Text, Tokens, video_tokens

# Norms take out what all channels have in common.
VECTOR = torch.linspace(-0.5, 0.5, 24)


class Amount(NamedTuple):
    value: torch.Tensor
    scratch: torch.Tensor | None = None


@dataclass(frozen=True)
class Toy(Payload):
    value: torch.Tensor
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class ToyExtension(Extension):
    payload: ClassVar[type] = Toy

    def prepare(self, model, payload, inputs, tokens):
        return tokens, Amount(payload.value)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def run(extension, amount, change, **more):
    """The velocity with the toy, and that of a plain model whose weights `change` has altered."""
    base, model = build(extension)
    plain = base(inputs(**more))
    with torch.no_grad():
        change(base)
    got, want = model(inputs(Toy(torch.as_tensor(amount)), **more)), base(inputs(**more))
    assert (got - plain).abs().max() > 1e-3
    close(got, want)


def scaled(*names):
    def change(model):
        for block in model.blocks:
            for name in names:
                layer = block.get_submodule(name)
                layer.weight.mul_(0.5)
                layer.bias.mul_(0.5)

    return change


def test_latents_are_what_the_patch_embedding_reads():
    @dataclass(frozen=True)
    class Latents(ToyExtension):
        def latents(self, model, payload, latents, inputs):
            return latents + payload.value * inputs.timestep[0]

    _, model = build(Latents())
    moved = inputs()
    moved = type(moved)(**{**moved.__dict__, "latents": moved.latents + 0.01 * 500})
    got = model(inputs(Toy(torch.tensor(0.01))))
    close(got, model(moved))
    assert (got - model(inputs())).abs().max() > 1e-3


def test_prepare_sees_the_latents_that_the_patch_embedding_read():
    seen = []

    @dataclass(frozen=True)
    class Joins(ToyExtension):
        def latents(self, model, payload, latents, inputs):
            return latents + payload.value

        def prepare(self, model, payload, inputs, tokens):
            seen.append(tokens.latents)
            return tokens, None

    _, model = build(Joins())
    model(inputs(Toy(torch.tensor(0.5))))
    assert torch.equal(seen[0], inputs().latents + 0.5)


@pytest.mark.parametrize("riflex", [0, 2])
def test_prepare_sees_positions_and_the_types_that_blocks_read(riflex):
    seen = []

    @dataclass(frozen=True)
    class Looks(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            seen.append(tokens)
            return tokens, None

    _, model = build(Looks())
    model.bfloat16().patch_embedding.float()
    model(inputs(Toy(torch.tensor(0.5)), riflex_index=riflex))
    (tokens,) = seen
    assert torch.equal(tokens.rope, rope_table((3, 2, 2), 12, riflex_index=riflex)) and tokens.grid == (3, 2, 2)
    assert tokens.x.dtype == tokens.text.tokens.dtype == torch.bfloat16
    assert tokens.mod.dtype == tokens.embedding.dtype == torch.float32


def test_prepare_changes_the_tokens():
    @dataclass(frozen=True)
    class Prepare(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            return tokens._replace(x=tokens.x + payload.value), None

    run(Prepare(), VECTOR, lambda model: model.patch_embedding.bias.add_(VECTOR))


def test_prepare_changes_the_text():
    @dataclass(frozen=True)
    class TextToy(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            return tokens._replace(text=Text(tokens.text.tokens + payload.value)), None

    run(TextToy(), 0.3, lambda model: model.text_embedding[2].bias.add_(0.3))


def test_a_state_of_none_is_idle():
    @dataclass(frozen=True)
    class Idle(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            return tokens, None

        def after_block(self, model, index, x, inputs, state):
            raise AssertionError("an idle system has no hooks")

        def self_attn_output(self, block, y, cond):
            raise AssertionError("an idle system has no hooks")

    base, model = build(Idle())
    assert torch.equal(model(inputs(Toy(torch.tensor(1.0)))), base(inputs()))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_skips_goes_around_a_block(index):
    @dataclass(frozen=True)
    class Skips(ToyExtension):
        def skips(self, state, at):
            return at == int(state.value)

        def after_block(self, model, at, x, inputs, state):
            assert at != int(state.value), "a skipped block has no end"
            return x

    run(Skips(), index, lambda model: model.blocks.pop(index))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_after_block_changes_what_the_next_block_reads(index):
    """A multiple of a block's output is a multiple of what its last layers add and of what it was given."""

    @dataclass(frozen=True)
    class After(ToyExtension):
        def after_block(self, model, at, x, inputs, state):
            assert inputs.grid == (3, 2, 2)
            return x + state.value if at == index else x

    class Added(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args):
            return self.block(*args) + VECTOR

    def change(model):
        model.blocks[index] = Added(model.blocks[index])

    run(After(), VECTOR, change)


def test_beside_block_runs_while_its_block_is_on_the_device_and_before_what_is_behind_it():
    visited = []

    @contextlib.contextmanager
    def visit(block):
        visited.append(block)
        yield
        visited.remove(block)

    @dataclass(frozen=True)
    class Beside(ToyExtension):
        def beside_block(self, model, at, x, inputs, state):
            assert visited == [model.blocks[at]] and inputs.grid == (3, 2, 2)
            return x + state.value if at == 1 else x

        def after_block(self, model, at, x, inputs, state):
            assert not visited
            return 2 * x if at == 1 else x

    @dataclass(frozen=True)
    class After(ToyExtension):
        def after_block(self, model, at, x, inputs, state):
            return 2 * (x + state.value) if at == 1 else x

    got, want = (build(extension)[1] for extension in (Beside(), After()))
    got.visit = visit
    given = inputs(Toy(VECTOR))
    assert torch.equal(got(given), want(given)) and not torch.equal(got(given), got(inputs()))


@pytest.mark.parametrize("weightless", [True, False])
def test_blocks_of_other_systems_run_the_hooks_of_weightless_ones(weightless):
    @dataclass(frozen=True)
    class Halves(ToyExtension):
        def self_attn_output(self, block, y, cond):
            return y * cond.value, cond

    if weightless:
        Halves.weightless = True

    @dataclass(frozen=True)
    class Acts(Payload):
        needs: ClassVar[str] = "none"

    @dataclass(frozen=True)
    class OwnBlock(Extension):
        payload: ClassVar[type] = Acts

        def build(self, model):
            model.own = torch.nn.ModuleList([WanAttentionBlock(model.config, sdpa())])
            model.own[0].extensions = model.extensions

        def after_block(self, model, index, x, inputs, state):
            return model.own[0](x, inputs, inputs.conds) if index == 1 else x

    _, model = build(OwnBlock(), Halves())
    got = model(inputs(Acts(), Toy(torch.tensor(0.5))))
    with torch.no_grad():
        scaled("self_attn.o")(model)
        if weightless:
            scaled("self_attn.o")(type("M", (), {"blocks": model.own}))
    close(got, model(inputs(Acts())))


def test_block_cond_chooses_blocks():
    @dataclass(frozen=True)
    class Chosen(ToyExtension):
        def block_cond(self, state, index):
            return state if index == 1 else None

        def self_attn_output(self, block, y, cond):
            return y * cond.value, cond

    run(Chosen(), 0.5, lambda model: scaled("self_attn.o")(type("M", (), {"blocks": [model.blocks[1]]})))


def test_attend_changes_q_k_and_v():
    @dataclass(frozen=True)
    class Attend(ToyExtension):
        def attend(self, block, call, cond):
            return call._replace(v=call.v * cond.value), cond

    run(Attend(), 0.5, scaled("self_attn.v"))


def test_self_attn_changes_the_heads():
    @dataclass(frozen=True)
    class SelfAttn(ToyExtension):
        def self_attn(self, block, heads, cond):
            return heads._replace(out=heads.out * cond.value), cond

    run(SelfAttn(), 0.5, scaled("self_attn.v"))


def test_self_attn_reads_placed_queries_and_keys():
    """Attention computed again from them, in float64, is the attention."""
    seen = []

    @dataclass(frozen=True)
    class Reads(ToyExtension):
        def self_attn(self, block, heads, cond):
            q, k = heads.q.double().transpose(1, 2), heads.k.double().transpose(1, 2)
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            ones = torch.ones(*heads.k.shape[:3], 1, dtype=torch.float64).transpose(1, 2)
            seen.append((weights @ ones).mean())
            v = block.self_attn.split(block.self_attn.v(cond.scratch[0])).double().transpose(1, 2)
            return heads._replace(out=(weights @ v).transpose(1, 2).to(heads.out.dtype)), cond

    base, model = build(Reads())
    blocks = model.blocks
    held = []
    for block in blocks:
        block.self_attn.q.register_forward_pre_hook(lambda m, args: held.append(args[0]))

    class Late:
        def __getitem__(self, _):
            return held[-1]

    model.extensions[0].__class__.block_cond = lambda self, state, index: Amount(state.value, Late())
    close(model(inputs(Toy(torch.tensor(1.0)))), base(inputs()))
    assert len(seen) == 3


def test_self_attn_that_reads_nothing_is_not_called():
    @dataclass(frozen=True)
    class Quiet(ToyExtension):
        def reads_heads(self, cond):
            return None

        def self_attn(self, block, heads, cond):
            raise AssertionError("reads_heads said no")

    base, model = build(Quiet())
    assert torch.equal(model(inputs(Toy(torch.tensor(1.0)))), base(inputs()))


def test_self_attn_output_changes_the_projection():
    @dataclass(frozen=True)
    class Output(ToyExtension):
        def self_attn_output(self, block, y, cond):
            return y * cond.value, cond

    run(Output(), 0.5, scaled("self_attn.o"))


def test_self_attn_input_changes_what_is_projected():
    @dataclass(frozen=True)
    class Input(ToyExtension):
        def self_attn_input(self, block, x, cond):
            return x + cond.value, cond

    def change(model):
        for block in model.blocks:
            block.modulation[:, 0].add_(VECTOR)

    run(Input(), VECTOR, change)


def test_projected_changes_queries_keys_and_values_and_has_their_input():
    @dataclass(frozen=True)
    class Projected(ToyExtension):
        def projected(self, block, value, cond):
            x, q, k, v = value
            torch.testing.assert_close(q, block.self_attn.q(x))
            return value._replace(q=q + cond.value, k=k - cond.value, v=v * 2), cond

    def change(model):
        for block in model.blocks:
            block.self_attn.q.bias.add_(VECTOR)
            block.self_attn.k.bias.sub_(VECTOR)
        scaled("self_attn.o")(model)
        for block in model.blocks:
            block.self_attn.o.weight.mul_(4)
            block.self_attn.o.bias.mul_(2)

    run(Projected(), VECTOR, change)


def test_before_cross_attn_sees_and_changes_the_residual_stream():
    @dataclass(frozen=True)
    class Before(ToyExtension):
        def before_cross_attn(self, block, x, cond):
            return x * 3, cond._replace(scratch=x)

        def after_cross_attn(self, block, x, cond):
            return cond.scratch + cond.value, cond

    def change(model):
        for block in model.blocks:
            block.cross_attn.o.weight.zero_()
            block.cross_attn.o.bias.copy_(VECTOR)

    run(Before(), VECTOR, change)


@pytest.mark.parametrize("hook", ["self_attn_input", "projected"])
def test_the_input_that_a_hook_reads_is_not_quantized(hook):
    seen = []

    def read(self, block, value, cond):
        seen.append(value if hook == "self_attn_input" else value.x)
        return value, cond

    _, model = build(dataclass(frozen=True)(type("Reader", (ToyExtension,), {hook: read}))())
    for block in model.blocks:
        for name in ("q", "k", "v"):
            layer = getattr(block.self_attn, name)
            setattr(block.self_attn, name, Fp8MatmulLinear.quantize(layer.weight, layer.bias, torch.float8_e4m3fn))
    model(inputs(Toy(torch.tensor(1.0))))
    assert len(seen) == 3 and all(isinstance(x, torch.Tensor) for x in seen)


def test_cross_attn_changes_the_heads_and_has_the_queries():
    @dataclass(frozen=True)
    class Cross(ToyExtension):
        def cross_attn(self, block, heads, cond):
            assert heads.q.shape == heads.out.shape and heads.k is None
            return heads._replace(out=heads.out * cond.value), cond

    run(Cross(), 0.5, scaled("cross_attn.v"))


def test_after_cross_attn_changes_the_residual_stream():
    @dataclass(frozen=True)
    class Residual(ToyExtension):
        def after_cross_attn(self, block, x, cond):
            return x + cond.value, cond

    def change(model):
        for block in model.blocks:
            block.cross_attn.o.bias.add_(VECTOR)

    run(Residual(), VECTOR, change)


def test_scratch_flows_from_hook_to_hook():
    @dataclass(frozen=True)
    class Scratch(ToyExtension):
        def self_attn_output(self, block, y, cond):
            return y, cond._replace(scratch=cond.value * 2)

        def after_cross_attn(self, block, x, cond):
            return x + cond.scratch, cond

    def change(model):
        for block in model.blocks:
            block.cross_attn.o.bias.add_(2 * VECTOR)

    run(Scratch(), VECTOR, change)


@dataclass(frozen=True)
class OtherToy(Toy):
    pass


def test_hooks_run_in_the_order_of_the_extensions():
    @dataclass(frozen=True)
    class Halves(ToyExtension):
        def self_attn_output(self, block, y, cond):
            return y * cond.value, cond

    @dataclass(frozen=True)
    class Adds(ToyExtension):
        payload: ClassVar[type] = OtherToy

        def self_attn_output(self, block, y, cond):
            return y + cond.value, cond

    class Plain(Toy):
        pass

    half, one = Plain(torch.tensor(0.5)), OtherToy(torch.tensor(1.0))
    Halves.payload = Plain

    def changed(weight, bias):
        base, _ = build()
        with torch.no_grad():
            for block in base.blocks:
                block.self_attn.o.weight.mul_(weight)
                block.self_attn.o.bias.copy_(bias(block.self_attn.o.bias))
        return base(inputs())

    _, first = build(Halves(), Adds())
    _, second = build(Adds(), Halves())
    close(first(inputs(half, one)), changed(0.5, lambda b: b * 0.5 + 1))
    close(second(inputs(half, one)), changed(0.5, lambda b: (b + 1) * 0.5))
    assert torch.equal(first(inputs(one, half)), first(inputs(half, one))), "the order of payloads means nothing"


def test_two_payloads_of_a_kind_are_refused():
    _, model = build(ToyExtension())
    with pytest.raises(ValueError, match="Toy twice"):
        model(inputs(Toy(torch.tensor(1.0)), Toy(torch.tensor(1.0))))


def tokens(rows=None, count=6):
    mod = torch.randn(1, 1 if rows is None else 3, 6, 8)
    embedding, latents = torch.randn(1, 1, 8), torch.randn(1, 16, 3, 2, 4)
    return Tokens(torch.randn(1, count, 8), mod, rows, torch.randn(count, 2, 2), (3, 1, 2), None, embedding, latents)


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 0, 1, 1, 2, 2])])
def test_appended_tokens_have_positions_and_a_modulation(rows):
    before, x, rope, mod = tokens(rows), torch.randn(1, 2, 8), torch.randn(2, 2, 2), torch.randn(1, 1, 6, 8)
    after = before.appended(x, rope, mod)
    assert torch.equal(after.x, torch.cat((before.x, x), 1)) and torch.equal(after.rope, torch.cat((before.rope, rope)))
    assert torch.equal(after.mod[:, after.rows[-2:]], mod.expand(-1, 2, -1, -1))
    kept = before.mod[:, :1].expand(-1, 6, -1, -1) if rows is None else before.mod[:, rows]
    assert torch.equal(after.mod[:, after.rows[:6]], kept)
    alike = before.appended(x, rope)
    assert (alike.rows is None) == (rows is None) and alike.mod is before.mod
    assert rows is None or alike.rows[-2:].tolist() == [0, 0]
    assert video_tokens(after.grid) == 6


def test_appended_tokens_are_not_in_the_video():
    @dataclass(frozen=True)
    class Appends(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            return tokens.appended(tokens.x[:, :2] * payload.value, tokens.rope[:2]), None

    base, model = build(Appends())
    got = model(inputs(Toy(torch.tensor(2.0))))
    assert got.shape == base(inputs()).shape and not torch.equal(got, base(inputs()))


def test_systems_and_blocks_are_given_the_part_of_the_sequence_that_the_ranks_chose():
    part, asked, seen = Shard(), [], []

    class Chosen(Ranks):
        def shard(self, grid, tokens):
            asked.append((grid, tokens))
            return part

    @dataclass(frozen=True)
    class Looks(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            return tokens.appended(tokens.x[:, :2], tokens.rope[:2]), Amount(payload.value)

        def on(self, state, shard):
            seen.append(shard)
            return state

        def after_block(self, model, at, x, inputs, state):
            seen.append(inputs.shard)
            return x

    _, model = build(Looks())
    with model.shared_by(Chosen()):
        model(inputs(Toy(torch.tensor(1.0))))
    assert asked == [((3, 2, 2), 12 + 2)] and len(seen) == 1 + 3 and all(shard is part for shard in seen)


def test_rope_starts_where_it_is_asked_to():
    _, model = build()
    whole = model.rope((5, 3, 4)).unflatten(0, (5, 3, 4))
    assert torch.equal(model.rope((2, 1, 3), start=(3, 2, 1)).unflatten(0, (2, 1, 3)), whole[3:5, 2:3, 1:4])


def test_modulation_is_that_of_the_forward():
    """A system's own rows of modulation come from the model's own layers."""
    seen = {}

    @dataclass(frozen=True)
    class Looks(ToyExtension):
        def prepare(self, model, payload, inputs, tokens):
            seen["same"] = torch.equal(model.modulation(tokens.embedding), tokens.mod)
            return tokens, None

    _, model = build(Looks())
    model(inputs(Toy(torch.tensor(1.0))))
    assert seen["same"]


@pytest.mark.parametrize("name", ["parts", "embed_text", "modulation", "rope"])
def test_the_model_does_what_systems_may_ask_of_it(name):
    assert inspect.signature(getattr(WanModel, name)) == inspect.signature(getattr(Transformer, name))


def test_nothing_of_a_toy_stays():
    """The same model, asked again without the payload, answers as before."""

    @dataclass(frozen=True)
    class Output(ToyExtension):
        def self_attn_output(self, block, y, cond):
            return y * cond.value, cond

    base, model = build(Output())
    state = copy.deepcopy(model.state_dict())
    model(inputs(Toy(torch.tensor(0.5))))
    assert torch.equal(model(inputs()), base(inputs()))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
