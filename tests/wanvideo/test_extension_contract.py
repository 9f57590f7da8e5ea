"""What every extension owes the transformer. A new system joins with tests/<folder>/cases.py (see contract.py)."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from contract import ALL_CASES, HEIGHT, WIDTH, build, inputs, randomize
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.loading import FULL_PRECISION, quantizable
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.systems import Systems
from wanvideo_wrapper.wanvideo.tokens import video_tokens

every_case = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)


def built(case, *more):
    return build(case.extension, *more, config=case.config)


def full(case):
    """Inputs without the payload: its channels are in the latents."""
    return inputs(channels=case.config.in_dim)


@every_case
def test_absent_is_bit_identical_and_present_acts(case):
    base, model = built(case)
    plain = model(full(case))
    # Another architecture has other layers, whatever is connected.
    assert case.extension.layout is not None or torch.equal(plain, base(full(case)))
    if case.absent is not None:
        assert torch.equal(plain, model(inputs(case.absent)))
    present = model(inputs(case.payload))
    assert present.isfinite().all() and not torch.equal(plain, present)


@every_case
def test_detect_finds_what_build_made(case):
    _, model = built(case)
    assert case.extension in SYSTEMS.detect({k: tuple(v.shape) for k, v in model.state_dict().items()})


@every_case
def test_owns_exactly_the_keys_it_adds(case):
    base, model = built(case)
    added = set(model.state_dict()) - set(base.state_dict())
    assert {k for k in model.state_dict() if case.extension.owns(k)} == added


@every_case
def test_without_weights_the_missing_key_is_named(case):
    base, _ = built(case)
    with pytest.raises(ValueError) as error:
        base(inputs(case.payload))
    assert str(error.value) == case.payload.needs
    assert not base.reads(case.payload)


@every_case
def test_each_parameter_is_in_one_block_at_most_and_blocks_run_only_while_visited(case):
    _, model = built(case)
    blocks = [block for stack in model.stacks().values() for block in stack]
    owners = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(owners) == len(set(owners)) and all(a is b for a, b in zip(model.blocks, blocks, strict=False))
    visited, ran = [], []

    class Visit:
        def __init__(self, block):
            self.block = block

        def __enter__(self):
            visited.append(self.block)

        def __exit__(self, *_):
            visited.remove(self.block)

    model.visit = Visit
    for block in blocks:
        for module in block.modules():
            module.register_forward_pre_hook(lambda m, a, block=block: ran.append(any(block is b for b in visited)))
    model(inputs(case.payload))
    assert ran and all(ran)


@every_case
def test_full_graph_and_no_recompile_while_strength_and_step_change(case):
    torch._dynamo.reset()
    _, model = built(case)
    want = [model(inputs(case.at_step(step), step=step)) for step in range(8)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    keys = list(model.state_dict())
    blocks = [block for stack in model.stacks().values() for block in stack]
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    got = [model(inputs(case.at_step(step), step=step)) for step in range(8)]
    compiled = counter.frame_count
    got += [model(inputs(case.at_step(step), step=step)) for step in range(8)]
    assert counter.frame_count == compiled <= len(blocks)
    assert list(model.state_dict()) == keys
    for a, b in zip(want * 2, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def in_float64(case, **fields):
    """A model and its inputs; where two ways differ there it is not by the order of sums but by a mistake.

    A network beside the model stays in float32.
    """
    given = inputs(case.payload.to(torch.device("cpu"), torch.float64), **fields)
    given = replace(given, latents=given.latents.double(), text=tuple(t.double() for t in given.text))
    return built(case)[1].double(), given


@every_case
def test_a_batch_equals_its_rows(case):
    (model, one), (_, two) = in_float64(case, seed=1), in_float64(case, seed=2)
    rows = {name: torch.cat([getattr(each, name) for each in (one, two)]) for name in ("latents", "timestep")}
    payload = one.payloads[0].stack([one.payloads[0]])
    both = replace(one, **rows, text=one.text + two.text, payloads=(payload,))
    torch.testing.assert_close(model(both), torch.cat((model(one), model(two))), rtol=1e-4, atol=1e-5)


@every_case
def test_pieces_of_the_tokens_equal_all_at_once(case):
    model, given = in_float64(case, batch=2)
    want = model(given)
    for at_once in (5, 8):
        with model.sparing(at_once):
            torch.testing.assert_close(model(given), want, rtol=1e-6, atol=1e-6)
    assert model.tokens_at_once == 0


@every_case
def test_frames_that_share_a_time_equal_one_time(case):
    """Times by frame, as of given first frames, bring rows of modulation."""
    model, given = in_float64(case)
    by_frame = replace(given, timestep=given.timestep[:, None].expand(-1, 3))
    torch.testing.assert_close(model(by_frame), model(given), rtol=1e-4, atol=1e-5)


@every_case
def test_layers_in_bfloat16_get_what_they_can_multiply(case):
    """As a model is loaded: patch embeddings in float32, the rest in base precision."""
    _, model = built(case)
    want = model(inputs(case.payload))
    for name, parameter in model.named_parameters():
        if not any(part in name for part in FULL_PRECISION):
            parameter.data = parameter.data.bfloat16()
    got = model(inputs(case.payload.to(torch.device("cpu"), torch.bfloat16)))
    assert (got - want).norm() < 0.1 * want.norm()


@every_case
def test_the_window_of_everything_is_everything(case):
    _, model = built(case)
    whole = case.payload.window(whole_window(3))
    assert torch.equal(model(inputs(case.payload)), model(inputs(whole)))


@every_case
def test_payloads_move(case):
    moved = case.payload.to(torch.device("cpu"), torch.float64)
    assert type(moved) is type(case.payload)


@dataclass(frozen=True)
class Extra(Payload):
    needs: ClassVar[str] = "none"


class Spans(NamedTuple):
    video: int
    total: int
    seen: torch.Tensor


@dataclass(frozen=True)
class UnseenTokens(Extension):
    """Appends tokens with a modulation of their own that no video token attends to."""

    payload: ClassVar[type] = Extra

    def prepare(self, model, payload, inputs, tokens):
        count, video = 5, tokens.x.shape[1]
        noise = torch.randn(tokens.x.shape[0], count, tokens.x.shape[2], generator=torch.Generator().manual_seed(3))
        tokens = tokens.appended(noise, model.rope((1, 1, count), start=(0, 9, 9)), tokens.mod[:, :1] * 0.5)
        return tokens, Spans(video, video + count, tokens.x.sum())

    def attend(self, block, call, cond):
        """Spans that others gave to the video's tokens stay."""
        video, total, _ = cond
        before = tuple(span for span in call.spans if span[0][1] <= video) or (((0, video), (0, video)),)
        return call._replace(spans=(*before, ((video, total), (0, total)))), cond


