"""Stand-In against its authors' two streams in float64, its files, and its node."""

from dataclasses import replace

import pytest
import torch
from contract import randomize
from float64_wan import Exact, relative
from published_keys import keys_of
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS, tensor_layout
from wanvideo_wrapper.attention import AttentionCall
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.stand_in.extension import Face, FaceReference, StandIn
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.families import kind_of
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

CONFIG = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=4)
GRID, SIDES = (3, 2, 3), (4, 6)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**fields):
    return randomize(WanModel(CONFIG, (StandIn(rank=4, **fields),)))


def inputs(*payloads, batch=1, **fields):
    return ModelInputs(**{**dict(
        latents=rand(batch, 16, GRID[0], *SIDES, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(4, 8, seed=2 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    ), **fields})  # fmt: skip


def face(offset=0, frames=1):
    return FaceReference(rand(1, 16, frames, 6, 4, seed=9), offset)


def exact(model, asked, picture, *, offset=0, strength=1.0):
    """WeChatCV/Stand-In: the picture as a second stream, of which the video reads keys and values."""
    w, grid = Exact(model), GRID
    batch, frames = asked.latents.shape[0], picture.shape[2]
    x, y = w.patches(asked.latents), w.patches(picture).expand(batch, -1, -1)
    (e, late), (_, clean) = w.times(asked.timestep), w.times(torch.zeros(batch))
    turns = w.turns(grid)
    turns_y = w.turns((1, 3, 2), start=(-1 - offset, *grid[1:])).repeat(frames, 1)
    text = w.text(asked.text)
    for index in w.blocks:
        name = f"blocks.{index}.self_attn"
        shift, scale, gate, shift2, scale2, gate2 = w.modulated(index, late)
        q, k, v = w.self_qkv(index, w.norm(x) * (1 + scale) + shift, turns)
        yshift, yscale, ygate, yshift2, yscale2, ygate2 = w.modulated(index, clean)
        into = w.norm(y) * (1 + yscale) + yshift
        qkv = []
        for part in "qkv":
            low = w.linear(f"{name}.{part}_loras.up", w.linear(f"{name}.{part}_loras.down", into))
            qkv.append(w.linear(f"{name}.{part}", into) + strength * low)
        qy, ky = (w.turned(w.heads(w.rms(f"{name}.norm_{p}", t)), turns_y) for p, t in zip("qk", qkv[:2], strict=True))
        vy = w.heads(qkv[2])
        seen = w.attention(q, torch.cat((k, ky), 1), torch.cat((v, vy), 1))
        x = x + gate * w.linear(f"{name}.o", seen)
        y = y + ygate * w.linear(f"{name}.o", w.attention(qy, ky, vy))
        x = x + w.cross(index, x, text)
        x = x + gate2 * w.feed_forward(index, w.norm(x) * (1 + scale2) + shift2)
        y = y + ygate2 * w.feed_forward(index, w.norm(y) * (1 + yscale2) + yshift2)
    return w.velocity(x, e, grid)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "offset", "frames"), [(1, 0, 1), (2, 1, 1), (1, 3, 2)])
def test_model_is_the_authors(batch, offset, frames):
    model, picture = build(strength=0.7), face(offset, frames)
    asked = inputs(picture, batch=batch)
    want = exact(model, asked, picture.latents, offset=offset, strength=0.7)
    assert relative(model(asked), want) < 1e-5
    for other in (inputs(batch=batch), inputs(replace(picture, offset=offset + 1), batch=batch)):
        assert relative(model(other), want) > 1e-4


