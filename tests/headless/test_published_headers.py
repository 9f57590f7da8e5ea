"""Headers that are made of a name, against the keys, shapes and sizes of the files that were published under it."""

import math
from pathlib import Path

import pytest
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless import cli
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.memory_plan import plan
from wanvideo_wrapper.headless.model_list import published
from wanvideo_wrapper.headless.published_headers import PlanningHost, is_known, open_or_make
from wanvideo_wrapper.host import get_host, set_host

CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
# Bits of a value, scales included.
BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "GGUF": 8.5, "F16": 16, "BF16": 16, "F32": 32}
FILES = {
    "wan2.1_t2v_1.3B_fp16.safetensors": "wan21_t2v_1_3B",
    "wan2.2_ti2v_5B_fp16.safetensors": "wan22_ti2v_5B",
    "Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors": "wan21_t2v_14B",
    "Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors": "wan21_i2v_14B",
    "wan2.1-i2v-14b-480p-Q8_0.gguf": "wan21_i2v_14B",
    "Wan2_1-FLF2V-14B-720P_fp8_e4m3fn.safetensors": "wan21_flf2v_14B",
    "Wan2_2-I2V-A14B-HIGH_fp8_e5m2_scaled_KJ.safetensors": "wan22_i2v_A14B",
    "Wan21-SkyReelsV3-A2V_fp8_scaled_mixed.safetensors": "skyreels_v3_talking_avatar_14B",
    "Wan2_1-InfiniteTalk_Single_Q8.gguf": "infinitetalk_module",
    "Wan2_1-VACE_module_14B_fp8_e4m3fn.safetensors": "vace_module_only_14B",
    "Wan2_1-VACE_module_1_3B_bf16.safetensors": "vace_module_only_1_3B",
}


@pytest.fixture
def host(tmp_path):
    before = get_host()
    set_host(PlanningHost(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


@pytest.mark.parametrize("name", FILES)
def test_keys_and_shapes_are_those_of_the_file(name, tmp_path):
    made = open_or_make(tmp_path / name)
    facts = {key.replace("audio_proj.", "multitalk_audio_proj.", 1) if key.startswith("audio_proj.") else key: shape
             for key, shape in keys_of(FILES[name]).items()}  # fmt: skip
    assert {key: tuple(shape) for key, shape in made.shapes.items()} == facts
    row = published(name)
    if row is not None:
        size = sum(math.prod(made.shapes[key]) * BITS[form.split()[0]] / 8 for key, form in made.formats.items())
        assert size / 1e9 == pytest.approx(row.gigabytes, rel=0.06)


def node(key, kind, **inputs):
    return Node(key, kind, "", inputs)


def workflow(model, *more, **sockets):
    loader = {"model": model, "base_precision": "bf16", "quantization": "disabled", "attention_mode": "sdpa"}
    return Prompt({n.id: n for n in (node("1", "WanVideoModelLoader", **loader, **sockets), *more)}, {})


def test_what_is_planned_before_the_download_is_said(host):
    talk = node("2", "MultiTalkModelLoader", model="a\\Wan2_1-InfiniteTalk_Single_Q8.gguf")
    vae = node("3", "WanVideoVAELoader", model_name="Wan2_1_VAE_bf16.safetensors")
    lines = plan(workflow("wan2.1-i2v-14b-480p-Q8_0.gguf", talk, vae, multitalk_model=Link("2", 0)), CLASSES, host)
    said = "\n".join(lines)
    assert "20.4 GB of weights" in lines[1] and "in 40 blocks" in lines[1]
    assert "not there yet, from the published sizes: wan2.1-i2v-14b-480p-Q8_0.gguf, Wan2_1-InfiniteTalk_S" in lines[2]
    assert "Wan2_1_VAE_bf16.safetensors: 0.2 GB (published, not there yet)" in said and "3 files in all" in lines[-1]


def test_modules_behind_modules_count(host):
    first = node("2", "WanVideoExtraModelSelect", extra_model="Wan2_1-InfiniteTalk_Single_Q8.gguf")
    second = node(
        "3", "WanVideoExtraModelSelect", extra_model="Wan2_1-VACE_module_14B_bf16.safetensors", prev_model=Link("2", 0)
    )
    prompt = workflow("Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", first, second, extra_model=Link("3", 0))
    lines = plan(prompt, CLASSES, host)
    assert "in 48 blocks" in lines[1] and "InfiniteTalk" in lines[2] and "VACE" in lines[2]


def test_one_model_that_is_not_known_leaves_the_other(host):
    prompt = workflow("of_nobody.safetensors")
    other = workflow("wan2.2_ti2v_5B_fp16.safetensors").nodes["1"]
    prompt.nodes["2"] = Node("2", other.type, "", other.inputs)
    _, unknown, known, *_ = plan(prompt, CLASSES, host)
    assert "of_nobody.safetensors: not planned, as its sizes are not known before" in unknown
    assert "wan2.2_ti2v_5B_fp16.safetensors: 10" in known


def test_all_that_is_missing_is_named_at_once(host, tmp_path):
    """A node that reads its file when it runs does not run for that."""
    vae = node("2", "WanVideoVAELoader", model_name="Wan2_1_VAE_bf16.safetensors")
    ear = node("3", "FantasyTalkingModelLoader", model="x/fantasytalking_fp16.safetensors", base_precision="fp16")
    prompt = workflow("wan2.1-i2v-14b-480p-Q8_0.gguf", vae, ear, fantasytalking_model=Link("3", 0))
    with pytest.raises(FileNotFoundError) as refusal:
        plan(prompt, CLASSES, host)
    assert "diffusion_models/x/fantasytalking_fp16.safetensors" in str(refusal.value)
    with pytest.raises(FileNotFoundError) as refusal:
        plan(workflow("of_nobody.safetensors", vae), CLASSES, host)
    assert "diffusion_models/of_nobody.safetensors" in str(refusal.value)
    assert "vae/Wan2_1_VAE_bf16.safetensors: 0.25 GB" in str(refusal.value)
    assert not is_known(tmp_path / "of_nobody.safetensors")


def test_a_file_in_another_subfolder_is_read_and_not_guessed(host, tmp_path):
    (tmp_path / "diffusion_models/b").mkdir(parents=True)
    (tmp_path / "diffusion_models/b/wan2.2_ti2v_5B_fp16.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="truncated"):
        plan(workflow("a/wan2.2_ti2v_5B_fp16.safetensors"), CLASSES, host)


def test_the_command_answers_with_no_model_there(tmp_path, capsys):
    graph = Path(__file__).parents[2] / "example_workflows/vace_picture_to_video.json"
    assert cli.main(["plan", str(graph), "--models", str(tmp_path), "--vram", "12"]) == 0
    assert "with 12 GiB: WanVideoBlockSwap" in capsys.readouterr().out
