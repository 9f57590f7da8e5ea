"""Nodes of the Wan controlnets: files of every size and precision, what is refused, and whole runs of the sampler."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.controlnet.controlnet import KIND, ControlnetSizes, WanControlnet, load_controlnet
from wanvideo_wrapper.controlnet.extension import ControlArgs
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, Fp8MatmulLinear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import quantization as plans
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.key_names import from_diffusers
from wanvideo_wrapper.wanvideo.own_model import open_own
from wanvideo_wrapper.wanvideo.request import TextEmbeds
from wanvideo_wrapper.wanvideo.windows import ContextOptions

FACTS = Path(__file__).parents[1] / "data/checkpoints"
SIZES = ControlnetSizes(
    config=WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=22, text_dim=tiny.TEXT_DIM),
    encoder=(3, 8, 4, 6), stride=8, out_dim=128,
)  # fmt: skip
# Name in the module -> published name, in a block and outside.
NAMES = (
    ("self_attn.", "attn1."), ("cross_attn.", "attn2."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".o.", ".to_out.0."), (".ffn.0.", ".ffn.net.0.proj."), (".ffn.2.", ".ffn.net.2."),
    (".modulation", ".scale_shift_table"), ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
)  # fmt: skip


def published_name(key):
    for own, theirs in NAMES:
        key = key.replace(own, theirs)
    return key


def published_tensors(sizes=SIZES, dtype=torch.float32):
    torch.manual_seed(6)
    tensors = WanControlnet(sizes).state_dict()
    return {published_name(k): (torch.randn(v.shape) * 0.2).to(dtype) for k, v in tensors.items()}


def shapes_of(size):
    shapes = {}
    for key, value in json.loads((FACTS / f"wan_controlnet_{size}.json").read_text()).items():
        if isinstance(value, dict) and "shape" in value:
            shapes |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in range(value["count"])}
        elif key != "_meta":
            shapes[key] = tuple(value)
    return shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "controlnet").mkdir()
    heads = {"wanvideo.num_heads": "2"}
    save_file(published_tensors(), folder / "controlnet/control.safetensors", metadata=heads)
    few = {k: v.to(torch.float8_e4m3fn) for k, v in published_tensors().items()}
    save_file(few, folder / "controlnet/control_fp8.safetensors", metadata=heads)
    tiny.transformer(in_dim=16).save(folder / "diffusion_models/wan.safetensors", torch.float32)
    tiny.transformer(in_dim=16).save(folder / "controlnet/wan.safetensors")
    before = get_host()
    set_host(StandaloneHost(models=folder, device="cpu"))
    yield folder
    set_host(before)


def load(name="control.safetensors", precision="fp32", quantization="disabled", device="offload_device"):
    return N["WanVideoControlnetLoader"]().loadmodel(name, precision, device, quantization)[0]


def model():
    return N["WanVideoModelLoader"]().loadmodel("wan.safetensors", "fp32", "offload_device", "disabled")[0]


def apply(model, net, images, strength=1.0, stride=2, start=0.0, end=1.0):
    return N["WanVideoControlnet"]().loadmodel(model, net, images, strength, stride, start, end)[0]


@pytest.mark.parametrize(
    ("size", "layers", "channels", "encoder", "stride", "out_dim"),
    [
        ("1_3B", 8, 16, (3, 192, 96, 48), 8, 1536),
        ("14B", 6, 16, (3, 192, 96, 48), 8, 5120),
        ("5B", 8, 48, (3, 768, 384, 192), 16, 3072),
    ],
)
def test_published_keys_and_shapes(size, layers, channels, encoder, stride, out_dim):
    shapes = {from_diffusers(key): shape for key, shape in shapes_of(size).items()}
    checkpoint = type("Header", (), {"shapes": shapes, "metadata": {}, "path": Path("published.safetensors")})()
    sizes = ControlnetSizes.of(checkpoint)
    config = WanConfig(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=layers, in_dim=channels + encoder[-1], out_dim=channels
    )
    assert sizes == ControlnetSizes(config=config, encoder=encoder, stride=stride, out_dim=out_dim)
    with torch.device("meta"):
        module = WanControlnet(sizes)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == shapes
    assert {published_name(k) for k in module.state_dict()} == set(shapes_of(size))


def test_the_file_is_what_runs(models):
    path = models / "controlnet/control.safetensors"
    assert ControlnetSizes.of(open_own(path, KIND, SYSTEMS)) == SIZES and KIND.name in str(describe(path, SYSTEMS))
    module, want = load().module, published_tensors()
    assert all(torch.equal(value, want[published_name(key)]) for key, value in module.state_dict().items())
    half = load(precision="fp16", device="main_device").module
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@torch.no_grad()
def test_blocks_and_embeddings_are_those_of_diffusers(models):
    """What the authors' class is made of, with the file's tensors under the file's names."""
    tensors, module = published_tensors(), load().module
    embedder = WanTimeTextImageEmbedding(64, 256, 6 * 64, tiny.TEXT_DIM)
    blocks = [WanTransformerBlock(64, 96, 2, "rms_norm_across_heads", False, 1e-6) for _ in range(2)]
    for prefix, part in (("condition_embedder.", embedder), ("blocks.0.", blocks[0]), ("blocks.1.", blocks[1])):
        part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    latents, prompt = torch.randn(1, 16, 3, 4, 6), torch.randn(5, tiny.TEXT_DIM)
    video, timestep = torch.rand(1, 3, 9, 32, 48) * 2 - 1, torch.tensor([600.0])
    x, own = module.embed(latents, timestep, (prompt,), video)
    _, mod, text, _ = embedder(timestep, prompt[None])
    rope = WanRotaryPosEmbed(32, (1, 2, 2), 1024)(latents)
    want = x
    for block, theirs in zip(module.blocks, blocks, strict=True):
        x, want = block(x, own), theirs(want, text, mod.unflatten(1, (6, -1)), rope)
    assert (x - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    ("name", "quantization", "fast"),
    [
        ("control", "fp8_e4m3fn", set()),
        ("control", "fp8_e5m2", set()),
        ("control_fp8", "disabled", set()),
        ("control", "fp8_e4m3fn_fast", {"self_attn", "cross_attn", "ffn", "controlnet_blocks"}),
        ("control", "fp8_e4m3fn_fast_no_ffn", {"self_attn", "cross_attn", "controlnet_blocks"}),
    ],
)
def test_precisions(models, monkeypatch, name, quantization, fast):
    """Blocks and projections hold FP8; '_fast' multiplies in it, '_no_ffn' not in feed-forward layers."""
    monkeypatch.setattr(plans, "runs_fp8", lambda device, dtype: None)
    module = load(f"{name}.safetensors", quantization=quantization).module
    few = {n: layer for n, layer in module.named_modules() if isinstance(layer, Fp8Linear)}
    attention = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
    in_blocks = {f"blocks.{i}.{n}" for i in range(2) for n in (*attention, "ffn.0", "ffn.2")}
    assert set(few) == in_blocks | {"controlnet_blocks.0", "controlnet_blocks.1"}
    parts = {n: n.split(".")[2] if n in in_blocks else "controlnet_blocks" for n in few}
    assert {parts[n] for n, layer in few.items() if isinstance(layer, Fp8MatmulLinear)} == fast
    assert not any(isinstance(layer, Fp8MatmulLinear) for n, layer in few.items() if parts[n] not in fast)


