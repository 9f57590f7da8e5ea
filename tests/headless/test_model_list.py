"""What `wanvideo models` says of a workflow: every file once, where it belongs, whether it is there."""

import re

import pytest
from saved_models import GRAPHS
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import INPUT, MODELS, WORKFLOW
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Node, Prompt, load
from wanvideo_wrapper.headless.model_list import needed_models, report
from wanvideo_wrapper.headless.published_files import PUBLISHED, published
from wanvideo_wrapper.headless.widgets import inputs_of
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.saved_values import ModelFiles

MODEL, VAE = "WanVideo\\Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors", "wanvideo/Wan2_1_VAE_bf16.safetensors"


def prompt(*nodes):
    return Prompt({str(key): Node(str(key), kind, "", inputs) for key, (kind, inputs) in enumerate(nodes)}, {})


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_there_moved_and_missing(tmp_path):
    host = StandaloneHost(models=tmp_path, device="cpu")
    touch(tmp_path / "diffusion_models/WanVideo/Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors")
    touch(tmp_path / "vae/Wan2_1_VAE_bf16.safetensors")
    graph = prompt(
        ("WanVideoModelLoader", {"model": MODEL, "quantization": "disabled"}),
        ("WanVideoVAELoader", {"model_name": VAE}),
        ("MultiTalkModelLoader", {"model": "Wan2_1-InfiniteTalk_Single_Q8.gguf"}),
        ("WanVideoLoraSelect", {"lora": "mine.safetensors"}),
        ("WanVideoModelLoader", {"model": MODEL}),
    )
    model, vae, talk, lora = needed_models(graph, host)
    assert model.present and model.nodes == ("WanVideoModelLoader (#0)", "WanVideoModelLoader (#4)")
    assert not vae.present and vae.elsewhere == ("Wan2_1_VAE_bf16.safetensors",) and "which is taken" in vae.line()
    assert not talk.present and talk.folder == "diffusion_models"
    assert talk.line().endswith(
        "2.7 GB, https://huggingface.co/Kijai/WanVideo_comfy_GGUF/blob/main/InfiniteTalk/"
        "Wan2_1-InfiniteTalk_Single_Q8.gguf"
    )
    assert lora.folder == "loras" and "WanVideoLoraSelect (#3); where it is published is not known" in lora.line()


def test_notes_say_where_a_file_is_published(tmp_path):
    hub = "https://huggingface.co/a-b/c_d"
    note = f"[model]({hub}/blob/main/x/Mine.safetensors)\n\n{hub}/tree/main/loras. And https://elsewhere.net/of.gguf"
    graph = prompt(
        ("WanVideoModelLoader", {"model": "there\\Mine.safetensors"}), ("WanVideoLoraSelect", {"lora": "b.safetensors"})
    )
    graph.workflow = {"nodes": [{"type": "MarkdownNote", "widgets_values": [note, note]}]}
    host = StandaloneHost(models=tmp_path, device="cpu")
    model, lora, *more = report(graph, needed_models(graph, host))
    assert model.endswith(f"there/Mine.safetensors: {hub}/blob/main/x/Mine.safetensors (a note of the workflow)")
    assert lora.endswith("where it is published is not known here")
    assert [line.strip() for line in more[1:]] == [f"{hub}/tree/main/loras"] and "notes" in more[0]
    touch(tmp_path / "loras/b.safetensors")
    assert len(list(report(graph, needed_models(graph, host)))) == 2
    assert list(report(prompt(), [])) == ["The workflow names no model files."]


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("Wan2_2-S2V-14B_fp8_e5m2_scaled_KJ.safetensors", "Kijai/WanVideo_comfy_fp8_scaled"),
        ("Wan2.1-FlashVSR_fp8_scaled_KJ.safetensors", "Kijai/WanVideo_comfy_fp8_scaled"),
        ("Wan2_1_FlashVSR_TCDecoder_fp16.safetensors", "Kijai/WanVideo_comfy"),
        ("LongCat_distill_lora_alpha64_bf16.safetensors", "Kijai/LongCat-Video_comfy"),
        ("wan2.1-t2v-14b-Q4_0.gguf", None),
        ("my_wan.safetensors", None),
    ],
)
def test_a_file_without_a_link_of_its_own_has_a_likely_place(name, repository, tmp_path):
    host = StandaloneHost(models=tmp_path, device="cpu")
    (entry,) = needed_models(prompt(("WanVideoModelLoader", {"model": f"WanVideo\\{name}"})), host)
    known = "not known here" if repository is None else f"https://huggingface.co/{repository}/tree/main"
    assert entry.published is None and entry.line().endswith(known)


