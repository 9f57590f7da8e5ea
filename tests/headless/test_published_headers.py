"""Headers that are made of a name, against the keys, shapes and sizes of the files that were published under it."""

import math
from pathlib import Path

import pytest
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import MODELS
from wanvideo_wrapper.headless import cli
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, Node, Prompt, load
from wanvideo_wrapper.headless.memory_plan import plan
from wanvideo_wrapper.headless.model_list import needed_models
from wanvideo_wrapper.headless.published_files import published
from wanvideo_wrapper.headless.published_headers import Header, PlanningHost, is_known, open_or_make
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.checkpoint import checkpoint_of
from wanvideo_wrapper.wanvideo.load_plan import with_aliases
from wanvideo_wrapper.wanvideo.tensor_file import StoredTensor

GRAPHS, FOLDER = Path(__file__).parents[2] / "example_workflows", "diffusion_models"
CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
# Bits of a value, scales included.
BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "GGUF": 8.5, "F16": 16, "BF16": 16, "F32": 32}
# Files of which all keys are known, by the name of those.
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
    "wan2.1_vace_14B_fp16.safetensors": "vace_14B",
    "wan2.1_vace_1.3B_fp16.safetensors": "vace_1_3B",
    "wan2.1_fun_inp_1.3B_bf16.safetensors": "wan21_fun_inp_1_3B",
    "wan2.1_fun_camera_v1.1_14B_bf16.safetensors": "wan21_fun_control_camera_14B",
    "Wan2_2-Fun-Control-A14B-LOW_fp8_e4m3fn_scaled_KJ_fixed.safetensors": "wan22_fun_control_A14B",
    "Wan2_2-Fun-Control-Camera-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors": "wan22_fun_control_camera_A14B",
    "Wan2_1-HuMo-14B_fp8_e4m3fn_scaled_KJ.safetensors": "humo_17B",
    "Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ.safetensors": "s2v_14B",
    "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors": "wananimate_14B",
    "Wan2.1-SteadyDancer_fp8_scaled_KJ.safetensors": "steadydancer_14B",
    "Wan2_1_kwai_recammaster_1_3B_step20000_bf16.safetensors": "recammaster_1_3B",
    "Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors": "skyreels_v2_df_1_3B",
    "Wan2_1-SkyReels-V2-DF-14B-720P_fp16.safetensors": "skyreels_v2_df_14B",
    "Wan2_1-MiniMaxRemover_1_3B_fp16.safetensors": "minimaxremover_1_3B",
    "Wan2_1_MTV-Crafter_motion_adapter_bf16.safetensors": "mtvcrafter_module",
    "Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors": "flashvsr_extra",
    "Wan2_1-T2V-Lynx_lite_ip_layers_fp16.safetensors": "lynx_lite_module",
    "LongCat_TI2V_comfy_fp8_e4m3fn_scaled_KJ.safetensors": "longcat_13B",
    "LongCat-Avatar_bf16.safetensors": "longcat_avatar_13B",
    "model_960x960_10s.safetensors": "ovi_11B",
    "Wan_2_1_Ovi_video_model_bf16.safetensors": "ovi_video_5B",
    "Wan_2_1_Ovi_audio_model_bf16.safetensors": "ovi_audio_5B",
}
# Others that saved graphs name, and the systems that own tensors of theirs.
OTHERS = {
    "Wan2_1-T2V-1-3B-EchoShot_fp16.safetensors": (),
    "Wan2_1-T2V-1_3B_FlashVSR_fp32.safetensors": (),
    "Wan2_1_UniLumos_1_3B_bf16.safetensors": (),
    "wan2.1_fun_control_1.3B_bf16.safetensors": ("ClipImageExtension",),
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera.safetensors": ("FunCamera", "ClipImageExtension"),
    "Wan2_1-Wan-I2V-ATI-14B_fp8_e4m3fn.safetensors": ("ClipImageExtension",),
    "Wan2_1-I2V-14B-MAGREF_fp8_e4m3fn_scaled_KJ.safetensors": ("ClipImageExtension",),
    "Wan21-WanMove_fp8_scaled_e4m3fn_KJ.safetensors": ("ClipImageExtension",),
    "Wan2_1_SkyreelsA2_fp8_e4m3fn.safetensors": ("ClipImageExtension",),
    "Wan21_SkyReelsV3-A2V_fp8_scaled_mixed.safetensors": ("ClipImageExtension", "MultiTalk"),
    "Wan2_1_mocha-14B-preview_fp8_e4m3fn_scaled_KJ.safetensors": (),
    "Wan2_1-T2V-14B-Phantom_fp8_e4m3fn_scaled_KJ.safetensors": (),
    "Wan2_1-T2V-14B_fp8_e4m3fn.safetensors": (),
    "Wan2_2-T2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors": (),
    "Wan2_2-TI2V-5B-FastWanFullAttn_bf16.safetensors": (),
    "Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ.safetensors": ("Scail", "ClipImageExtension"),
    "Wan21-OneToAllAnimation_fp8_e4m3fn_scaled_KJ.safetensors": ("OneToAll",),
    "Wan2_1-T2V-Lynx_full_ref_layers_fp16.safetensors": ("Lynx",),
    "Wan2_1_FantasyPortrait_fp16.safetensors": ("FantasyPortrait",),
    "fantasytalking_fp16.safetensors": ("FantasyTalking",),
}

