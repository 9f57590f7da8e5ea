"""Nodes of Uni3C: files of every size and precision, what is refused, and whole runs of the sampler."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.quantized.fp8 import Fp8Linear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.uni3c.controlnet import KIND, Uni3CControlnet, Uni3CSizes, renamed
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.own_model import open_own
from wanvideo_wrapper.wanvideo.request import TextEmbeds
from wanvideo_wrapper.wanvideo.windows import ContextOptions

FACTS = json.loads((Path(__file__).parents[1] / "data/checkpoints/uni3c_controlnet.json").read_text())
SIZES = Uni3CSizes(
    config=WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=36),
    wide=96, time_dim=128, out_dim=128, extra=7, middle=16,
)  # fmt: skip


def published_shapes():
    shapes = {}
    for key, value in FACTS.items():
        if isinstance(value, dict) and "shape" in value:
            shapes |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in range(value["count"])}
        elif key != "_meta":
            shapes[key] = tuple(value)
    return shapes


def published_tensors(sizes=SIZES, dtype=torch.float32):
    """A file's tensors: names of attention as published."""
    torch.manual_seed(5)
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".o.": ".to_out.0."}
    tensors = {}
    for key, value in Uni3CControlnet(sizes, sdpa()).state_dict().items():
        for own, theirs in names.items():
            key = key.replace(f"self_attn{own}", f"self_attn{theirs}")
        tensors[key] = (torch.randn(value.shape) * 0.2).to(dtype)
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "controlnet").mkdir()
    heads = {"wanvideo.num_heads": "2"}
    save_file(published_tensors(), folder / "controlnet/uni3c.safetensors", metadata=heads)
    save_file(published_tensors(dtype=torch.float8_e4m3fn), folder / "controlnet/uni3c_fp8.safetensors", metadata=heads)
    tiny.transformer(in_dim=16).save(folder / "diffusion_models/wan.safetensors", torch.float32)
    tiny.transformer(in_dim=16).save(folder / "controlnet/wan.safetensors")
    before = get_host()
    set_host(StandaloneHost(models=folder, device="cpu"))
    yield folder
    set_host(before)


def load(name="uni3c.safetensors", precision="fp32", quantization="disabled", attention="sdpa", device="main_device"):
    return N["WanVideoUni3C_ControlnetLoader"]().loadmodel(name, precision, device, quantization, attention)[0]


def embeds(net, render, **more):
    args = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "render_latent": {"samples": render}, **more}
    return N["WanVideoUni3C_embeds"]().process(net, **args)[0]


def test_published_keys_and_shapes():
    shapes = published_shapes()
    assert len(shapes) == FACTS["_meta"]["n_keys"]
    sizes = Uni3CSizes(
        config=WanConfig(dim=1024, ffn_dim=8192, num_heads=16, num_layers=20, in_dim=20),
        wide=5120, time_dim=5120, out_dim=5120, extra=7, middle=256,
    )  # fmt: skip
    with torch.device("meta"):
        module = Uni3CControlnet(sizes, sdpa())
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {renamed(k): v for k, v in shapes.items()}


def test_sizes_are_read_from_the_file(models):
    checkpoint = open_own(models / "controlnet/uni3c.safetensors", KIND, SYSTEMS).renamed(renamed)
    assert Uni3CSizes.of(checkpoint) == SIZES
    assert KIND.name in str(describe(models / "controlnet/uni3c.safetensors", SYSTEMS))


def test_the_file_is_what_runs(models):
    module = load().module
    want = {renamed(k): v for k, v in published_tensors().items()}
    assert all(torch.equal(value, want[key]) for key, value in module.state_dict().items())
    half = load(precision="fp16", device="main_device").module
    assert {p.dtype for n, p in half.named_parameters() if not n.startswith("controlnet_patch")} == {torch.float16}
    assert half.controlnet_patch_embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "quantization"), [("uni3c", "fp8_e4m3fn"), ("uni3c", "fp8_e5m2"), ("uni3c_fp8", "disabled")]
)
def test_precisions(models, name, quantization):
    """Linear layers of blocks and the projections behind them hold FP8; norms and what reads latents do not."""
    module = load(f"{name}.safetensors", quantization=quantization).module
    few = {n for n, layer in module.named_modules() if isinstance(layer, Fp8Linear)}
    blocks = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
    assert few == {f"controlnet_blocks.{i}.{n}" for i in range(2) for n in blocks} | {"proj_out.0", "proj_out.1"}
    exact, render = load().module, torch.randn(1, 36, 3, 4, 4)
    x, want = module.embed(render, None), exact.embed(render, None)
    assert x.dtype == torch.float32 and (x - want).norm() / want.norm() < 0.1


