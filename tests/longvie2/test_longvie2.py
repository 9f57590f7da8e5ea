"""LongVie 2 against its published forward in float64: control blocks of half the width, history in front."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from float64_wan import Exact, relative
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.longvie2.extension import Continuation, DualControl, LongVie2
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.modifier import Start
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

LAYERS, CONTROLLED, DIM, IN_DIM, TEXT, CLIP = 4, 2, 24, 36, 10, 6
FRAMES, HEIGHT, WIDTH, HISTORY = 3, 4, 6, 2
SYSTEM = LongVie2(layers=CONTROLLED, dim=DIM // 2, ffn_dim=20, model_dim=DIM)
CONFIG = WanConfig(dim=DIM, ffn_dim=40, num_heads=2, num_layers=LAYERS, in_dim=IN_DIM, text_dim=TEXT, text_len=5)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    model = WanModel(CONFIG, (ClipImageExtension(clip_dim=CLIP), SYSTEM)).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        near_one = "norm" in name and name.endswith("weight")
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25 + near_one)
    return model


LATENTS, PROMPT, PICTURE = (
    random(1, IN_DIM, FRAMES, HEIGHT, WIDTH, seed=1),
    random(5, TEXT, seed=2),
    random(1, 3, CLIP, seed=4),
)
VIDEOS = {
    "dense": random(1, IN_DIM, FRAMES, HEIGHT, WIDTH, seed=5),
    "sparse": random(1, IN_DIM, FRAMES, HEIGHT, WIDTH, seed=6),
}
EARLIER = random(1, 16, HISTORY, HEIGHT, WIDTH, seed=7)


def control(*names, strength=0.7, **more):
    return DualControl(strength=torch.tensor(strength), **{name: VIDEOS[name] for name in names}, **more)


def asked(*payloads, step=0, batch=1, **more):
    return ModelInputs(
        latents=LATENTS.expand(batch, -1, -1, -1, -1), timestep=torch.tensor([431.0] * batch), text=(PROMPT,) * batch,
        payloads=payloads, step=Step(index=step, total=10, in_run=step), **more,
    )  # fmt: skip


class Half(Exact):
    """The control blocks of one video as the blocks of a model."""

    def __init__(self, model, name):
        super().__init__(model)
        self.config = replace(model.config, dim=DIM // 2, num_heads=1)
        marker = f".control_blocks_{name}."
        self.weights = {key.replace(marker, "."): value for key, value in self.weights.items() if marker in key}


def run_block(exact, index, x, modulation, text, turns, picture):
    """One block of the published model, whatever its width."""
    shift, scale, gate, *rest = exact.modulated(index, modulation)
    q, k, v = exact.self_qkv(index, exact.norm(x) * (1 + scale) + shift, turns)
    x = x + gate * exact.linear(f"blocks.{index}.self_attn.o", exact.attention(q, k, v))
    name = f"blocks.{index}.cross_attn"

    def seen(q):
        keys = exact.heads(exact.rms(f"{name}.norm_k_img", exact.linear(f"{name}.k_img", picture)))
        return exact.attention(q, keys, exact.heads(exact.linear(f"{name}.v_img", picture)))

    x = x + exact.cross(index, x, text, None if picture is None else seen)
    shift, scale, gate = rest
    return x + gate * exact.feed_forward(index, exact.norm(x) * (1 + scale) + shift)


def expected(model, videos, *, strength, history=None, picture=None):
    """By the published order of operations: history's tokens stand before the video's."""
    exact = Exact(model)
    grid = (FRAMES, HEIGHT // 2, WIDTH // 2)
    before = 0 if history is None else history.shape[2]
    x = exact.patches(LATENTS)
    count = x.shape[1]
    if history is not None:
        ones = torch.ones(1, IN_DIM - 16, *history.shape[2:])
        x = torch.cat((exact.patches(torch.cat((ones, history), dim=1)), x), dim=1)
    turns = exact.turns((before + FRAMES, *grid[1:]))
    own_turns = exact.turns(grid)
    time, modulation = exact.times(torch.tensor([431.0]))
    text = exact.text([PROMPT])
    if picture is not None:
        p, w = picture.double(), exact.weights
        p = F.layer_norm(p, p.shape[-1:], w["img_emb.proj.0.weight"], w["img_emb.proj.0.bias"])
        p = exact.linear("img_emb.proj.3", F.gelu(exact.linear("img_emb.proj.1", p)))
        picture = F.layer_norm(p, p.shape[-1:], w["img_emb.proj.4.weight"], w["img_emb.proj.4.bias"])

    def shared(name, value):
        return exact.linear(f"dual_controller.control_{name}", value)

    halves = {name: Half(model, name) for name in videos}
    tokens = {name: shared(f"initial_combine_linear_{name}", exact.patches(VIDEOS[name])) for name in videos}
    own_text, own_picture = shared("text_linear", text), None if picture is None else shared("text_linear", picture)
    own_modulation = shared("t_mod", modulation)
    for index in exact.blocks:
        x = run_block(exact, index, x, modulation, text, turns, picture)
        if index < CONTROLLED and videos:
            for name in videos:
                given = (own_modulation, own_text, own_turns, own_picture)
                tokens[name] = run_block(halves[name], index, tokens[name], *given)
            added = exact.linear(f"blocks.{index}.control_combine_linears", sum(tokens.values()))
            x = torch.cat((x[:, :-count], x[:, -count:] + added * strength), dim=1)
    return exact.velocity(x[:, -count:], time, grid)


@pytest.mark.parametrize("videos", [("dense", "sparse"), ("dense",), ("sparse",)])
@pytest.mark.parametrize("history", [None, EARLIER])
@pytest.mark.parametrize("picture", [None, PICTURE])
def test_the_velocity_is_that_of_the_published_forward(model, videos, history, picture):
    payloads = (control(*videos, history=history), *(() if picture is None else (ClipImage(picture),)))
    want = expected(model, videos, strength=0.7, history=history, picture=picture)
    assert relative(model(asked(*payloads)), want) < 1e-5


def test_outside_of_their_steps_videos_do_nothing_and_history_stays(model):
    ranged = control("dense", "sparse", start=0.2, end=0.5, history=EARLIER)
    without = expected(model, (), strength=0.0, history=EARLIER)
    with_both = expected(model, ("dense", "sparse"), strength=0.7, history=EARLIER)
    for step, want in ((1, without), (2, with_both), (5, with_both), (6, without)):
        assert relative(model(asked(ranged, step=step)), want) < 1e-5


def test_positions_begin_with_history_under_riflex_too(model):
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[1].rope))
    model(asked(control("dense", history=EARLIER), riflex_index=2))
    handle.remove()
    places = HEIGHT * WIDTH // 4
    whole = model.rope((HISTORY + FRAMES, HEIGHT // 2, WIDTH // 2), riflex_index=2)
    assert torch.equal(seen[0], torch.cat((whole[HISTORY * places :], whole[: HISTORY * places])))


def test_every_frame_may_have_a_time_of_its_own(model):
    """Control tokens are modulated as the video tokens that they stand for."""
    same = asked(control("dense", "sparse"))
    each = replace(same, timestep=torch.full((1, FRAMES), 431.0))
    torch.testing.assert_close(model(each), model(same), rtol=1e-4, atol=1e-5)
    mixed = replace(same, timestep=torch.tensor([[0.0, 431.0, 431.0]]))
    assert (model(mixed) - model(same)).abs().max() > 1e-2


def test_linear_layers_of_control_blocks_are_quantized_and_those_beside_the_blocks_are_not(model):
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "control_" in name
    ]
    assert len(names) == CONTROLLED * 25 + 4
    assert {name for name in names if not quantizable(model, name)} == {n for n in names if n.startswith("dual_con")}


def test_windows_see_their_frames_and_only_the_first_has_history():
    payload = control("dense", "sparse", history=EARLIER)
    later = payload.window(Window((1, 2), tuple(range(1, 6)), total=3))
    assert later.history is None and torch.equal(later.sparse, VIDEOS["sparse"][:, :, 1:])
    first = payload.window(Window((0, 1), tuple(range(5)), total=3))
    assert first.history is EARLIER and torch.equal(first.dense, VIDEOS["dense"][:, :, :2])
    with pytest.raises(ValueError, match="dense control video has 3 latent frames but the video has 4"):
        payload.window(whole_window(4))


def test_the_first_frame_begins_as_a_blend_of_the_last_one_before_and_noise():
    noise, latents = random(16, FRAMES, HEIGHT, WIDTH, seed=8), random(16, FRAMES, HEIGHT, WIDTH, seed=9)
    start, generator = Start(latents, noise), torch.Generator()
    first, later = (make_schedule(ScheduleSpec(name="euler", steps=4, shift=5.0, start_step=step)) for step in (0, 2))
    started = Continuation(EARLIER, 0.9).begin(start, first, generator).latents
    torch.testing.assert_close(started[:, 0], 0.1 * EARLIER[0, :, -1] + 0.9 * noise[:, 0])
    assert torch.equal(started[:, 1:], latents[:, 1:])
    assert Continuation(EARLIER, 0.9).begin(start, later, generator) is start
    with pytest.raises(ValueError, match="prev_images have latents"):
        Continuation(EARLIER[..., :2], 0.9).begin(start, first, generator)


def test_the_authors_names_are_read():
    names = ("control_blocks_sparse.11.ffn.0.bias", "control_combine_linears.3.weight", "control_t_mod.bias")
    assert [LongVie2.published(name) for name in names] == [
        "blocks.11.control_blocks_sparse.ffn.0.bias", "blocks.3.control_combine_linears.weight",
        "dual_controller.control_t_mod.bias",
    ]  # fmt: skip
    assert LongVie2.published("blocks.0.ffn.0.bias") == "blocks.0.ffn.0.bias"


def test_another_size_is_refused_in_a_sentence(model):
    with pytest.raises(ValueError, match="for a model of width 5120 but the model's is 24"):
        WanModel(CONFIG, (replace(SYSTEM, model_dim=5120),))
    small = replace(control("dense"), dense=VIDEOS["dense"][..., :4])
    with pytest.raises(ValueError, match="dense control video has latents"):
        model(asked(small))
    with pytest.raises(ValueError, match=r"prev_images have latents of \(4, 4\)"):
        model(asked(control("dense", history=EARLIER[..., :4])))


@pytest.mark.parametrize("batch", [1, 2])
def test_every_linear_layer_of_the_control_reads_dense_rows(model, batch):
    """Also of a convolution whose memory is in another order, and of one row for a batch."""
    seen = []
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "control_" in n]
    handles = [m.register_forward_pre_hook(lambda m, a: seen.append((m, a[0].is_contiguous()))) for m in layers]
    handles.append(model.patch_embedding.register_forward_hook(
        lambda m, a, out: out.to(memory_format=torch.channels_last_3d)
    ))  # fmt: skip
    model(asked(control("dense", "sparse", history=EARLIER), ClipImage(PICTURE), batch=batch))
    for handle in handles:
        handle.remove()
    assert {id(m) for m, _ in seen} == {id(m) for m in layers} and all(dense for _, dense in seen)
