"""UMT5 and CLIP through transformers against small float64 forms, and every published key against their parameters."""

import json
import logging
import math
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear
from wanvideo_wrapper.wanvideo.families import kind_of
from wanvideo_wrapper.wanvideo.modules import clip, t5
from wanvideo_wrapper.wanvideo.modules.tokenizer import MAX_TOKENS, clean

FACTS = Path(__file__).parents[1] / "data" / "checkpoints"


@pytest.fixture
def host(tmp_path):
    (tmp_path / "text_encoders").mkdir()
    return StandaloneHost(models=tmp_path, device="cpu")


def published(name):
    found = {}
    for key, value in json.loads((FACTS / f"{name}.json").read_text()).items():
        if isinstance(value, dict) and "count" in value:
            found |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in range(value["count"])}
        elif key != "_meta":
            found[key] = tuple(value)
    return found


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def bucket(distance, buckets):
    """T5's bidirectional relative position bucket, one distance (key minus query) at a time."""
    half = buckets // 2
    offset, size = (half if distance > 0 else 0), abs(distance)
    exact = half // 2
    if size < exact:
        return offset + size
    grown = exact + int(math.log(size / exact) / math.log(128 / exact) * (half - exact))
    return offset + min(grown, half - 1)


def umt5_float64(p, ids, layers, heads):
    p = {k: v.double() for k, v in p.items() if v.is_floating_point()}
    x = p["token_embedding.weight"][ids]
    count = len(ids)
    for i in range(layers):
        h = rms(x, p[f"blocks.{i}.norm1.weight"])
        q, k, v = ((h @ p[f"blocks.{i}.attn.{n}.weight"].T).view(count, heads, -1) for n in "qkv")
        table = p[f"blocks.{i}.pos_embedding.embedding.weight"]
        rows = [[table[bucket(b - a, len(table))] for b in range(count)] for a in range(count)]
        bias = torch.stack([torch.stack(row) for row in rows])
        weights = (torch.einsum("qhd,khd->hqk", q, k) + bias.permute(2, 0, 1)).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v).reshape(count, -1)
        x = x + out @ p[f"blocks.{i}.attn.o.weight"].T
        h = rms(x, p[f"blocks.{i}.norm2.weight"])
        gate = F.gelu(h @ p[f"blocks.{i}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ p[f"blocks.{i}.ffn.fc1.weight"].T)) @ p[f"blocks.{i}.ffn.fc2.weight"].T
    return rms(x, p["norm.weight"])


@pytest.mark.parametrize("wan_names", [True, False])
def test_umt5_equals_its_float64_form(wan_names, host, tmp_path):
    model = tiny.text_encoder(seed=int(torch.randint(1000, ())), wan_names=wan_names)
    path = tmp_path / "text_encoders" / "t5.safetensors"
    model.save(path, torch.float32)
    encoder = t5.load_text_encoder(path, dtype=torch.float32, host=host)
    prompts = ["a person talks to the camera", "soft light, " * 30, ""]
    tensors = model.tensors if wan_names else {t5.wan_name(k): v for k, v in model.tensors.items() if "." in k}
    for prompt, got in zip(prompts, encoder.encode(prompts), strict=True):
        ids = encoder._tokenizer.encode(prompt)
        assert ids[-1] == 1 and got.shape == (len(ids), tiny.TEXT_DIM)
        assert relative(got, umt5_float64(tensors, ids, 2, 4)) < 1e-4


def test_prompt_weights_scale_their_words(host, tmp_path):
    path = tmp_path / "text_encoders" / "t5.safetensors"
    tiny.text_encoder().save(path, torch.float32)
    encoder = t5.load_text_encoder(path, dtype=torch.float32, host=host)
    plain, weighted = encoder.encode(["a person talks to the camera", "a (person talks:1.5) to the camera"])
    part = encoder._tokenizer.encode("person talks")[:-1]
    ids = encoder._tokenizer.encode("a person talks to the camera")
    start = next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)
    want = plain.clone()
    want[start : start + len(part)] *= 1.5
    torch.testing.assert_close(weighted, want)


def test_weights_of_words_in_every_notation():
    plain, weights = t5.parse_weights("a (red:.5) and (blue:1.) (green hat:1.25) (odd:x) one")
    assert plain == "a red and blue green hat (odd:x) one"
    assert weights == {"red": 0.5, "blue": 1.0, "green hat": 1.25}


@pytest.mark.parametrize("quantization", t5.QUANTIZATIONS)
def test_scaled_fp8_text_encoder(host, quantization, tmp_path):
    model = tiny.text_encoder(wan_names=False)
    tensors, expected = {}, {}
    for name, value in model.tensors.items():
        if value.dim() == 2 and "block" in name and "bias" not in name:
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale.reshape(())
            expected[name] = tensors[name].float() * scale
        else:
            tensors[name] = expected[name] = value
    path = tmp_path / "text_encoders" / "fp8.safetensors"
    save_file({**tensors, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    encoder = t5.load_text_encoder(path, dtype=torch.float32, quantization=quantization, host=host)
    prompt = "a woman is singing a song"
    want = umt5_float64(
        {t5.wan_name(k): v for k, v in expected.items() if "." in k}, encoder._tokenizer.encode(prompt), 2, 4
    )
    assert relative(encoder.encode([prompt])[0], want) < 1e-4


def test_a_text_encoder_in_fp8_needs_a_device_with_fp8(host, tmp_path, monkeypatch):
    path = tmp_path / "text_encoders" / "umt5.safetensors"
    tiny.text_encoder().save(path, torch.float32)
    plain, fp8 = (t5.load_text_encoder(path, dtype=torch.float32, quantization=q, host=host) for q in t5.QUANTIZATIONS)
    monkeypatch.setattr("wanvideo_wrapper.quantized.fp8.holds", lambda device, dtype: device.type != "cpu")
    assert plain.encode(["a woman"])[0].isfinite().all()
    for device in (None, torch.device("cpu")):
        with pytest.raises(ValueError, match="encoder umt5.safetensors has weights in FP8, which 'cpu' devices"):
            fp8.encode(["a woman"], device=device)
    # Computed on the CPU beside a device that has none.
    monkeypatch.setattr("wanvideo_wrapper.quantized.fp8.holds", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(host, "device", lambda: torch.device("mps"))
    assert fp8.encode(["a woman"], device=torch.device("cpu"))[0].isfinite().all()


@pytest.mark.parametrize(("file", "wan"), [("umt5_xxl_encoder_wan", True), ("umt5_xxl_encoder_hf", False)])
def test_every_published_umt5_key_is_one_parameter(file, wan):
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    parameters = {k: tuple(v.shape) for k, v in model.named_parameters()}
    names = {t5.wan_name(k) if wan else k: shape for k, shape in parameters.items()}
    assert names == published(file)


def test_tokenizer_is_found_beside_the_file_or_missed_by_name(host, tmp_path, monkeypatch):
    model = tiny.text_encoder()
    spiece = bytes(model.tensors.pop("spiece_model").tolist())
    path = tmp_path / "text_encoders" / "t5.safetensors"
    model.save(path, torch.float32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name, revision: None)
    fetched = "fetched although HF_HUB_OFFLINE is set"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *name, revision: pytest.fail(fetched))
    with pytest.raises(FileNotFoundError, match=r"\(HF_HUB_OFFLINE is set\): put the spiece\.model or tokenizer\.json"):
        t5.load_text_encoder(path, dtype=torch.float32, host=host)
    (tmp_path / "text_encoders" / "spiece.model").write_bytes(spiece)
    assert t5.load_text_encoder(path, dtype=torch.float32, host=host).encode(["a person"])[0].isfinite().all()


def test_long_prompts_are_cut_with_a_warning(host, tmp_path, caplog):
    path = tmp_path / "text_encoders" / "t5.safetensors"
    tiny.text_encoder().save(path, torch.float32)
    tokenizer = t5.load_text_encoder(path, dtype=torch.float32, host=host)._tokenizer
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer.encode("friendly face " * 400)) == MAX_TOKENS
    assert "only the first 511" in caplog.text
    assert clean("  a &amp;amp; b\n\tc ") == "a & b c"


def clip_float64(p, images, heads):
    p = {k.removeprefix("vision_model."): v.double() for k, v in p.items()}
    pixels = clip.preprocess(images, 224, crop=True).double()
    patches = F.conv2d(pixels, p["embeddings.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    first = p["embeddings.class_embedding"].expand(len(images), 1, -1)
    x = torch.cat((first, patches), 1) + p["embeddings.position_embedding.weight"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = norm(x, "pre_layrnorm")
    layer = "encoder.layers.0"
    h = norm(x, f"{layer}.layer_norm1")
    q, k, v = (linear(h, f"{layer}.self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
    out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + linear(out.transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
    return x + linear(F.gelu(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")


def as_wan_file(tensors):
    """The same tower under the names of Wan's own file, q, k and v fused."""
    out = {"log_scale": torch.zeros(())}
    plain = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    for key, value in plain.items():
        if ".self_attn.q_proj." in key:
            parts = [plain[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            number, leaf = key.split(".")[2], key.rsplit(".", 1)[1]
            out[f"visual.transformer.{number}.attn.to_qkv.{leaf}"] = torch.cat(parts)
            continue
        if "_proj." in key and "out_proj" not in key:
            continue
        name = key
        for new, old in {**clip.TOP_NAMES, **{f".{a}": f".{b}" for a, b in clip.LAYER_NAMES.items()}}.items():
            name = name.replace(new, old)
        name = name.replace("encoder.layers.", "visual.transformer.")
        out[name] = value.reshape(1, 1, -1) if key == "embeddings.class_embedding" else value
    out["visual.pos_embedding"] = out["visual.pos_embedding"][None]
    return out


@pytest.mark.parametrize("wan_file", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (160, 300)])
def test_clip_equals_its_float64_form(wan_file, size, host, tmp_path):
    model = tiny.clip_vision(seed=int(torch.randint(1000, ())))
    tensors = as_wan_file(model.tensors) if wan_file else model.tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "c.safetensors", metadata=model.metadata)
    vision = clip.load_clip_vision(tmp_path / "c.safetensors", dtype=torch.float32, host=host)
    images = torch.rand(2, *size, 3)
    got = vision.encode(images)
    assert got.shape == (2, 257, tiny.CLIP_DIM)
    assert relative(got, clip_float64(model.tensors, images, 2)) < 1e-4
    assert torch.equal(vision.encode_image(images).penultimate_hidden_states, got)


@pytest.mark.parametrize("wan_file", [False, True])
def test_a_clip_file_is_known_by_its_tower_alone(wan_file):
    tensors = tiny.clip_vision().tensors
    tensors = as_wan_file(tensors) if wan_file else tensors
    tensors.pop("log_scale", None)
    assert kind_of({name: tuple(value.shape) for name, value in tensors.items()}).name == "CLIP vision encoder"


def test_every_published_clip_key_is_used():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
            )
        )
    keys = published("clip_xlm_roberta_vit_h_14_visual")

    class File:
        shapes = keys

    source = clip._wan_sources(File)
    assert set(source) == {name.removeprefix("vision_model.") for name, _ in model.named_parameters()}
    assert {key for key, _ in source.values()} == set(keys) - {"log_scale", "visual.head"}


@pytest.mark.parametrize("load", [t5.load_text_encoder, clip.load_clip_vision])
def test_another_kind_of_file_is_named(load, host, tmp_path):
    tiny.vae().save(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae\.safetensors is no (UMT5 text|CLIP vision) encoder"):
        load(tmp_path / "vae.safetensors", dtype=torch.float32, host=host)


@pytest.mark.parametrize("wan_names", [True, False])
def test_fp8_storage_of_the_text_encoder(host, wan_names, tmp_path):
    path, model = tmp_path / "text_encoders" / "umt5.safetensors", tiny.text_encoder(wan_names=wan_names)
    model.save(path, torch.float32)
    encoder = t5.load_text_encoder(path, dtype=torch.float32, quantization="fp8_e4m3fn", host=host)
    expected = {}
    for key, value in model.tensors.items():
        name = key if wan_names or "." not in key else t5.wan_name(key)
        rounded = (
            name.startswith("blocks.") and value.dim() == 2 and not name.endswith(("embedding.weight", "fc2.weight"))
        )
        kept = Fp8Linear.quantize(value, None, torch.float8_e4m3fn).expanded(torch.float32) if rounded else value
        expected[name] = kept
    prompt = "a woman is singing a song"
    want = umt5_float64(expected, encoder._tokenizer.encode(prompt), 2, 4)
    assert relative(encoder.encode([prompt])[0], want) < 1e-4
    assert encoder.name.endswith("fp8_e4m3fn")
    with pytest.raises(ValueError, match="'int4' of a text encoder does not exist; choose one of: disabled"):
        t5.load_text_encoder(path, dtype=torch.float32, quantization="int4", host=host)


def test_the_tokenizer_in_the_file_is_no_unused_tensor(host, tmp_path, caplog):
    caplog.set_level("INFO", "wanvideo")
    model = tiny.text_encoder()
    path = tmp_path / "t5.safetensors"
    tiny.Tiny(tensors={**model.tensors, "of_another": torch.ones(2)}).save(path, torch.float32)
    t5.load_text_encoder(path, dtype=torch.float32, host=host)
    assert "none missing, 1 unused (first 'of_another')" in caplog.text
