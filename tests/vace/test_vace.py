"""The VACE branch against diffusers' WanVACETransformer3DModel: same random weights, renamed."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contract import build, inputs
from diffusers import WanVACETransformer3DModel
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo, frame_score
from wanvideo_wrapper.prompt_segments.extension import PromptSegments, PromptSegmentsExtension
from wanvideo_wrapper.vace.extension import Vace, VaceContext, VaceExtension, hinted_blocks
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.conditioning import Payload, Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

LAYERS, HEADS, HEAD, TEXT, FRAMES = 5, 2, 12, 20, 3
CONFIG = WanConfig(
    dim=HEADS * HEAD, ffn_dim=40, num_heads=HEADS, num_layers=LAYERS, text_dim=TEXT, text_len=7
)
RENAMES = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    (".proj_in.", ".before_proj."),
    (".proj_out.", ".after_proj."),
    ("proj_out.", "head.head."),
]


def rename(key):
    for old, new in RENAMES:
        key = key.replace(old, new) if old != "proj_out." or key.startswith(old) else key
    if key == "scale_shift_table":
        return "head.modulation"
    return key.replace("scale_shift_table", "modulation")


def reference_model():
    reference = WanVACETransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=16, out_channels=16, text_dim=TEXT,
        freq_dim=256, ffn_dim=40, num_layers=LAYERS, vace_layers=[0, 2, 4], vace_in_channels=96,
    ).eval()  # fmt: skip
    for name, parameter in reference.named_parameters():
        near_one = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(near_one), std=0.2)
    return reference.requires_grad_(False)


@dataclass(frozen=True)
class Left(Payload):
    """Blocks to leave out."""

    blocks: tuple[int, ...]
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class LeaveOut(Extension):
    payload: ClassVar[type] = Left

    def skips(self, state, index):
        return index in state.blocks


@pytest.fixture(scope="module")
def pair():
    """diffusers' model, and ours with the same weights."""
    torch.manual_seed(8)
    reference = reference_model()
    state = {rename(k): v for k, v in reference.state_dict().items()}
    found = VaceExtension.detect({k: tuple(v.shape) for k, v in state.items()})
    assert found == VaceExtension(blocks=3, channels=96)
    model = WanModel(CONFIG, (PromptSegmentsExtension(), LeaveOut(), found)).requires_grad_(False)
    model.load_state_dict(state, strict=True)
    return reference, model


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS, TIME, PROMPT = random(1, 16, FRAMES, 4, 6), torch.tensor([431.0]), random(7, TEXT)


def context(seed=2, frames=FRAMES, **more):
    return VaceContext(latents=random(1, 96, frames, 4, 6, seed=seed), **more)


