"""Lynx against its authors' passes in float64: features of the picture first, then the video that reads them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import randomize
from float64_wan import Exact, relative
from layouts import Layout
from published_keys import keys_of
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.attention import AttentionCall
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.lynx.adapters import IpAdapter, RefAdapter
from wanvideo_wrapper.lynx.extension import FACE, Lynx, LynxFace, Seen
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import NO_TEXT, Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs
from windowed import LEAST, blended, denoisers, windowed

CONFIG = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=8, text_len=4)
GRID, SIDES = (3, 2, 3), (4, 6)
LITE = Lynx(ip_blocks=(0, 2), context_dim=10, bias=False)
FULL = Lynx(ip_blocks=(0, 1, 2), context_dim=10, registers=3, ref_blocks=(0, 1, 2))
MIXED = replace(LITE, ref_blocks=(0, 1, 2))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def face(ip=True, picture=True, **fields):
    known = {"ip_scale": torch.tensor(0.7), "ref_scale": torch.tensor(0.6)}
    if ip:
        known |= {"tokens": rand(1, 5, 10, seed=1), "without_tokens": rand(1, 5, 10, seed=2)}
    if picture:
        known |= {"picture": rand(1, 16, 1, 4, 6, seed=3), "without_picture": rand(1, 16, 1, 4, 6, seed=4),
                  "prompt": rand(1, 3, 8, seed=5)}  # fmt: skip
    return LynxFace(**known | fields)


def inputs(*payloads, batch=1, **fields):
    return ModelInputs(**{**dict(
        latents=rand(batch, 16, GRID[0], *SIDES, seed=6), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(4, 8, seed=7 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    ), **fields})  # fmt: skip


def identity(w, name, tokens, q):
    """Attention to face tokens: behind registers with the text's key norm, or a norm without weights."""
    adapter, batch = f"{name}.ip_adapter", q.shape[0]
    tokens = tokens.double().expand(batch, -1, -1)
    if f"{adapter}.registers" in w.weights:
        tokens = torch.cat((tokens, w.weights[f"{adapter}.registers"].expand(batch, -1, -1)), dim=1)
        k = w.rms(f"{name}.norm_k", w.linear(f"{adapter}.to_k_ip", tokens))
    else:
        k = w.linear(f"{adapter}.to_k_ip", tokens)
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-5)
    return w.attention(q, w.heads(k), w.heads(w.linear(f"{adapter}.to_v_ip", tokens)))


def features_of(w, payload):
    """Each block's input of self-attention in a pass of the picture alone at time 0."""
    x, (_, mod), text = w.patches(payload.picture), w.times(torch.zeros(1)), w.text(list(payload.prompt))
    turns, features = w.turns((1, *(side // 2 for side in payload.picture.shape[3:]))), []
    for index in w.blocks:
        shift, scale, gate, shift2, scale2, gate2 = w.modulated(index, mod)
        features.append(w.norm(x) * (1 + scale) + shift)
        seen = w.attention(*w.self_qkv(index, features[-1], turns))
        x = x + gate * w.linear(f"blocks.{index}.self_attn.o", seen)
        x = x + w.cross(index, x, text)
        x = x + gate2 * w.feed_forward(index, w.norm(x) * (1 + scale2) + shift2)
    return features


def exact(model, asked, payload, extension):
    w = Exact(model)
    x, (e, mod), text, turns = w.patches(asked.latents), w.times(asked.timestep), w.text(asked.text), w.turns(GRID)
    features = None if payload.picture is None else features_of(w, payload)
    for index in w.blocks:
        name = f"blocks.{index}.self_attn"
        shift, scale, gate, shift2, scale2, gate2 = w.modulated(index, mod)
        into = w.norm(x) * (1 + scale) + shift
        out = w.attention(*w.self_qkv(index, into, turns))
        if features is not None and (payload.ref_blocks is None or index in payload.ref_blocks):
            reference = features[index].expand(x.shape[0], -1, -1)
            q = w.heads(w.rms(f"{name}.norm_q", w.linear(f"{name}.q", into)))
            k = w.heads(w.rms(f"{name}.norm_k", w.linear(f"{name}.ref_adapter.to_k_ref", reference)))
            v = w.heads(w.linear(f"{name}.ref_adapter.to_v_ref", reference))
            out = out + payload.ref_scale.double() * w.attention(q, k, v)
        x = x + gate * w.linear(f"{name}.o", out)
        more = None
        if payload.tokens is not None and index in extension.ip_blocks:
            def more(q, name=f"blocks.{index}.cross_attn"):
                return payload.ip_scale.double() * identity(w, name, payload.tokens, q)
        x = x + w.cross(index, x, text, more)
        x = x + gate2 * w.feed_forward(index, w.norm(x) * (1 + scale2) + shift2)
    return w.velocity(x, e, GRID)


@torch.no_grad()
@pytest.mark.parametrize(("extension", "fields", "batch"), [
    (LITE, {"picture": False}, 1), (FULL, {}, 1), (FULL, {"ref_blocks": (1,)}, 2), (MIXED, {}, 1),
    (FULL, {"ip": False}, 1),
])  # fmt: skip
def test_model_is_the_authors(extension, fields, batch):
    model, payload = randomize(WanModel(CONFIG, (extension,))), face(**fields)
    asked = inputs(payload, batch=batch)
    want = exact(model, asked, payload, extension)
    assert relative(model(asked), want) < 1e-5
    assert relative(model(inputs(batch=batch)), want) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 1.0, True), (0.31, 1.0, False)])