def test_fast_where_it_cannot_run_is_refused(models, monkeypatch):
    monkeypatch.setattr(plans, "runs_fp8", lambda device, dtype: "it is too old")
    with pytest.raises(ValueError, match="'fp8_e4m3fn_fast' multiplies in FP8 or FP4, .* it is too old"):
        load(quantization="fp8_e4m3fn_fast_no_ffn")


def test_what_is_refused(models):
    with pytest.raises(ValueError, match="wan.safetensors is a Wan transformer, not a Wan ControlNet; load it with"):
        load("wan.safetensors")
    tensors = published_tensors()
    del tensors["controlnet_blocks.0.weight"]
    save_file(tensors, models / "controlnet/part.safetensors")
    with pytest.raises(ValueError, match="part.safetensors lacks 'controlnet_blocks.0.weight'"):
        load("part.safetensors")
    images = torch.rand(9, 32, 32, 3)
    with pytest.raises(ValueError, match="not one of Wan's"):
        apply(model(), object(), images)
    steered = apply(model(), load(), images)
    with pytest.raises(ValueError, match="has a controlnet already"):
        apply(steered, load(), images)


def test_the_control_video_of_the_node(models):
    images = torch.rand(9, 32, 40, 4)
    (args,) = apply(model(), load(), images, 0.5, 3, 0.1, 0.9).payloads
    assert isinstance(args, ControlArgs) and args.control.shape == (1, 3, 9, 32, 40)
    assert (args.strength, args.stride, args.start, args.end) == (0.5, 3, 0.1, 0.9)
    torch.testing.assert_close(args.control[0, :, 4, 7, 11], images[4, 7, 11, :3] * 2 - 1)


@pytest.mark.parametrize(("device", "places"), [("main_device", ["acquire"]), ("offload_device", [])])
def test_where_it_waits(models, monkeypatch, device, places):
    seen = []
    monkeypatch.setattr("wanvideo_wrapper.host.standalone.ModuleOnDevice.acquire", lambda self: seen.append("acquire"))
    load(device=device)
    assert seen == places


def test_runs_of_the_sampler(models):
    """Strength 0 is the plain run; both passes of guidance are steered by the prompt; windows see their own part."""
    text = TextEmbeds(positive=(torch.randn(4, tiny.TEXT_DIM),), negative=(torch.randn(3, tiny.TEXT_DIM),))
    image = N["WanVideoEmptyEmbeds"]().process(width=32, height=32, num_frames=25)[0]
    plain, net, images = model(), load(), torch.rand(25, 32, 32, 3)

    def run(model, cfg=1.0, **more):
        return N["WanVideoSampler"]().process(
            model, image, 5.0, 2, cfg, 3, "euler", 0, text_embeds=text, **more
        )[0]["samples"]

    off, on = run(plain), run(apply(plain, net, images))
    assert torch.equal(off, run(apply(plain, net, images, strength=0.0))) and not plain.payloads
    assert on.isfinite().all() and (on - off).abs().max() > 1e-3
    assert torch.equal(run(apply(plain, net, images, end=0.5)), run(apply(plain, net, images, end=0.25)))
    assert not torch.equal(run(apply(plain, net, images, end=0.5)), on)
    guided = run(apply(plain, net, images), cfg=3.0)
    both = run(apply(plain, net, images), cfg=3.0, batched_cfg=True)
    torch.testing.assert_close(guided, both, rtol=1e-4, atol=1e-4)
    context = ContextOptions(schedule="static_standard", size=13, overlap=4, freenoise=False)
    windows = run(apply(plain, net, images), context_options=context)
    assert (windows - run(plain, context_options=context)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has 9 frames but the video has 25"):
        run(apply(plain, net, images[:9]))


def test_runs_are_told_apart_by_the_file(models):
    net = load()
    again = load_controlnet(
        net.path, open_own(net.path, KIND, SYSTEMS), base_dtype=torch.float32, quantization="disabled", host=get_host()
    )
    assert net == again and replace(net, options=()) != again
