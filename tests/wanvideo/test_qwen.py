"""The language model against a float64 form, what it is asked, and how it is stopped."""

import logging

import pytest
import torch
from qwen_files import HEADS, MARKS, PAIRS, VOCABULARY, WIDTH, hidden_states, language_model, save_tokenizer
from wanvideo_wrapper.host import CancelledError, StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.modules import qwen, qwen_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_tokenizer(tmp_path / "text_encoders" / "qwen" / "tokenizer.json")
    return tmp_path / "text_encoders"


def load(folder, *, tied=False, host=None):
    tiny = language_model(tied=tied)
    tiny.save(folder / "qwen.safetensors", torch.float32)
    host = host or StandaloneHost(models=folder.parent, device="cpu")
    return tiny, qwen.load_qwen(folder / "qwen.safetensors", dtype=torch.float32, host=host)


@pytest.mark.parametrize("tied", [False, True])
def test_logits(folder, tied):
    tiny, model = load(folder, tied=tied)
    ids = torch.randint(VOCABULARY, (11,))
    embedding = tiny.tensors["model.embed_tokens.weight"].double()
    x = hidden_states(tiny.tensors, embedding[ids], torch.arange(11.0).double().expand(3, -1))
    want = x @ (embedding if tied else tiny.tensors["lm_head.weight"].double()).T
    with torch.no_grad():
        got = model.model(input_ids=ids[None]).logits[0].double()
    assert (got - want).norm() / want.norm() < 1e-5
    assert "Qwen2.5 language model" in str(describe(folder / "qwen.safetensors", SYSTEMS))


def test_an_answer_is_sampled_as_wan_does(folder, monkeypatch):
    _, model = load(folder)
    reader, asked = save_tokenizer(folder / "copy.json"), []
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **o: asked.append(o) or generate(**o))
    before = torch.get_rng_state()
    first = model.answer("Be brief.", "a cat", most=12, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert model.answer("Be brief.", "a cat", most=12, seed=3) == first != model.answer("", "a cat", most=12, seed=4)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert reader.decode(asked[0]["input_ids"][0].tolist(), skip_special_tokens=False) == text
    options = {name: asked[0][name] for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")}
    assert list(options.values()) == [True, 0.7, 0.8, 20, 1.05]
    torch.manual_seed(3)
    ids = asked[0]["input_ids"]
    want = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=[258, 256],
                    pad_token_id=258, **options)  # fmt: skip
    assert reader.decode(want[0, ids.shape[1] :].tolist()) == first


def test_an_answer_ends_at_its_end_and_can_be_cancelled(folder):
    class Impatient(StandaloneHost):
        asked = 0

        def check_cancelled(self):
            self.asked += 1
            if self.asked == 3:
                raise CancelledError

    _, model = load(folder, host=Impatient(models=folder.parent, device="cpu"))
    with pytest.raises(CancelledError):
        model.answer("", "a cat", most=50, seed=0)
    # Nothing but the end mark is ever likely.
    model.model.lm_head = torch.nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    model.model.lm_head.bias[258] = 1e3
    assert model.answer("", "a cat", most=50, seed=0) == "" and model._host.asked == 4


def test_sizes_are_read_from_the_file(folder):
    _, model = load(folder)
    config = model.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (HEADS, PAIRS, WIDTH)
    other = language_model()
    del other.tensors["model.layers.0.self_attn.q_proj.bias"]
    other.save(folder / "llama.safetensors")
    with pytest.raises(ValueError, match=r"llama\.safetensors is no Qwen2\.5 language model"):
        qwen.load_qwen(folder / "llama.safetensors", dtype=torch.float32, host=model._host)


def test_the_tokenizer_is_fetched_once_at_a_pinned_revision(folder, tmp_path, monkeypatch, caplog):
    (folder / "qwen" / "tokenizer.json").unlink()
    save_tokenizer(folder / "tokenizer.json", marks=("</s>",))
    language_model().save(folder / "qwen.safetensors")
    host = StandaloneHost(models=tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"\(HF_HUB_OFFLINE is set\): put the tokenizer\.json of Qwen/Qwen2\.5"):
        qwen.load_qwen(folder / "qwen.safetensors", dtype=torch.float32, host=host)
    asked = []

    def download(repository, name, *, revision):
        asked.append((repository, name, revision))
        path = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / revision / name
        save_tokenizer(path)
        return str(path)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with caplog.at_level(logging.INFO, "wanvideo"):
        for _ in range(2):
            qwen.load_qwen(folder / "qwen.safetensors", dtype=torch.float32, host=host)
    assert asked == [("Qwen/Qwen2.5-7B-Instruct", "tokenizer.json", qwen_tokenizer.REVISION)]
    assert len(qwen_tokenizer.REVISION) == 40
    assert caplog.text.count("Fetching tokenizer.json of Qwen/Qwen2.5-7B-Instruct (7 MB, once") == 1
    (folder / "qwen" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        qwen.load_qwen(folder / "qwen.safetensors", dtype=torch.float32, host=host)


def test_marks_are_read_as_marks(folder):
    tokenizer = qwen_tokenizer.find_qwen_tokenizer(folder / "qwen.safetensors", [folder])
    assert tokenizer.encode("<|im_start|>a") == [257, tokenizer.encode("a")[0]]
    assert [tokenizer.id_of(mark) for mark in MARKS] == [256 + i for i in range(len(MARKS))]
    assert tokenizer.decode(tokenizer.encode("<|im_start|>Grüße 猫<|im_end|>")) == "Grüße 猫"