def test_the_face_is_there_in_its_steps_only(start, end, acts):
    model = randomize(WanModel(CONFIG, (FULL,)))
    payload = face(start=start, end=end, cfg=(2.0,))
    assert torch.equal(model(inputs(payload)), model(inputs())) != acts
    assert (payload.guidance(6.0, Step(index=3, total=10)) is not None) == acts


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("cfg", [(1.0,), (2.5, 0.5)])
def test_passes_add_up_as_published(cfg, batched):
    """Nothing + cfg * (face - nothing) + scale * (all - face); at a cfg of 1 two passes, the second without a face."""
    model, payload = randomize(WanModel(CONFIG, (FULL,))), face(cfg=cfg)
    positive, negative, latents = rand(4, 8, seed=7), rand(3, 8, seed=8), rand(16, GRID[0], *SIDES, seed=6)
    denoiser = Denoiser(
        model, Conditions(positive=positive, negative=negative, payloads=(payload,)),
        guidance=Guidance(cfg=(6.0,), payloads=(payload,), batched=batched), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    got = denoiser(latents, torch.tensor(731.0), Step(index=3, total=10, in_run=1))
    none = replace(payload, tokens=payload.without_tokens, picture=payload.without_picture)

    def run(text, seen):
        return model(inputs(seen, text=(text,)))[0]

    whole, seen, nothing = run(positive, payload), run(negative, payload), run(negative, none)
    share = cfg[-1]
    want = nothing + share * (seen - nothing) + 6.0 * (whole - seen)
    if share == 1.0:
        want = nothing + 6.0 * (whole - nothing)
    assert relative(got, want.double()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
def test_windows_are_the_same_frames_alone(batched):
    """Each under the whole face, with guidance by it."""
    model, latents, step = randomize(WanModel(CONFIG, (FULL,))), rand(16, 5, *SIDES, seed=6), Step(index=3, total=10)
    conditions = Conditions(positive=rand(4, 8, seed=7), negative=rand(3, 8, seed=8), payloads=(face(cfg=(2.5,)),))
    make, time = denoisers(model, 6.0, batched=batched), torch.tensor(731.0)
    alone = [
        (places, shares, make(conditions)(latents[:, places], time, step))
        for places, shares in (([0, 1, 2], (1.0, 1.0, 1.0)), ([2, 3, 4], (LEAST, 1.0, 1.0)))
    ]
    got = windowed(conditions, make, size=9)(latents, time, step)
    assert relative(got, blended(alone, 5).double()) < 1e-5


def test_what_passes_go_without():
    alone, guiding = face(), face(cfg=(2.0,))
    assert alone.without(NO_TEXT).tokens is alone.without_tokens
    assert guiding.without(NO_TEXT) is guiding
    assert guiding.without(NO_TEXT | {FACE}).picture is guiding.without_picture


def test_spans_keep_the_picture_to_itself():
    q, cond = torch.zeros(1, 12, 2, 4), Seen(None, 9, 12, torch.tensor(1.0), torch.tensor(1.0), whole=(9, 12))
    call, _ = FULL.attend(None, AttentionCall(q, q, q), cond)
    assert call.spans == (((0, 9), (0, 9)), ((9, 12), (9, 12)))
    others = (((0, 6), (0, 12)), ((6, 8), (6, 8)), ((8, 12), (0, 12)))
    call, _ = FULL.attend(None, AttentionCall(q, q, q, others), cond)
    assert call.spans == (((0, 6), (0, 9)), ((6, 8), (6, 8)), ((8, 9), (0, 9)), ((9, 12), (9, 12)))
    with pytest.raises(ValueError, match="reference tokens"):
        FULL.attend(None, AttentionCall(q, q, q), cond._replace(whole=(6, 9)))


def test_what_does_not_fit_is_refused():
    def run(extension, payload):
        randomize(WanModel(CONFIG, (extension,)))(inputs(payload))

    for extension, payload, says in [
        (LITE, face(), "has its ip layers alone"), (Lynx(ref_blocks=(0,)), face(), "has its ref layers alone"),
        (FULL, face(tokens=rand(1, 5, 12)), "have 12 channels but the model's ip layers read 10"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            run(extension, payload)
    with pytest.raises(ValueError, match="48 channels but the video has 16"):
        run(FULL, replace(face(), picture=rand(1, 48, 1, 4, 4)))


@torch.no_grad()
def test_every_linear_layer_of_the_adapters_reads_dense_rows():
    model, dense, scattered = randomize(WanModel(CONFIG, (FULL,))), [], Layout("permuted", 0, 0).place
    block = model.blocks[0]
    ip, ref = block.cross_attn.ip_adapter, block.self_attn.ref_adapter
    assert isinstance(ip, IpAdapter) and isinstance(ref, RefAdapter)
    q, tokens = rand(2, 18, 2, 24), rand(2, 5, 10, seed=1)
    flat, wide = rand(2, 18, 48, seed=2), rand(2, 9, 48, seed=3)
    want = ip(block.cross_attn, q, tokens), ref(block.self_attn, flat, wide[:, 2:])
    for layer in (ip.to_k_ip, ip.to_v_ip, ref.to_k_ref, ref.to_v_ref):
        layer.register_forward_pre_hook(lambda _, given: dense.append(given[0].is_contiguous()))
        layer.register_forward_hook(lambda _, __, out: scattered(out))
    for attention in (block.cross_attn, block.self_attn):
        kernel = attention.attention

        def strict(q, k, v, kernel=kernel):
            assert all(t.stride(-1) == 1 for t in (q, k, v))
            return kernel(q, k, v)

        attention.attention = strict
    got = ip(block.cross_attn, q, scattered(tokens)), ref(block.self_attn, scattered(flat), wide[:, 2:])
    assert dense == [True] * 4
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lynx_full_module", "lynx_lite_module"])
def test_keys_and_shapes_are_the_published_ones(name):
    shapes = keys_of(name)
    (found,) = [e for e in SYSTEMS.detect(shapes) if isinstance(e, Lynx)]
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=64, num_heads=40, num_layers=40), (found,))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if found.owns(k)} == shapes
    assert SYSTEMS.kind_of(shapes) is Lynx.file


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("option", ["disabled", "fp8_e4m3fn_fast", "fp4_scaled"])
def test_quantized_model_with_its_modules(option, device, tmp_path, monkeypatch):
    """Identity and picture from two files, as saved graphs chain them."""
    if option.endswith("_fast") and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    extension = Lynx(ip_blocks=(0,), context_dim=32, bias=False, ref_blocks=(0, 1))
    whole = tiny.transformer(in_dim=16, extensions=(extension,), layers=2)
    parts = {"ip": {}, "ref": {}, "base": {}}
    for key, value in whole.tensors.items():
        parts["ip" if "ip_adapter" in key else "ref" if "ref_adapter" in key else "base"][key] = value
    for part, tensors in parts.items():
        metadata = whole.metadata if part == "base" else {}
        tiny.Tiny(tensors=tensors, metadata=metadata).save(tmp_path / f"{part}.safetensors", torch.float32)
    payload = face(tokens=rand(1, 5, 32, seed=1), prompt=F.pad(rand(1, 3, 8, seed=5), (0, tiny.TEXT_DIM - 8)))

    def run(precision, quantization, place):
        modules = tuple(ModuleFile(tmp_path / f"{part}.safetensors", Lynx.file) for part in ("ip", "ref"))
        options = LoadOptions(base_dtype=precision, quantization=quantization, modules=modules)
        model = load_wan_model(tmp_path / "base.safetensors", options, StandaloneHost(device=place), SYSTEMS)
        quantized = type(model.transformer.blocks[0].self_attn.ref_adapter.to_k_ref) is not torch.nn.Linear
        assert quantized == (quantization != "disabled")
        asked = ModelInputs(
            latents=rand(1, 16, 2, 4, 4, seed=1).to(place), timestep=torch.tensor([700.0], device=place),
            text=(rand(5, tiny.TEXT_DIM, seed=2).to(place),), payloads=(payload.to(torch.device(place), precision),),
        )  # fmt: skip
        with model.active() as transformer:
            return transformer(asked).cpu()

    want = run(torch.float32, "disabled", "cpu")
    got = run(torch.bfloat16 if device == "cuda" else torch.float32, option, device)
    assert relative(got, want.double()) < (0.02 if option == "disabled" else 0.25)
