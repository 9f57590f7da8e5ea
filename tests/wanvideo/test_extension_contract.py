"""What every extension owes the transformer; a new system joins these tests with one row of CASES."""

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from wanvideo_wrapper.enhance_a_video import EnhanceArgs
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.wanvideo import registry
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension, RunCache, Step
from wanvideo_wrapper.wanvideo.extensions.clip_image import ClipImage, ClipImageExtension
from wanvideo_wrapper.wanvideo.modules.model import ModelInputs, WanModel

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=3, text_dim=8, text_len=4)
FEATURES = dict(features=2 * 6, intermediate_dim=10, context_tokens=4, output_dim=12)


def speech(strength, speakers=1):
    return AudioWindow(torch.randn(1, speakers, 9, 5, 2, 6), torch.tensor(float(strength)))


@dataclass(frozen=True)
class Case:
    extension: Extension
    payload: object
    absent: object | None


CASES = {
    "clip_image": Case(ClipImageExtension(clip_dim=16), ClipImage(torch.randn(1, 7, 16)), None),
    "clip_image_flf2v": Case(ClipImageExtension(clip_dim=16, positions=14), ClipImage(torch.randn(1, 14, 16)), None),
    "multitalk": Case(MultiTalk(**FEATURES, voiced=(0, 1, 2)), speech(0.7), speech(0)),
    "multitalk_some_blocks": Case(MultiTalk(**FEATURES, voiced=(1,)), speech(0.7), speech(0)),
    "multitalk_two_speakers": Case(MultiTalk(**FEATURES, voiced=(0, 1, 2)), speech(0.7, 2), speech(0, 2)),
    "enhance_a_video": Case(registry.EnhanceAVideo(), EnhanceArgs(30.0), EnhanceArgs(0.0)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(*extensions):
    torch.manual_seed(11)
    base = WanModel(CONFIG)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = WanModel(CONFIG, extensions)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.load_state_dict(base.state_dict(), strict=False)
    return base, model


def inputs(*payloads, step=0, seed=5, **more):
    generator = torch.Generator().manual_seed(seed)
    return ModelInputs(
        latents=torch.randn(1, 16, 3, 4, 4, generator=generator), timestep=torch.tensor([500.0 - step]),
        text=(torch.randn(4, 8, generator=generator),), payloads=payloads, step=Step(index=step, total=8), **more,
    )  # fmt: skip


@every_case
@torch.no_grad()
def test_absent_is_bit_identical_and_present_acts(case):
    base, model = build(case.extension)
    plain = base(inputs())
    assert torch.equal(plain, model(inputs()))
    if case.absent is not None:
        assert torch.equal(plain, model(inputs(case.absent)))
    assert not torch.equal(plain, model(inputs(case.payload)))


@every_case
def test_detect_finds_what_build_made(case):
    _, model = build(case.extension)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert case.extension in registry.detect(shapes)


@every_case
def test_owns_exactly_the_keys_it_adds(case):
    base, model = build(case.extension)
    added = set(model.state_dict()) - set(base.state_dict())
    assert {k for k in model.state_dict() if case.extension.owns(k)} == added


@every_case
def test_without_weights_the_missing_key_is_named(case):
    base, _ = build(case.extension)
    with pytest.raises(ValueError) as error:
        base(inputs(case.payload))
    assert str(error.value) == case.payload.needs


@every_case
def test_each_parameter_is_resident_or_in_one_swap_unit(case):
    _, model = build(case.extension)
    units = {id(p): f"blocks.{i}" for i, block in enumerate(model.blocks) for p in block.parameters()}
    for index in range(len(model.blocks)):
        for module in case.extension.travels_with(model, index):
            for parameter in module.parameters():
                assert units.setdefault(id(parameter), f"with {index}") == f"with {index}"


@every_case
@torch.no_grad()
def test_unit_modules_run_only_while_resident(case):
    _, model = build(case.extension)
    resident = []

    @contextlib.contextmanager
    def around(index):
        resident.append(index)
        yield
        resident.remove(index)

    model.around_block = around
    ran = []
    for i, block in enumerate(model.blocks):
        for module in [*block.modules(), *(m for t in case.extension.travels_with(model, i) for m in t.modules())]:
            module.register_forward_pre_hook(lambda m, a, i=i: ran.append(i in resident))
    model(inputs(case.payload))
    assert ran and all(ran)


@every_case
@torch.no_grad()
def test_full_graph_and_no_recompile_while_strength_and_step_change(case):
    torch._dynamo.reset()
    _, model = build(case.extension)
    want = [model(inputs(p, step=s)) for s, p in enumerate(changing(case.payload))]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    keys = list(model.state_dict())
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    cache = RunCache()
    got = [model(inputs(p, step=s, caches=(cache,))) for s, p in enumerate(changing(case.payload))]
    frames = counter.frame_count
    got += [model(inputs(p, step=s, caches=(cache,))) for s, p in enumerate(changing(case.payload))]
    assert counter.frame_count == frames <= len(model.blocks)
    assert list(model.state_dict()) == keys
    for a, b in zip(want, got[: len(want)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def changing(payload):
    """Eight steps whose strength changes where the payload has one."""
    for step in range(8):
        if isinstance(payload, AudioWindow):
            yield replace(payload, scale=torch.tensor(0.5 + 0.1 * step))
        elif isinstance(payload, EnhanceArgs):
            yield replace(payload, weight=20.0 + step)
        else:
            yield payload


@every_case
@torch.no_grad()
def test_a_batch_equals_its_rows(case):
    _, model = build(case.extension)
    one, two = inputs(case.payload, seed=1), inputs(case.payload, seed=2)
    both = ModelInputs(
        latents=torch.cat((one.latents, two.latents)), timestep=torch.cat((one.timestep, two.timestep)),
        text=one.text + two.text, payloads=(case.payload.stack([case.payload]),), step=one.step,
    )  # fmt: skip
    torch.testing.assert_close(model(both), torch.cat((model(one), model(two))), rtol=1e-4, atol=1e-5)


class Shift(NamedTuple):
    amount: torch.Tensor


@dataclass(frozen=True)
class ShiftPayload:
    amount: float
    needs: ClassVar[str] = "none"

    def window(self, frames):
        return self

    def to(self, device, dtype):
        return self

    def stack(self, others):
        return self


@dataclass(frozen=True)
class EveryHook(Extension):
    """Adds a little in every hook, appends a token in `prepare` and limits who sees whom in `attend`."""

    payload: ClassVar[type] = ShiftPayload

    def prepare(self, model, payload, step, tokens):
        extra = tokens._replace(
            x=torch.cat((tokens.x, tokens.x[:, :1]), 1), rope=torch.cat((tokens.rope, tokens.rope[:1]))
        )
        return extra, Shift(torch.tensor(payload.amount))

    def block_cond(self, state, index, kept):
        return state

    def self_attn_input(self, block, x, cond):
        return x + cond.amount, cond

    def attend(self, block, call, cond):
        length = call.q.shape[1]
        return call._replace(spans=(((0, length - 1), (0, length)), ((length - 1, length), (length - 1, length)))), cond

    def reads_heads(self, cond):
        return True

    def self_attn(self, block, heads, cond):
        assert heads.q is not None and heads.k is not None
        return heads._replace(out=heads.out + cond.amount * heads.q), cond

    def self_attn_output(self, block, y, cond):
        return y + cond.amount, cond

    def cross_attn(self, block, heads, cond):
        return heads._replace(out=heads.out + cond.amount * heads.q), cond

    def after_cross_attn(self, block, x, cond):
        return x + cond.amount, cond

    def after_block(self, model, index, x, inputs, state):
        return x + state.amount


@torch.no_grad()
def test_every_hook_runs_and_added_tokens_are_not_in_the_video():
    base, model = build(EveryHook())
    got = model(inputs(ShiftPayload(0.1)))
    assert got.shape == base(inputs()).shape
    assert not torch.equal(got, base(inputs()))


def test_two_extensions_that_claim_one_key_are_both_named(monkeypatch):
    @dataclass(frozen=True)
    class Rival(ClipImageExtension):
        pass

    monkeypatch.setattr(registry, "EXTENSIONS", (ClipImageExtension, Rival))
    with pytest.raises(ValueError, match="ClipImageExtension and Rival"):
        registry.detect({"img_emb.proj.1.weight": (16, 16)})
