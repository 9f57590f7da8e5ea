"""Prompts that a language model extends, alone and before they are encoded."""

import pytest
import torch
from qwen_files import language_model, save_tokenizer
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper import nodes_prompt
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.system_prompts import SYSTEM_PROMPTS

DIRECTOR = "T2V Movie Director (English)"


@pytest.fixture
def folder(tmp_path):
    before = get_host()
    save_tokenizer(tmp_path / "text_encoders" / "qwen" / "tokenizer.json")
    language_model().save(tmp_path / "text_encoders" / "qwen.safetensors", torch.float32)
    tiny.text_encoder().save(tmp_path / "text_encoders" / "t5.safetensors", torch.float32)
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    nodes_prompt._answer.cache_clear()
    yield tmp_path / "text_encoders"
    set_host(before)


def extend(qwen, **options):
    return N["WanVideoPromptExtender"]().generate(qwen, "a cat", "gpu", True, 8, **options)[0]


def test_instructions(folder, monkeypatch):
    (qwen,) = N["QwenLoader"]().load("qwen.safetensors", "offload_device", "fp32")
    given = []
    monkeypatch.setattr(qwen, "answer", lambda system, prompt, **o: given.append((system, prompt, o)) or "more")
    assert extend(qwen, system_prompt=DIRECTOR, seed=5) == "more"
    extend(qwen, system_prompt=DIRECTOR, custom_system_prompt="own")
    extend(qwen, system_prompt=DIRECTOR, custom_system_prompt="")
    extend(qwen)
    assert [system for system, *_ in given] == [SYSTEM_PROMPTS[DIRECTOR], "own", "", ""]
    assert given[0][1:] == ("a cat", {"most": 8, "seed": 5, "device": None})
    assert len(set(SYSTEM_PROMPTS.values())) == 6 and all("\\" not in text for text in SYSTEM_PROMPTS.values())


@pytest.mark.parametrize("node", ["QwenLoader", "WanVideoPromptExtenderSelect"])
def test_other_files_are_refused_before_the_run(folder, node):
    assert N[node].VALIDATE_INPUTS("qwen.safetensors") is True
    with pytest.raises(ValueError, match="load it with 'WanVideo T5 Text Encoder Loader'"):
        N[node].VALIDATE_INPUTS("t5.safetensors")
    with pytest.raises(ValueError, match="load it with 'Qwen Loader'"):
        N["WanVideoTextEncodeCached"].VALIDATE_INPUTS("qwen.safetensors")


def test_a_prompt_is_extended_before_it_is_encoded(folder, monkeypatch):
    (how,) = N["WanVideoPromptExtenderSelect"]().set("qwen.safetensors", DIRECTOR, 8, seed=5)
    loaded, real = [], nodes_prompt.load_qwen
    monkeypatch.setattr(nodes_prompt, "load_qwen", lambda *a, **o: loaded.append(o["dtype"]) or real(*a, **o))
    encode = N["WanVideoTextEncodeCached"]().process

    def run(negative="bad", given=how):
        return encode("t5.safetensors", "fp32", "a cat", negative, use_disk_cache=False, extender_args=given)

    both, _, prompt = run()
    (qwen,) = N["QwenLoader"]().load("qwen.safetensors", "main_device", "fp32")
    assert prompt == extend(qwen, system_prompt=DIRECTOR, seed=5) != "a cat"
    (plain,) = N["WanVideoTextEncodeSingle"]().process(
        prompt, N["LoadWanVideoT5TextEncoder"]().loadmodel("t5.safetensors", "fp32")[0]
    )
    torch.testing.assert_close(both.positive, plain.positive)
    assert loaded == [torch.float32] * 2
    assert run("worse")[2] == prompt and len(loaded) == 2
    language_model(seed=1).save(folder / "qwen.safetensors", torch.float32)
    run()
    assert len(loaded) == 3 and run(given=None)[2] == "a cat"
