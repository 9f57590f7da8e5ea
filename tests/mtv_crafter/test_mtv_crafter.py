"""Motion attention against its authors' form in float64, the tokenizer against theirs, files and nodes."""

import pytest
import torch
import torch.nn.functional as F
from contract import randomize
from float64_wan import Exact, relative
from layouts import Layout
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.mtv_crafter.extension import Motion, MotionAttention, MtvCrafter, motion_rope
from wanvideo_wrapper.mtv_crafter.joints import mean
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

CONFIG = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=4)
GRID, SIDES, FRAMES = (3, 2, 3), (4, 6), 3
EXTENSION = MtvCrafter(blocks=(1,))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def motion(frames=FRAMES, **fields):
    return Motion(rand(1, frames * 24, 20, seed=8), **fields)


def inputs(*payloads, batch=1, index=3):
    return ModelInputs(
        latents=rand(batch, 16, GRID[0], *SIDES, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(4, 8, seed=2 + row) for row in range(batch)), payloads=payloads,
        step=Step(index=index, total=10, in_run=index),
    )  # fmt: skip


def interleaved(positions, size):
    """Cosine and sine [S, size], each twice in a row."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(positions.double(), frequencies)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


def authors_positions(frames, time, axis):
    place = mean() - mean().mean(0)
    turns = [interleaved(torch.arange(frames), time), *(interleaved(place[:, i], axis) for i in range(3))]
    both = []
    for part in (0, 1):
        first = turns[0][part][:, None].expand(-1, 24, -1)
        others = torch.cat([turn[part] for turn in turns[1:]], dim=1).expand(frames, -1, -1)
        both.append(torch.cat((first, others), dim=2).flatten(0, 1))
    return both


def authors_attention(w, name, x, tokens, turns):
    """mvdit_transformer_17b: keys are read as [B, H, N, D] without a transpose, then turned by cosine and sine."""
    heads, size = w.config.num_heads, w.config.dim // w.config.num_heads
    tokens = F.pad(tokens.double(), (0, w.config.dim - tokens.shape[2])).expand(x.shape[0], -1, -1)
    q = w.turned(w.heads(w.rms(f"{name}.norm_q", w.linear(f"{name}.q", x))), turns)
    k = w.rms(f"{name}.norm_k", w.linear(f"{name}.k", tokens)).reshape(x.shape[0], heads, -1, size)
    cos, sin = authors_positions(tokens.shape[1] // 24, size - 3 * 4, 4)
    real, imaginary = k.unflatten(-1, (-1, 2)).unbind(-1)
    k = k * cos + torch.stack((-imaginary, real), -1).flatten(-2) * sin
    return w.linear(f"{name}.o", w.attention(q, k.transpose(1, 2), w.heads(w.linear(f"{name}.v", tokens))))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_model_is_the_authors(batch):
    model, payload = randomize(WanModel(CONFIG, (EXTENSION,))), motion(strengths=(1.0, 0.6))
    asked, w = inputs(payload, batch=batch), Exact(model)
    x, (e, mod), text, turns = w.patches(asked.latents), w.times(asked.timestep), w.text(asked.text), w.turns(GRID)
    for index in w.blocks:
        shift, scale, gate, shift2, scale2, gate2 = w.modulated(index, mod)
        seen = w.attention(*w.self_qkv(index, w.norm(x) * (1 + scale) + shift, turns))
        x = x + gate * w.linear(f"blocks.{index}.self_attn.o", seen)
        x = x + w.cross(index, x, text)
        if index in EXTENSION.blocks:
            name = f"blocks.{index}"
            moved = authors_attention(w, f"{name}.motion_attn", w.norm(x, f"{name}.norm4"), payload.tokens, turns)
            x = x + 0.6 * moved
        x = x + gate2 * w.feed_forward(index, w.norm(x) * (1 + scale2) + shift2)
    want = w.velocity(x, e, GRID)
    assert relative(model(asked), want) < 1e-5
    for other in (inputs(batch=batch), inputs(motion(), batch=batch)):
        assert relative(model(other), want) > 1e-4


def test_positions_of_the_published_heads():
    got = motion_rope(5, 128, torch.device("cpu"))
    cos, sin = authors_positions(5, 44, 28)
    assert got.shape == (120, 64, 2)
    torch.testing.assert_close(got[..., 0].double(), cos[:, ::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[..., 1].double(), sin[:, ::2], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 1.0, True), (0.0, 0.3, True)])
def test_motion_acts_in_its_steps_only(start, end, acts):
    model = randomize(WanModel(CONFIG, (EXTENSION,)))
    assert torch.equal(model(inputs(motion(start=start, end=end))), model(inputs())) != acts


def test_windows_have_their_frames_and_references_none():
    payload = motion(frames=5)
    frames = payload.tokens.unflatten(1, (5, 24))
    part = payload.window(Window(latents=(0, 3, 4, 6), pixels=(), leading=1, trailing=1, total=7))
    assert torch.equal(part.tokens, frames[:, [2, 3]].flatten(1, 2))
    assert torch.equal(payload.window(whole_window(3)).tokens, payload.tokens[:, :72])
    with pytest.raises(ValueError, match="cover 5 latent frames .* needs 6"):
        payload.window(whole_window(6))


def test_tokens_wider_than_the_model_are_refused():
    model = randomize(WanModel(CONFIG, (EXTENSION,)))
    with pytest.raises(ValueError, match="have 60 channels but the model 48"):
        model(inputs(Motion(rand(1, 72, 60))))


@torch.no_grad()
def test_every_linear_layer_of_motion_attention_reads_dense_rows():
    """Whatever memory tokens, motion, projections and attention give."""
    module, dense, scattered = randomize(MotionAttention(CONFIG)), [], Layout("permuted", 0, 0).place
    x, tokens, turns = rand(2, 18, 48), rand(2, 72, 48, seed=1), WanModel(CONFIG).rope((3, 2, 3))
    more = motion_rope(3, 24, x.device)
    want = module.attend(x, tokens, turns, more)
    for name in "qkvo":
        layer = getattr(module, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: dense.append((name, given[0].is_contiguous())))
        if name != "o":
            layer.register_forward_hook(lambda _, __, out: scattered(out))
    kernel = module.attention

    def strict(q, k, v):
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        return scattered(kernel(q, k, v))

    module.attention = strict
    got = module.attend(x, tokens, turns, more)
    assert dense == [(name, True) for name in "qkvo"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_of_others_stay_and_the_stream_is_dense():
    model, seen = randomize(WanModel(CONFIG, (EXTENSION,))), []
    block = model.blocks[1]
    block.motion_attn.q.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    state = EXTENSION.prepare(model, motion(), inputs(), model._embed(inputs().latents, inputs()))[1]
    x = rand(2, 25, 48)
    state = state._replace(motion=state.motion.expand(2, -1, -1))
    got, _ = EXTENSION.after_cross_attn(block, x, state)
    assert torch.equal(got[:, 18:], x[:, 18:]) and not torch.equal(got[:, :18], x[:, :18]) and seen == [True]


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_fast", "fp4_scaled"])
def test_quantized_model_with_its_module(option, device, tmp_path, monkeypatch):
    if option.endswith("_fast") and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    whole = tiny.transformer(in_dim=16, extensions=(MtvCrafter(blocks=(0,)),), layers=2)
    own = {key: value for key, value in whole.tensors.items() if EXTENSION.owns(key)}
    base = {key: value for key, value in whole.tensors.items() if key not in own}
    tiny.Tiny(tensors=base, metadata=whole.metadata).save(tmp_path / "base.safetensors", torch.float32)
    tiny.Tiny(tensors=own).save(tmp_path / "motion.safetensors", torch.float32)

    def run(precision, quantization, place):
        modules = (ModuleFile(tmp_path / "motion.safetensors", MtvCrafter.file),)
        options = LoadOptions(base_dtype=precision, quantization=quantization, modules=modules)
        model = load_wan_model(tmp_path / "base.safetensors", options, StandaloneHost(device=place), SYSTEMS)
        quantized = type(model.transformer.blocks[0].motion_attn.k) is not torch.nn.Linear
        assert quantized == (quantization != "disabled")
        asked = ModelInputs(
            latents=rand(1, 16, 2, 4, 4, seed=1).to(place), timestep=torch.tensor([700.0], device=place),
            text=(rand(5, tiny.TEXT_DIM, seed=2).to(place),),
            payloads=(motion(2).to(torch.device(place), precision),),
        )  # fmt: skip
        with model.active() as transformer:
            return transformer(asked).cpu()

    want = run(torch.float32, "disabled", "cpu")
    got = run(torch.bfloat16 if device == "cuda" else torch.float32, option, device)
    assert relative(got, want.double()) < (0.02 if option == "disabled" else 0.25)
