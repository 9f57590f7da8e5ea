"""EchoShot against a float64 form of its two rotations, and its place in a run."""

import pytest
import torch
from contract import HEIGHT, WIDTH, build, inputs
from tiny_runs import Runs, prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper import nodes_text, tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.echoshot import prompts
from wanvideo_wrapper.echoshot.extension import EchoShot, ShotPrompts, ShotText, shots_of
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs


def turned(x, positions, size):
    """Complex rotation in float64: x [B, L, H, D], positions [L], over the first `size` channels' own frequencies."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    angles = torch.outer(positions.double(), 1e4 ** -(torch.arange(0, size, 2).double() / size))
    return torch.view_as_real(pairs * torch.exp(1j * angles)[None, :, None]).flatten(-2)


def heads(layer, norm, x, count=2):
    y = x.double() @ layer.weight.double().T + layer.bias.double()
    if norm is not None:
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    return y.unflatten(-1, (count, -1))


def softmax_attention(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)


def text_of(model, payload, **more):
    """(tokens with its changes, state of the first block's cross-attention)."""
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[1]))
    model(inputs(payload, **more))
    return seen[0]


def test_cross_attention_is_that_of_the_published_phases():
    _, model = build(EchoShot())
    shots = tuple(torch.randn(n, 8) for n in (3, 1, 5))
    given = text_of(model, ShotPrompts(shots, 3, shots_of(3, 3)))
    cross, q = model.blocks[1].cross_attn, torch.randn(1, 3 * HEIGHT * WIDTH // 4, 2, 12)
    padded = torch.cat((*shots, torch.zeros(16 - 9, 8)))
    linear, _, last = model.text_embedding
    hidden = padded.double() @ linear.weight.double().T + linear.bias.double()
    text = torch.nn.functional.gelu(hidden, approximate="tanh") @ last.weight.double().T + last.bias.double()
    times = torch.tensor([0, 0, 0, 4, 8, 8, 8, 8, 8, *[12] * 7])
    keys = turned(heads(cross.k, cross.norm_k, text[None]), times, 12)
    frame = torch.tensor([0, 4, 8]).repeat_interleave(HEIGHT * WIDTH // 4)
    want = softmax_attention(turned(q, frame, 12), keys, heads(cross.v, None, text[None]))
    got = given.text.attend(cross, q)
    assert isinstance(given.text, ShotText)
    assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_frames_of_each_shot_stand_four_positions_further():
    _, model = build(EchoShot())
    given = text_of(model, ShotPrompts((torch.randn(2, 8), torch.randn(2, 8)), 2))
    places = HEIGHT * WIDTH // 4
    got = torch.view_as_complex(given.rope.double().contiguous())
    size = 12 - 2 * (2 * (12 // 6))
    for frame, position in enumerate((0, 1 + 4, 2 + 4)):
        angles = position * 1e4 ** -(torch.arange(0, size, 2).double() / size)
        row = got[frame * places : (frame + 1) * places, : size // 2]
        torch.testing.assert_close(row, torch.exp(1j * angles).expand_as(row), rtol=1e-5, atol=1e-5)
    plain = model.rope((3, HEIGHT // 2, WIDTH // 2))
    assert torch.equal(given.rope[:, size // 2 :], plain[:, size // 2 :])


def test_without_the_prompt_every_shot_reads_the_negative_one():
    _, model = build(EchoShot())
    negative = inputs(seed=3).text[0]
    payload = ShotPrompts((torch.randn(2, 8), torch.randn(3, 8)), 2)
    bare = payload.without(frozenset({"text"}))
    want = model(inputs(ShotPrompts((negative, negative), 2), seed=3))
    assert torch.equal(model(inputs(bare, seed=3)), want) and payload.without(frozenset({"audio"})) is payload


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(2, 3), (9, 12)])
def test_passes_that_share_a_forward_read_prompts_of_their_own(lengths):
    """Each is padded as it is alone: to 16 tokens, or not at all."""
    _, model = build(EchoShot())
    payload, negative, together = ShotPrompts(tuple(torch.randn(n, 8) for n in lengths), 2), torch.randn(3, 8), []
    payload, latents = payload.window(whole_window(3)), torch.randn(16, 3, HEIGHT, WIDTH)
    model.blocks[0].register_forward_pre_hook(lambda block, args: together.append(len(args[0])))

    def velocity(*, batched):
        denoiser = Denoiser(
            model, Conditions(positive=payload.prompts[0], negative=negative, payloads=(payload,)),
            guidance=Guidance(cfg=(6.0,), payloads=(payload,), batched=batched), device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        return denoiser(latents, torch.tensor(731.0), Step(index=3, total=10, in_run=3))

    got, want = velocity(batched=True), velocity(batched=False)
    assert together == [2, 1, 1] and (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize(
    ("frames", "count", "want"), [(7, 3, (0, 0, 1, 1, 2, 2, 2)), (3, 3, (0, 1, 2)), (2, 1, (0, 0))]
)
def test_shots_share_out_the_frames(frames, count, want):
    assert shots_of(frames, count) == want


def test_windows_keep_the_shots_of_the_whole_video():
    payload = ShotPrompts((torch.randn(2, 8),) * 2, 2)
    assert payload.window(Window((2, 3, 4), (), total=6)).places == (0, 1, 1)
    assert payload.window(Window((0, 3, 4, 7), (), 1, 1, total=8)).places == (0, 0, 1, 1)
    assert payload.window(whole_window(3)).places == (0, 1, 1)
    with pytest.raises(ValueError, match="2 latent frames cannot hold 3 shots"):
        ShotPrompts((torch.randn(2, 8),) * 3, 3).window(whole_window(2))


@pytest.mark.parametrize(
    ("text", "want"),
    [("a | b", None), ("[1] a\n[2]b [3] c ", ["a", "b", "c"]), ("[1][2] a [2] b", ["a", "b"]), ("plain [2]", None)],
)
def test_a_text_of_shots(text, want):
    assert prompts.split(text) == want


@pytest.mark.parametrize("text", ["[1] a", "[1]", " ".join(f"[{n}] x" for n in range(1, 8))])
def test_too_few_or_too_many_shots_are_refused(text):
    with pytest.raises(ValueError, match="EchoShot takes 2 to 6"):
        prompts.split(text)


def test_bars_part_prompts_before_marks_do():
    assert nodes_text._split("[1] a | [2] b") == ["[1] a", "[2] b"]


def test_a_run_of_the_sampler(tmp_path):
    with Runs(tmp_path) as runs:
        shots = tuple(map(prompt, (1, 2)))
        embeds = nodes_text.TextEmbeds(positive=shots, negative=(prompt(0),), payloads=prompts.payloads(shots))
        got = runs.sample(text_embeds=embeds)
        assert got.isfinite().all() and not torch.equal(got, runs.sample(prompts=2))
        (split,) = N["WanVideoExperimentalArgs"]().process("1", *(False,) * 2, 0, False, 1.0, 1.25, 20, False, 0.0,
                                                           False, False, 0.95, 1.0)  # fmt: skip
        assert runs.sample(text_embeds=embeds, experimental_args=split).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])])
@pytest.mark.parametrize("quantization", ["fp8_e4m3fn_fast", "fp4_scaled"])
def test_quantized_blocks(quantization, device, tmp_path, monkeypatch):
    """For a memory checker, too: two blocks, two shots."""
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    path = tmp_path / "t2v.safetensors"
    tiny.transformer(in_dim=16, layers=2).save(path)
    shots, latents = ShotPrompts((prompt(1), prompt(2)), 2), torch.randn(1, 16, 3, 8, 8)

    def run(device, dtype, **options):
        options = LoadOptions(base_dtype=dtype, **options)
        model = load_wan_model(path, options, StandaloneHost(device=device), SYSTEMS)
        with model.active() as transformer:
            given = ModelInputs(
                latents=latents.to(device), timestep=torch.tensor([600.0], device=device),
                text=(prompt(1).to(device, dtype),), payloads=(shots.to(torch.device(device), dtype),),
            )  # fmt: skip
            return transformer(given).cpu()

    want, got = run("cpu", torch.float32), run(device, torch.bfloat16, quantization=quantization)
    assert ((got - want).norm() / want.norm()).item() < 0.25