def test_what_cannot_run_is_told_before_weights_are_read(models, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("No compiler")

    monkeypatch.setattr("wanvideo_wrapper.uni3c.controlnet.fill_own", None)
    loader = N["WanVideoUni3C_ControlnetLoader"]()
    with pytest.raises(ValueError, match="^torch.compile cannot run here: RuntimeError: No compiler"):
        args = CompileArgs(backend=no_compiler)
        loader.loadmodel("uni3c.safetensors", "fp32", "main_device", "disabled", "sdpa", compile_args=args)
    monkeypatch.setattr("wanvideo_wrapper.quantized.fp8.holds", lambda device, dtype: dtype != torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="^uni3c_fp8.safetensors holds weights in FP8, which 'cpu' devices"):
        load("uni3c_fp8.safetensors")


def test_what_is_refused(models):
    with pytest.raises(ValueError, match="wan.safetensors is a Wan transformer, not a Uni3C controlnet; load it with"):
        load("wan.safetensors")
    tensors = published_tensors()
    del tensors["proj_out.0.weight"]
    save_file(tensors, models / "controlnet/part.safetensors")
    with pytest.raises(ValueError, match="part.safetensors lacks 'proj_out.0.weight'"):
        load("part.safetensors")
    with pytest.raises(ValueError, match="attention_mode 'sageattn' cannot run"):
        load(attention="sageattn")
    net = load()
    with pytest.raises(ValueError, match="nothing to follow"):
        N["WanVideoUni3C_embeds"]().process(net, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="not Uni3C's"):
        embeds(object(), torch.randn(1, 16, 3, 4, 4))
    with pytest.raises(ValueError, match=r"'render_latent' is \(1, 16, 4, 4\), but latents of a video are"):
        embeds(net, torch.randn(1, 16, 4, 4))
    with pytest.raises(ValueError, match="reads 7 channels of mask and camera rays"):
        embeds(net, torch.randn(1, 16, 3, 4, 4), render_mask=torch.ones(9, 32, 32))


@pytest.mark.parametrize(("device", "places"), [("main_device", ["acquire"]), ("offload_device", [])])
def test_where_it_waits(models, monkeypatch, device, places):
    seen = []
    monkeypatch.setattr("wanvideo_wrapper.host.standalone.ModuleOnDevice.acquire", lambda self: seen.append("acquire"))
    load(device=device)
    assert seen == places


def test_a_mask_for_a_file_that_reads_one(models):
    sizes = replace(SIZES, extra=1)
    save_file(published_tensors(sizes), models / "controlnet/mask.safetensors", metadata={"wanvideo.num_heads": "2"})
    mask = torch.rand(9, 32, 40)
    args = embeds(load("mask.safetensors"), torch.randn(1, 16, 3, 4, 4), render_mask=mask, offload=False)
    assert torch.equal(args.mask, mask[None, None]) and not args.offload


def test_runs_of_the_sampler(models):
    """Strength 0 is the plain run; guided passes see the render; windows see their own part."""
    model = N["WanVideoModelLoader"]().loadmodel("wan.safetensors", "fp32", "offload_device", "disabled")[0]
    text = TextEmbeds(positive=(torch.randn(4, tiny.TEXT_DIM),), negative=(torch.randn(3, tiny.TEXT_DIM),))
    image = N["WanVideoEmptyEmbeds"]().process(width=32, height=32, num_frames=25)[0]
    net, render = load(), torch.randn(1, 16, 7, 4, 4)

    def run(args=None, cfg=1.0, **more):
        more |= {"text_embeds": text, "uni3c_embeds": args}
        return N["WanVideoSampler"]().process(model, image, 5.0, 2, cfg, 3, "euler", 0, **more)[0]["samples"]

    plain, strong = run(), run(embeds(net, render))
    assert torch.equal(plain, run(embeds(net, render, strength=0.0)))
    assert strong.isfinite().all() and (strong - plain).abs().max() > 1e-3
    torch.testing.assert_close(strong, run(embeds(net, render, offload=False)))
    guided = run(embeds(net, render), cfg=3.0)
    torch.testing.assert_close(guided, run(embeds(net, render), cfg=3.0, batched_cfg=True), rtol=1e-4, atol=1e-4)
    context = ContextOptions(schedule="static_standard", size=13, overlap=4, freenoise=False)
    windows = run(embeds(net, render), context_options=context)
    assert (windows - run(context_options=context)).abs().max() > 1e-3 and (windows - strong).abs().max() > 1e-3
