"""Text encoders as people have them: GGUF, FP8, without a tokenizer; and prompts that were encoded before."""

import logging
import re
from contextlib import nullcontext

import pytest
import torch
from foreign_files import STORAGES, mark, save
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from layouts import relative
from sentencepiece import SentencePieceProcessor
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.gguf import GgufEmbedding, GgufLinear
from wanvideo_wrapper.quantized.nvfp4 import Nvfp4Linear
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.modules import t5, tokenizer
from wanvideo_wrapper.wanvideo.text_cache import PIECE_DISTANCE, TextCache, content_digest

PROMPTS = ("a person talks to the camera", "a  woman is singing, in the evening!", "(red:1.2) panda \u00e9\u4e2d x", "")


@pytest.fixture
def host(tmp_path):
    (tmp_path / "text_encoders").mkdir()
    return StandaloneHost(models=tmp_path, device="cpu")


def field_of(message, wanted):
    """The first bytes field of that number in a protobuf message; empty where there is none."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 2:
            size = varint()
            if key >> 3 == wanted:
                return message[place : place + size]
            place += size
        elif key & 7 == 0:
            varint()
        else:
            place += 4 if key & 7 == 5 else 8
    return b""


def save_gguf_encoder(path, form, *, names="ggml", vocabulary=True):
    """As llama.cpp's converter writes UMT5; returns the values that the file holds, under Hugging Face's names."""
    model = tiny.text_encoder(wan_names=False)
    spiece = bytes(model.tensors.pop("spiece_model").tolist())
    kind = GGMLQuantizationType[form]
    writer, exact = GGUFWriter(path, "t5encoder"), dict(model.tensors)
    for name, value in model.tensors.items():
        stored = t5.styled_name(name, "ggml") if names == "ggml" else name
        array = value.float().numpy()
        if value.dim() == 2 and value.shape[1] % GGML_QUANT_SIZES[kind][0] == 0 and "bias" not in name:
            blocks = quants.quantize(array, kind)
            writer.add_tensor(stored, blocks, raw_dtype=kind)
            exact[name] = torch.from_numpy(quants.dequantize(blocks, kind))
        else:
            writer.add_tensor(stored, array)
    if vocabulary:
        pieces = SentencePieceProcessor(model_proto=spiece)
        ids = range(pieces.get_piece_size())
        writer.add_tokenizer_model("t5")
        writer.add_token_list([pieces.id_to_piece(i) for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types([6 if pieces.is_byte(i) else 3 if pieces.is_control(i) else 1 for i in ids])
        writer.add_unk_token_id(pieces.unk_id())
        if charsmap := field_of(field_of(spiece, 3), 2):
            writer.add_precompiled_charsmap(charsmap)
    for call in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, call)()
    return exact | {"spiece_model": torch.tensor(list(spiece), dtype=torch.uint8)}


@pytest.mark.parametrize("names", ["ggml", "hf"])
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "BF16"])
def test_gguf_encoder(host, form, names, tmp_path):
    folder = tmp_path / "text_encoders"
    exact = save_gguf_encoder(folder / "t5.gguf", form, names=names)
    tiny.Tiny(tensors=exact).save(folder / "exact.safetensors", torch.float32)
    got, want = (
        t5.load_text_encoder(folder / name, dtype=torch.float32, host=host) for name in ("t5.gguf", "exact.safetensors")
    )
    for ours, theirs in zip(got.encode(PROMPTS), want.encode(PROMPTS), strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5
    if form != "BF16":
        linear = [m for m in got._model.modules() if isinstance(m, torch.nn.Linear)]
        assert linear and all(type(layer) is GgufLinear for layer in linear)
        assert type(got._model.shared) is GgufEmbedding
    assert "UMT5 text encoder" in str(describe(folder / "t5.gguf", SYSTEMS))
    with pytest.raises(ValueError, match=r"t5\.gguf is a GGUF file, whose own") if form != "BF16" else nullcontext():
        t5.load_text_encoder(folder / "t5.gguf", dtype=torch.float32, host=host, quantization="fp8_e4m3fn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gguf_encoder_in_the_precision_of_the_loader(host, dtype, tmp_path):
    save_gguf_encoder(tmp_path / "text_encoders" / "t5.gguf", "Q8_0")
    encoder = t5.load_text_encoder(tmp_path / "text_encoders" / "t5.gguf", dtype=dtype, host=host)
    embedding = encoder.encode(["a person"])[0]
    assert embedding.dtype == dtype and embedding.isfinite().all() and embedding.abs().max() > 0


def nvfp4(weight):
    layer = Nvfp4Linear.quantize(weight, None)
    scales = {"weight_scale": layer.stored[1], "weight_scale_2": layer.stored[2]}
    return layer, scales | {"comfy_quant": mark(format="nvfp4")}


ENCODER_STORAGES = STORAGES | {"nvfp4": (nvfp4, "NVFP4", Nvfp4Linear)}


@pytest.mark.parametrize("kind", ENCODER_STORAGES)
def test_encoders_in_the_storages_of_transformers(host, kind, tmp_path, caplog):
    """Integers keep their bytes under either option; MXFP8 and NVFP4 are expanded, as their `wo` layers cannot stay."""
    make, name, fast = ENCODER_STORAGES[kind]
    model, path = tiny.text_encoder(wan_names=kind.startswith("w")), tmp_path / "t5.safetensors"
    exact = save(model, path, make, chosen=lambda key, value: value.dim() == 2 and ".bias" not in key and (
        "attn." in key or "ffn." in key or "SelfAttention." in key or "DenseReluDense." in key
    ) and "relative" not in key)  # fmt: skip
    exact.save(tmp_path / "exact.safetensors", torch.float32)
    expands = kind in ("mxfp8", "nvfp4")
    for quantization in ("disabled", "fp8_e4m3fn"):
        # What is expanded is stored in FP8 as the layers of any other file are.
        chosen = quantization if expands else "disabled"
        plain = t5.load_text_encoder(
            tmp_path / "exact.safetensors", dtype=torch.float32, host=host, quantization=chosen
        )
        want = plain.encode(PROMPTS)
        caplog.clear()
        with caplog.at_level(logging.INFO, "wanvideo"):
            got = t5.load_text_encoder(path, dtype=torch.float32, host=host, quantization=quantization)
        for ours, theirs in zip(got.encode(PROMPTS), want, strict=True):
            assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5
        kinds, others = (
            {type(m) for m in encoder._model.modules() if isinstance(m, torch.nn.Linear)} for encoder in (got, plain)
        )
        assert kinds == (others if expands else {fast.__mro__[1]})
        assert (f"t5.safetensors holds {name.split()[0]}, which is kept as it is." in caplog.text) == (
            quantization != "disabled" and not expands
        )
        said = [m for m in caplog.messages if f"weights in {name.split()[0]} are expanded" in m]
        assert len(said) == expands and all(m.endswith("quantization 'fp8_e4m3fn' takes less.") for m in said)
    want = t5.load_text_encoder(tmp_path / "exact.safetensors", dtype=torch.float32, host=host).encode(PROMPTS[:1])
    for dtype in (torch.bfloat16, torch.float16):
        (rounded,) = t5.load_text_encoder(path, dtype=dtype, host=host).encode(PROMPTS[:1])
        assert rounded.dtype == dtype and relative(rounded, want[0]) < 0.05
    assert "UMT5 text encoder" in str(describe(path, SYSTEMS)) and f"{name} (" in str(describe(path, SYSTEMS))


def test_the_vocabulary_of_a_gguf_header_gives_sentencepieces_ids(host, tmp_path):
    exact = save_gguf_encoder(tmp_path / "t5.gguf", "Q8_0")
    processor = SentencePieceProcessor(model_proto=bytes(exact["spiece_model"].tolist()))
    encoder = t5.load_text_encoder(tmp_path / "t5.gguf", dtype=torch.float32, host=host)
    words = " ".join(tiny.SENTENCES).split()
    sentences = [*tiny.SENTENCES, *PROMPTS, *(" ".join(words[i::7]) for i in range(7))]
    for sentence in sentences:
        text = tokenizer.clean(sentence)
        assert encoder._tokenizer.encode(sentence) == [*processor.encode(text), tokenizer.END_OF_TEXT], sentence


def test_a_broken_vocabulary_is_named(host, tmp_path):
    writer = GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for name, value in tiny.text_encoder(wan_names=False).tensors.items():
        if name != "spiece_model":
            writer.add_tensor(t5.styled_name(name, "ggml"), value.float().numpy())
    writer.add_token_list(["a", "b"])
    for call in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, call)()
    with pytest.raises(ValueError, match=r"t5\.gguf has a damaged tokenizer \(the vocabulary in its header is no UMT"):
        t5.load_text_encoder(tmp_path / "t5.gguf", dtype=torch.float32, host=host)


@pytest.fixture
def without_tokenizer(tmp_path, monkeypatch):
    """A file as saved graphs name it, and its tokenizer; the cache of the hub is an empty folder."""
    model = tiny.text_encoder()
    spiece = bytes(model.tensors.pop("spiece_model").tolist())
    path = tmp_path / "text_encoders" / "umt5-xxl-enc-bf16.safetensors"
    model.save(path, torch.float32)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return path, spiece


def test_a_tokenizer_is_fetched_once_at_a_pinned_revision(host, without_tokenizer, tmp_path, monkeypatch, caplog):
    path, spiece = without_tokenizer
    asked = []

    def download(repository, name, *, revision):
        asked.append((repository, name, revision))
        folder = tmp_path / "hub" / "models--google--umt5-xxl" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / name).write_bytes(spiece)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with caplog.at_level(logging.INFO, "wanvideo"):
        for _ in range(2):
            encoder = t5.load_text_encoder(path, dtype=torch.float32, host=host)
    assert asked == [("google/umt5-xxl", "spiece.model", tokenizer.REVISION)] and len(tokenizer.REVISION) == 40
    assert encoder.encode(["a person"])[0].isfinite().all()
    assert caplog.text.count("Fetching spiece.model of google/umt5-xxl") == 1


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("no such file\nhere")])
def test_without_a_connection_the_files_are_named(host, without_tokenizer, error, monkeypatch):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = (
        r"no tokenizer for umt5-xxl-enc-bf16\.safetensors, and it could not be fetched \(no connection\): put the "
    )
    with pytest.raises(FileNotFoundError, match=message + r"spiece\.model or tokenizer\.json of google/umt5-xxl into "):
        t5.load_text_encoder(without_tokenizer[0], dtype=torch.float32, host=host)


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_nothing_is_fetched_offline(host, without_tokenizer, value, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **o: pytest.fail("fetched"))
    with pytest.raises(FileNotFoundError, match=r"\(HF_HUB_OFFLINE is set\): put the spiece\.model or tokenizer\.json"):
        t5.load_text_encoder(without_tokenizer[0], dtype=torch.float32, host=host)


def test_encoders_are_told_apart_by_content(tmp_path):
    path = tmp_path / "t5.safetensors"
    tiny.text_encoder(seed=1).save(path, torch.float32)
    first = t5.encoder_name(path, torch.float32)
    assert first == t5.encoder_name(path, torch.float32)
    copy = tmp_path / "other name.safetensors"
    copy.write_bytes(path.read_bytes())
    assert t5.encoder_name(copy, torch.float32) == first
    assert len({first, t5.encoder_name(path, torch.bfloat16), t5.encoder_name(path, torch.float32, "fp8_e4m3fn")}) == 3
    tiny.text_encoder(seed=2).save(path, torch.float32)
    assert t5.encoder_name(path, torch.float32) != first


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20 + 7, 2**20 + PIECE_DISTANCE, 3 * PIECE_DISTANCE - 1])
def test_samples_reach_the_whole_file(place, tmp_path):
    data = bytearray(torch.randint(256, (3 * PIECE_DISTANCE,), dtype=torch.uint8).numpy().tobytes())
    path = tmp_path / "file"
    path.write_bytes(data)
    before = content_digest([path])
    data[place] ^= 1
    path.write_bytes(data)
    assert content_digest([path]) != before


def test_a_cached_prompt_that_cannot_be_read_is_made_anew(tmp_path, caplog):
    cache, embedding = TextCache(tmp_path / "cache"), torch.randn(4, 8)
    cache.save("a cat", "one", embedding)
    cache.save("a cat", "two", embedding + 1)
    paths = {name: cache._path("a cat", name) for name in ("one", "two")}
    assert torch.equal(cache.load("a cat", "one"), embedding) and torch.equal(cache.load("a cat", "two"), embedding + 1)
    assert cache.load("a dog", "one") is None and cache.load("a cat", "three") is None
    for damage in (paths["two"].read_bytes()[:-3], b"", b"{}"):
        paths["two"].write_bytes(damage)
        caplog.clear()
        assert cache.load("a cat", "two") is None and re.search("left aside: .*truncated", caplog.text)
        assert torch.equal(cache.load("a cat", None), embedding)
    cache.save("a cat", "two", embedding + 2)
    assert torch.equal(cache.load("a cat", "two"), embedding + 2)
    assert not list((tmp_path / "cache").glob("*.part"))