# They hold networks beside what the transformer reads.
LARGER = {"Wan2_1_FantasyPortrait_fp16.safetensors"}


@pytest.fixture
def host(tmp_path):
    before = get_host()
    set_host(PlanningHost(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


def facts_of(path, name):
    """The shapes of a published file, under the names that models have."""
    tensors = {key: StoredTensor(shape=shape, format="BF16") for key, shape in keys_of(name).items()}
    return with_aliases(checkpoint_of(path, (Header(path, tensors),)), SYSTEMS).shapes


def check_size(checkpoint, name):
    row = published(name)
    if row is not None:
        forms = checkpoint.formats.items()
        bits = sum(math.prod(checkpoint.shapes[key]) * BITS[form.split()[0]] for key, form in forms)
        assert bits / 8e9 == pytest.approx(row.gigabytes, rel=0.06)


@pytest.mark.parametrize("name", FILES)
def test_keys_and_shapes_are_those_of_the_file(name, tmp_path):
    made = open_or_make(tmp_path / name)
    assert made.shapes == facts_of(tmp_path / name, FILES[name])
    check_size(made, name)


@pytest.mark.parametrize("name", OTHERS)
def test_the_systems_are_those_of_the_file(name, tmp_path):
    made = with_aliases(open_or_make(tmp_path / name), SYSTEMS)
    owners = [system for system in SYSTEMS.detect(made.shapes) if any(map(system.owns, made.shapes))]
    assert tuple(type(system).__name__ for system in owners) == OTHERS[name]
    if name not in LARGER:
        check_size(made, name)


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


@pytest.mark.parametrize(
    ("kind", "socket", "file"),
    [
        ("FantasyTalkingModelLoader", "fantasytalking_model", "fantasytalking_fp16.safetensors"),
        ("FantasyPortraitModelLoader", "fantasyportrait_model", "Wan2_1_FantasyPortrait_fp16.safetensors"),
    ],
)
def test_nodes_that_read_their_file_do_not_run(host, kind, socket, file):
    module = node("2", kind, model=file, base_precision="fp16")
    with_module, without = (
        plan(workflow("Wan2_1-I2V-14B-720P_fp8_e4m3fn.safetensors", module, **links), CLASSES, host)
        for links in ({socket: Link("2", 0)}, {})
    )
    assert file in with_module[2] and file not in without[2]
    # Keys and values of 2048 channels in 40 blocks, in fp16.
    weights = [float(lines[1].split(": ")[1].split(" GB")[0]) for lines in (with_module, without)]
    assert weights[0] - weights[1] == pytest.approx(40 * 2 * 2048 * 5120 * 2e-9, abs=0.11)


def test_one_model_that_is_not_known_leaves_the_other(host):
    prompt = workflow("of_nobody.safetensors")
    other = workflow("wan2.2_ti2v_5B_fp16.safetensors").nodes["1"]
    prompt.nodes["2"] = Node("2", other.type, "", other.inputs)
    _, unknown, known, *_ = plan(prompt, CLASSES, host)
    assert "of_nobody.safetensors: not planned, as its sizes are not known before" in unknown
    assert "wan2.2_ti2v_5B_fp16.safetensors: 10" in known


def test_all_that_is_missing_is_named_at_once(host, tmp_path):
    vae = node("2", "WanVideoVAELoader", model_name="Wan2_1_VAE_bf16.safetensors")
    ear = node("3", "MultiTalkModelLoader", model="x/of_nobody_fp16.safetensors")
    prompt = workflow("wan2.1-i2v-14b-480p-Q8_0.gguf", vae, ear, multitalk_model=Link("3", 0))
    with pytest.raises(FileNotFoundError) as refusal:
        plan(prompt, CLASSES, host)
    assert "diffusion_models/x/of_nobody_fp16.safetensors" in str(refusal.value)
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
    # Of two, neither is taken.
    (tmp_path / "diffusion_models/c").mkdir()
    (tmp_path / "diffusion_models/c/wan2.2_ti2v_5B_fp16.safetensors").write_bytes(b"no header")
    lines = plan(workflow("a/wan2.2_ti2v_5B_fp16.safetensors"), CLASSES, host)
    assert any("from the published sizes: wan2.2_ti2v_5B_fp16.safetensors" in line for line in lines)


def test_the_transformers_and_modules_of_all_example_graphs_are_known(tmp_path):
    host = PlanningHost(models=tmp_path, device="cpu")
    needed = [entry for path in GRAPHS.glob("*.json") for entry in needed_models(load(path, CLASSES), host)]
    names = {Path(entry.name).name for entry in needed if entry.folder == FOLDER}
    demo = {path.name for path in MODELS.rglob("*.safetensors")}
    assert len(names - demo) >= 6 and all(is_known(tmp_path / name) for name in names - demo)


def test_the_command_answers_with_no_model_there(tmp_path, capsys):
    graph = GRAPHS / "vace_picture_to_video.json"
    assert cli.main(["plan", str(graph), "--models", str(tmp_path), "--vram", "12"]) == 0
    assert "with 12 GiB: WanVideoBlockSwap" in capsys.readouterr().out