def test_of_several_files_of_a_name_none_is_taken(tmp_path):
    host = StandaloneHost(models=tmp_path, device="cpu")
    for place in ("a", "b"):
        touch(tmp_path / f"vae/{place}/Wan2_1_VAE_bf16.safetensors")
    (vae,) = needed_models(prompt(("WanVideoVAELoader", {"model_name": VAE})), host)
    assert len(vae.elsewhere) == 2 and vae.line().endswith("b/Wan2_1_VAE_bf16.safetensors, choose one of them")


def test_every_loader_is_said_to_read_the_folder_that_it_reads(tmp_path):
    before, host = get_host(), StandaloneHost(models=tmp_path, device="cpu")
    set_host(host)
    try:
        reads = {
            (kind, entry.kind.folder)
            for kind, node in {**STAND_INS, **NODE_CLASS_MAPPINGS}.items()
            for entry in inputs_of(node)
            if isinstance(entry.kind, ModelFiles)
        }
    finally:
        set_host(before)
    said = {(kind, needed_models(prompt((kind, {"file": "a.safetensors"})), host)[0].folder) for kind, _ in reads}
    assert len(reads) > 25 and said == reads


def test_detectors_have_their_folder_and_nodes_that_fetch_their_files_are_left_out(tmp_path):
    graph = prompt(
        ("OnnxDetectionModelLoader", {"vitpose_model": "a.onnx"}),
        ("DownloadAndLoadDepthAnythingV2Model", {"model": "depth_anything_v2_vitl_fp16.safetensors"}),
    )
    (needed,) = needed_models(graph, StandaloneHost(models=tmp_path, device="cpu"))
    assert needed.line().startswith("MISSING   models/detection/a.onnx")


def test_gguf_files_are_found_beside_the_others(tmp_path):
    touch(tmp_path / "diffusion_models/a.gguf")
    graph = prompt(("WanVideoModelLoader", {"model": "a.gguf"}))
    (needed,) = needed_models(graph, StandaloneHost(models=tmp_path, device="cpu"))
    assert needed.present and needed.line() == "there     models/diffusion_models/a.gguf"


def test_the_demo_has_all_it_needs(tmp_path):
    graph = load(WORKFLOW, {**STAND_INS, **NODE_CLASS_MAPPINGS})
    needed = needed_models(graph, StandaloneHost(models=MODELS, inputs=INPUT, device="cpu"))
    assert len(needed) >= 4 and all(entry.present for entry in needed)
    elsewhere = needed_models(graph, StandaloneHost(models=tmp_path, device="cpu"))
    assert all(entry.line().endswith(f"it comes with this pack: --models {MODELS}") for entry in elsewhere)


@pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")
@pytest.mark.parametrize("pattern", ["*I2V_InfiniteTalk*03*.json", "*T2V_example_03*.json", "*I2V_A14B_example*.json"])
def test_files_of_saved_graphs_are_known(pattern, tmp_path):
    (path,) = GRAPHS.glob(pattern)
    graph = load(path, {**STAND_INS, **NODE_CLASS_MAPPINGS})
    needed = needed_models(graph, StandaloneHost(models=tmp_path, device="cpu"))
    unknown = {entry.name for entry in needed if entry.published is None}
    assert len(needed) >= 4 and unknown <= {"depth_anything_v2_vitl_fp16.safetensors"}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.pattern)
def test_rows_are_sound(row):
    assert re.compile(row.pattern) and 0.1 < row.gigabytes < 60
    assert row.url("x.gguf").startswith(f"https://huggingface.co/{row.repository}/blob/main/")
    required = re.sub(r"\([^)]*\)\?", "", row.pattern)
    first = re.sub(r"\(([^|)]+)[^)]*\)|\[(.)[^]]*\]", r"\1\2", required)
    name = first.replace("\\", "").replace("_?", "_")
    assert published(f"WanVideo\\{name}") is row