def own_tokens(case):
    """Whether the case's system appends tokens itself."""
    _, model = built(case)
    lengths = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    model(inputs(case.payload))
    return lengths[0] != 3 * (HEIGHT // 2) * (WIDTH // 2)


@every_case
def test_tokens_that_another_system_appends_behind_disturb_nothing(case):
    if own_tokens(case):
        pytest.skip("appends tokens itself, so that the stranger's spans would hide its own")
    if case.extension.layout is not None:
        pytest.skip("what it makes sees all tokens, the stranger's too")
    _, model = built(case, UnseenTokens())
    torch.testing.assert_close(model(inputs(case.payload, Extra())), model(inputs(case.payload)), rtol=1e-4, atol=1e-5)


class Between(NamedTuple):
    start: int
    stop: int


@dataclass(frozen=True)
class Hidden(Payload):
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class TokensBefore(Extension):
    """Appends five tokens before other systems append theirs."""

    payload: ClassVar[type] = Extra

    def prepare(self, model, payload, inputs, tokens):
        noise = torch.randn(tokens.x.shape[0], 5, tokens.x.shape[2], generator=torch.Generator().manual_seed(3))
        return tokens.appended(noise, model.rope((1, 1, 5), start=(0, 9, 9)), tokens.mod[:, :1] * 0.5), None


@dataclass(frozen=True)
class HidesThem(Extension):
    """Takes the five tokens away from what others attend to: a hook that comes last, when all spans are known."""

    payload: ClassVar[type] = Hidden

    def prepare(self, model, payload, inputs, tokens):
        return tokens, Between(video_tokens(tokens.grid), video_tokens(tokens.grid) + 5)

    def attend(self, block, call, cond):
        start, stop = cond
        k, v = (torch.cat((t[:, :start], t[:, stop:]), dim=1) for t in (call.k, call.v))
        shown = [min(place, start) if place < stop else place - 5 for place in range(call.k.shape[1] + 1)]
        spans = tuple((queries, (shown[first], shown[last])) for queries, (first, last) in call.spans)
        return call._replace(k=k, v=v, spans=spans), cond


@every_case
def test_tokens_that_another_system_appends_before_disturb_nothing(case):
    """A system that appends tokens must ask where its own begin."""
    if not own_tokens(case):
        pytest.skip("appends no tokens, so that strangers' are behind all that it knows")
    model = build(TokensBefore(), case.extension, HidesThem(), config=case.config)[1]
    both = model(inputs(Extra(), case.payload, Hidden()))
    torch.testing.assert_close(both, model(inputs(case.payload)), rtol=1e-4, atol=1e-5)


# Weights of a system, in the model or in one of its own, are made for one architecture.
OWN_WEIGHTS = ("uni3c",)


def may_meet(one, other):
    kinds = [type(ALL_CASES[name].extension) for name in (one, other)]
    # Those that read the same payload are two ways to do the same.
    if kinds[0].payload is kinds[1].payload or ALL_CASES[one].sizes != ALL_CASES[other].sizes:
        return False
    return all(kind.layout is None for kind in kinds) or not any(map(brings_weights, (one, other), kinds))


def brings_weights(name, kind):
    return kind.layout is None and (name in OWN_WEIGHTS or kind.build is not Extension.build)


PAIRS = [pair for pair in itertools.combinations(ALL_CASES, 2) if may_meet(*pair)]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_pair_runs_together(one, other):
    """Both act, in the registry's order, unless one cannot honour tokens that the other appends and says so."""
    order = [type(e) for e in (ALL_CASES[one].extension, ALL_CASES[other].extension)]
    assert sorted(order, key=SYSTEMS.extensions.index) == order, "ALL_CASES follow the registry"
    first, second = ALL_CASES[one], ALL_CASES[other]
    config = WanConfig(**{**first.config.__dict__, "in_dim": 16 + first.joins + second.joins})
    model = randomize(WanModel(config, (first.extension, second.extension)))
    try:
        both = model(inputs(first.payload, second.payload))
    except ValueError as error:
        assert "split_attention" in (one, other) and "reference tokens" in str(error)
        assert own_tokens(first) or own_tokens(second)
        return
    assert both.isfinite().all()
    for case, rest in ((first, second), (second, first)):
        alone = model(inputs(case.payload, channels=16 + rest.joins))
        if not rest.joins:
            assert not torch.equal(both, alone)


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept, self.small = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


@dataclass(frozen=True)
class OwnStack(Extension):
    payload: ClassVar[type] = Extra
    high_precision: ClassVar[tuple[str, ...]] = ("kept",)

    def build(self, model):
        model.own = torch.nn.ModuleList([Part()])
        model.top = torch.nn.Linear(4, 4)

    def stacks(self, model):
        return {"own": model.own}


def test_layers_of_own_stacks_are_quantized_but_for_those_that_want_precision():
    _, model = build(OwnStack())
    names = ("blocks.0.ffn.0", "own.0.small", "own.0.kept", "top", "head.head")
    assert [quantizable(model, name) for name in names] == [True, True, False, False, False]


def test_two_extensions_that_claim_one_key_are_both_named():
    @dataclass(frozen=True)
    class Rival(ClipImageExtension):
        pass

    with pytest.raises(ValueError, match="ClipImageExtension and Rival"):
        Systems(extensions=(ClipImageExtension, Rival)).detect({"img_emb.proj.1.weight": (16, 16)})


def test_a_block_of_another_system_inside_a_block_may_read_pictures_with_weights_of_its_own():
    extension = ClipImageExtension(clip_dim=4)
    assert extension.owns("blocks.3.cross_attn.k_img.weight") and extension.owns("img_emb.proj.1.weight")
    assert not extension.owns("blocks.3.own.cross_attn.k_img.weight")