def test_spans_of_others_keep_their_keys():
    q = torch.zeros(1, 12, 2, 4)
    cond, extension = Face(6, 9, torch.tensor(1.0)), StandIn(rank=4)
    call, _ = extension.attend(None, AttentionCall(q, q, q), cond)
    assert call.spans == (((0, 6), (0, 12)), ((6, 9), (6, 9)), ((9, 12), (0, 12)))
    spans = (((0, 4), (0, 4)), ((4, 12), (0, 12)))
    call, _ = extension.attend(None, AttentionCall(q, q, q, spans), cond)
    assert call.spans == (((0, 4), (0, 4)), ((4, 6), (0, 12)), ((6, 9), (6, 9)), ((9, 12), (0, 12)))


def test_every_pass_and_every_window_sees_the_whole_face():
    picture = face()
    assert picture.without(frozenset({"text"})) is picture
    assert picture.window(Window(latents=(4, 5), pixels=tuple(range(5)))) is picture


def test_latents_of_another_vae_are_refused():
    with pytest.raises(ValueError, match="48 channels but the video of this model 16"):
        build()(inputs(FaceReference(rand(1, 48, 1, 4, 4))))


@torch.no_grad()
def test_linear_layers_of_the_pairs_read_dense_rows():
    model, seen = build(), []
    for pair in (model.blocks[1].self_attn.q_loras, model.blocks[1].self_attn.v_loras):
        pair.down.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    model(inputs(face(), batch=2))
    assert seen == [True, True]


def test_keys_and_shapes_are_the_published_ones():
    shapes = keys_of("standin_lora")
    (found,) = [e for e in SYSTEMS.detect(shapes) if isinstance(e, StandIn)]
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=64, num_heads=40, num_layers=40), (found,))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if found.owns(k)} == shapes
    assert SYSTEMS.kind_of(shapes).name == "Stand-In LoRA" and kind_of(shapes, (StandIn.file,)) is StandIn.file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A text-to-video model of two blocks, and Stand-In's LoRA for it."""
    folder = tmp_path_factory.mktemp("models")
    whole = tiny.transformer(in_dim=16, extensions=(StandIn(rank=16),), layers=2)
    pairs = {key: value for key, value in whole.tensors.items() if "_loras." in key}
    base = {key: value for key, value in whole.tensors.items() if key not in pairs}
    tiny.Tiny(tensors=base, metadata=whole.metadata).save(folder / "base.safetensors", torch.float32)
    save_file({f"diffusion_model.{k}": v.contiguous() for k, v in pairs.items()}, folder / "stand_in.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_fast", "fp4_scaled"])
def test_quantized_model_with_its_lora(saved, option, device, monkeypatch):
    if option.endswith("_fast") and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    lora = LoraFile(path=saved / "stand_in.safetensors", strength=0.5)

    def run(precision, quantization, place):
        options = LoadOptions(base_dtype=precision, quantization=quantization, loras=(lora,))
        model = load_wan_model(saved / "base.safetensors", options, StandaloneHost(device=place), SYSTEMS)
        kinds = {type(block.self_attn.q_loras.up) for block in model.transformer.blocks}
        assert kinds == {torch.nn.Linear}
        asked = ModelInputs(
            latents=rand(1, 16, 2, 4, 4, seed=1).to(place), timestep=torch.tensor([700.0], device=place),
            text=(rand(5, tiny.TEXT_DIM, seed=2).to(place),), payloads=(face().to(torch.device(place), precision),),
        )  # fmt: skip
        with model.active() as transformer:
            return transformer(asked).cpu()

    want = run(torch.float32, "disabled", "cpu")
    got = run(torch.bfloat16 if device == "cuda" else torch.float32, option, device)
    assert relative(got, want.double()) < (0.02 if option == "disabled" else 0.25)


def test_node_adds_the_first_picture_of_the_latent():
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9)
    samples = rand(2, 16, 1, 4, 4)
    node = NODE_CLASS_MAPPINGS["WanVideoAddStandInLatent"]()
    (added,) = node.add(embeds, {"samples": samples}, 2)
    (payload,) = added.payloads
    assert torch.equal(payload.latents, samples[:1]) and payload.offset == 2 and not embeds.payloads