def ours(model, *payloads, step=0, total=10, text=PROMPT, batch=1):
    asked = ModelInputs(
        latents=LATENTS.expand(batch, -1, -1, -1, -1), timestep=TIME.expand(batch), text=(text,) * batch,
        payloads=payloads, step=Step(index=step, total=total, in_run=step),
    )  # fmt: skip
    return model(asked)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def by_blocks(reference, contexts, left=()):
    """diffusers' blocks, run one after the other: every context's hints first, then the main blocks.

    contexts: (tokens, strength).
    """
    rope = reference.rope(LATENTS)
    x = reference.patch_embedding(LATENTS).flatten(2).transpose(1, 2)
    temb, time, text, _ = reference.condition_embedder(TIME, PROMPT[None], None)
    time = time.unflatten(1, (6, -1))
    hints = {layer: [] for layer in (0, 2, 4)}
    for c, strength in contexts:
        for layer, block in zip(hints, reference.vace_blocks, strict=True):
            hint, c = block(x, text, c, time, rope)
            hints[layer].append(hint * strength)
    for index, block in enumerate(reference.blocks):
        if index not in left:
            x = sum(hints.get(index, ()), block(x, text, time, rope))
    shift, scale = (reference.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    x = reference.proj_out(reference.norm_out(x) * (1 + scale) + shift)
    cells = x.reshape(1, FRAMES, 2, 3, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return cells.reshape(1, 16, FRAMES, 4, 6)


def tokens(reference, latents):
    return reference.vace_patch_embedding(latents).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("strength", [1.0, 0.37])
def test_whole_model(pair, strength):
    reference, model = pair
    one = context(strengths=(strength,))
    want = reference(
        LATENTS, TIME, PROMPT[None], control_hidden_states=one.latents,
        control_hidden_states_scale=torch.full((3,), strength), return_dict=False,
    )[0]  # fmt: skip
    assert relative(ours(model, Vace((one,))), want) < 1e-5
    assert relative(ours(model), want) > 1e-2
    assert relative(ours(model, Vace((one,)), batch=2), want.expand(2, -1, -1, -1, -1)) < 1e-5


def test_contexts_add_up_and_ones_that_lack_frames_are_zero_there(pair):
    """A context without the reference that another one has in front, and one that ends early."""
    reference, model = pair
    first, late = context(2, strengths=(0.6,), references=1), context(3, frames=2, strengths=(1.4,))
    early = context(4, frames=2, strengths=(0.9,), references=1)
    payload = Vace((first, late, early)).window(whole_window(FRAMES, leading=1))
    place = torch.zeros(1, 6, HEADS * HEAD)
    want = by_blocks(
        reference,
        [
            (tokens(reference, first.latents), 0.6),
            (torch.cat((place, tokens(reference, late.latents)), dim=1), 1.4),
            (torch.cat((tokens(reference, early.latents), place), dim=1), 0.9),
        ],
    )
    assert relative(ours(model, payload), want) < 1e-5
    assert relative(ours(model, Vace((first, late, early))), want) > 1e-3


@pytest.mark.parametrize("left", [(0,), (1, 2), (2, 3, 4)])
def test_main_blocks_that_are_left_out_take_their_hint_with_them(pair, left):
    reference, model = pair
    one = context()
    want = by_blocks(reference, [(tokens(reference, one.latents), 1.0)], left)
    assert relative(ours(model, Left(left), Vace((one,))), want) < 1e-5


def test_strengths_and_ranges_by_step(pair):
    _, model = pair
    one = context(strengths=(0.2, 0.7), start=0.1, end=0.5)
    plain = ours(model)
    assert torch.equal(ours(model, Vace((one,)), step=0), plain)
    assert torch.equal(ours(model, Vace((one,)), step=6), plain)
    alone = {s: ours(model, Vace((context(strengths=(s,)),))) for s in (0.2, 0.7)}
    assert relative(ours(model, Vace((one,)), step=1), alone[0.7]) < 1e-6
    assert relative(ours(model, Vace((one,)), step=5), alone[0.7]) < 1e-6
    first = context(strengths=(0.2, 0.7))
    assert relative(ours(model, Vace((first,)), step=0), alone[0.2]) < 1e-6
    both = Vace((one, context(5)))
    assert torch.equal(ours(model, both, step=8), ours(model, Vace((context(5),)), step=8))


def test_windows_are_the_same_frames_alone():
    """With a reference in front that every window has; a picture takes its place in later windows."""
    latents = random(1, 96, 1 + 6, 4, 6)
    other = random(1, 96, 6, 4, 6, seed=3)
    payload = Vace((VaceContext(latents=latents, references=1), VaceContext(latents=other)))
    window = Window(latents=(0, 3, 4, 5), pixels=tuple(range(9)), leading=1)
    first, second = payload.window(window).contexts
    assert torch.equal(first.latents, latents[:, :, [0, 3, 4, 5]]) and first.skipped == 0
    assert torch.equal(second.latents, other[:, :, [2, 3, 4]]) and second.skipped == 1
    picture = random(16, 1, 4, 6, seed=4)
    first, second = payload.window(window._replace(picture=picture)).contexts
    assert torch.equal(first.latents[0, :16, 0], picture[:, 0])
    assert torch.equal(first.latents[:, 16:], latents[:, 16:, [0, 3, 4, 5]])
    assert torch.equal(second.latents, other[:, :, [2, 3, 4]])
    assert torch.equal(payload.contexts[0].latents, latents), "the whole is not changed"


def test_trailing_references_of_others_have_no_context():
    payload = Vace((context(frames=3),))
    (part,) = payload.window(whole_window(5, trailing=2)).contexts
    assert part.latents.shape[2] == 3 and part.skipped == 0
    assert payload.window(Window(latents=(7, 8), pixels=(0,))) is None


def test_own_blocks_read_their_own_text_layers(pair):
    """Other keys of a VACE block's text attention change the result, and so do prompts by segment."""
    _, model = pair
    payload = Vace((context(),))
    before = ours(model, payload)
    key = model.vace_blocks[1].cross_attn.k.weight
    kept = key.clone()
    key.mul_(-1)
    changed = ours(model, payload)
    key.copy_(kept)
    assert relative(changed, before) > 1e-4
    others = PromptSegments((random(7, TEXT, seed=7),))
    sources = []
    handle = model.vace_blocks[0].register_forward_pre_hook(lambda block, args: sources.append(args[1].text))
    ours(model, others, payload)
    handle.remove()
    assert type(sources[0]).__name__ == "SegmentedText"


def test_weightless_systems_act_in_vace_blocks():
    """Enhance-A-Video amplifies self-attention there as it does in main blocks."""
    _, model = build(EnhanceAVideo(), VaceExtension(blocks=2))
    block, seen = model.vace_blocks[1], []
    handles = [
        block.self_attn.register_forward_hook(lambda _, args, out: seen.append((args[0], args[1], out[0]))),
        block.norm3.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    starts = []
    handles.append(block.register_forward_pre_hook(lambda _, args: starts.append(args[0])))
    payload = Vace((VaceContext(latents=random(1, 96, 3, 4, 4)),))
    model(inputs(EnhanceArgs(30.0), payload))
    for handle in handles:
        handle.remove()
    (x, given, y), after = seen
    attention = block.self_attn
    q, k = (n.placed(p(x), given.rope, attention.heads)
            for n, p in ((attention.norm_q, attention.q), (attention.norm_k, attention.k)))  # fmt: skip
    score = frame_score(q, k, 3, torch.tensor(30.0))
    gate = (block.modulation.unsqueeze(1) + given.mod).unbind(2)[2]
    assert score.item() > 1.5
    torch.testing.assert_close(after, starts[0] + y * score * gate, rtol=1e-4, atol=1e-4)


def test_hinted_blocks():
    assert hinted_blocks(40, 8) == (0, 5, 10, 15, 20, 25, 30, 35)
    assert hinted_blocks(30, 15) == tuple(range(0, 30, 2))
    with pytest.raises(ValueError, match="15 VACE blocks.*of 40 blocks.*the same size"):
        hinted_blocks(40, 15)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 80, FRAMES, 4, 6), "have 80 channels but the model reads 96"),
        ((1, 96, FRAMES, 6, 6), r"of \(3, 6, 6\) latents.*do not fit a video of \(3, 4, 6\)"),
        ((1, 96, FRAMES + 1, 4, 6), r"of \(4, 4, 6\) latents.*do not fit a video of \(3, 4, 6\)"),
    ],
)
def test_contexts_of_another_size_are_named(pair, shape, says):
    _, model = pair
    with pytest.raises(ValueError, match=says):
        ours(model, Vace((VaceContext(latents=torch.randn(shape)),)))


def test_blocks_are_swapped_and_quantized_by_the_name_of_their_list():
    _, model = build(VaceExtension(blocks=2))
    placement = Placement(model, torch.device("cpu"))
    placement.swap = BlockSwapArgs(blocks_to_swap=0, others={"vace_blocks": 1})
    assert placement.waiting_blocks() == [model.vace_blocks[1]]
    names = ("vace_blocks.0.before_proj", "vace_blocks.1.after_proj", "vace_blocks.1.ffn.2", "vace_patch_embedding")
    assert [quantizable(model, name) for name in names] == [True, True, True, False]


def test_contexts_stay_in_float32():
    moved = Vace((context(),)).to(torch.device("cpu"), torch.bfloat16)
    assert moved.contexts[0].latents.dtype == torch.float32


def test_a_bf16_model_runs():
    _, model = build(VaceExtension(blocks=2))
    payload = Vace((VaceContext(latents=torch.randn(1, 96, 3, 4, 4), strengths=(0.1,)),))
    want = model(inputs(payload))
    kept = model.vace_patch_embedding.float()
    model.to(torch.bfloat16)
    model.vace_patch_embedding, model.patch_embedding = kept.float(), model.patch_embedding.float()
    assert relative(model(inputs(payload)), want) < 0.1
