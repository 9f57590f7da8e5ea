"""The graphs of example_workflows: whole, complete, and run headless with tiny models under the names that they use.

`python tests/example_graphs.py` makes them; ComfyUI shows NAME.jpg beside NAME.json under its templates.
"""

import itertools
import json

import av
import example_graphs
import pytest
import torch
from PIL import Image
from saved_models import quantizable, save_fp8, save_gguf
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import INPUT, MODELS, tiny
from wanvideo_wrapper.headless.check import check
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import load
from wanvideo_wrapper.headless.model_list import needed_models
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.vace.extension import VaceExtension

CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
FILES = sorted(example_graphs.FOLDER.glob("*.json"))
NOTES = {"MarkdownNote"}
TITLE = 30
VACE = VaceExtension(blocks=2)


def saved(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host with every file that a graph names, in folders of other names than the graphs have."""
    models, inputs, out = (tmp_path_factory.mktemp(name) for name in ("models", "input", "output"))
    fill(models, inputs)
    before = get_host()
    set_host(StandaloneHost(models=models, inputs=inputs, outputs=out, device="cpu"))
    yield get_host()
    set_host(before)


def fill(models, inputs):
    torch.manual_seed(5)
    diffusion = models / "diffusion_models" / "wan"
    i2v = tiny.image_to_video()
    whole = tiny.transformer(in_dim=16, extensions=(VACE,))
    module = {name: value for name, value in whole.tensors.items() if VACE.owns(name)}
    base = {name: value for name, value in whole.tensors.items() if name not in module}
    t2v = tiny.Tiny(tensors=base, metadata=whole.metadata)
    save_gguf(i2v, diffusion / example_graphs.TALKING_I2V)
    save_fp8(i2v, diffusion / example_graphs.I2V, scaled=False)
    save_fp8(t2v, diffusion / example_graphs.T2V, scaled=True)
    plain = {n: v.to(torch.float8_e4m3fn) if quantizable(n, v) else v.half() for n, v in module.items()}
    tiny.Tiny(tensors=plain).save(diffusion / example_graphs.VACE)
    for seed, noise in enumerate(("HIGH", "LOW")):
        save_fp8(tiny.transformer(in_dim=36, seed=seed), diffusion / example_graphs.A14B.format(noise), scaled=True)
    for people in ("Single", "Multi"):
        save_gguf(tiny.speech_module(), diffusion / example_graphs.TALK.format(people))
    tiny.lora(i2v).save(models / "loras/wan" / example_graphs.LORA_I2V)
    tiny.lora(t2v).save(models / "loras/wan" / example_graphs.LORA_T2V)
    tiny.vae().save(models / "vae/wan" / example_graphs.VAE)
    tiny.text_encoder().save(models / "text_encoders" / example_graphs.UMT5)
    tiny.wav2vec().save(models / "wav2vec2" / example_graphs.WAV2VEC, torch.float16)
    tiny.clip_vision().save(models / "clip_vision" / example_graphs.CLIP)
    for source in MODELS.rglob("*.safetensors"):
        target = models / source.relative_to(MODELS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.save(inputs / "example.png")
    for name in ("speech.wav", "speech_2.wav"):
        (inputs / name).write_bytes((INPUT / "speech.wav").read_bytes())


def test_the_files_are_those_of_the_script():
    graphs = {graph.name: json.loads(json.dumps(graph.saved())) for graph in example_graphs.all_graphs()}
    assert {path.stem: saved(path) for path in FILES} == graphs, "python tests/example_graphs.py writes them anew"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_links_and_sockets_agree(path):
    graph = saved(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    for link, source, output, target, entry, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][entry]["link"] == link
    linked = {entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"]}
    assert linked == {link[0] for link in graph["links"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_do_not_overlap(path):
    for a, b in itertools.combinations(saved(path)["nodes"], 2):
        (ax, ay), (bx, by), (aw, ah), (bw, bh) = a["pos"], b["pos"], a["size"], b["size"]
        beside = ax + aw <= bx or bx + bw <= ax
        below = ay + ah <= by - TITLE or by + bh <= ay - TITLE
        assert beside or below, (a["type"], b["type"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_of_files_are_shown_whole(path):
    """Of 340 pixels ComfyUI's front end showed 43 letters; it cuts the end off, where precisions stand."""
    for node in saved(path)["nodes"]:
        names = [value for value in node.get("widgets_values", ()) if str(value).endswith((".safetensors", ".gguf"))]
        assert all(node["size"][0] >= 5.8 * len(name) + 90 for name in names if node["type"] not in NOTES), node["type"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_nodes_of_this_pack_and_of_comfyui_itself(path):
    for node in saved(path)["nodes"]:
        ours = CLASSES.get(node["type"]) is not None and node["type"] in NODE_CLASS_MAPPINGS
        assert node["type"] in NOTES or ours or node["properties"]["cnr_id"] == "comfy-core"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_thumbnail_lies_beside(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and 200 <= picture.width <= 800
    assert path.with_suffix(".jpg").stat().st_size < 60_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_wrong_where_the_files_are_there(path, host):
    prompt = load(path, CLASSES)
    for node in prompt.nodes.values():
        if "attention_mode" in node.inputs:
            node.inputs["attention_mode"] = "sdpa"
    order = check(prompt, CLASSES, host)
    assert {node.id for node in order} == set(prompt.nodes), "every node takes part in the result"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_note_names_every_file_and_its_source(path, host):
    note = saved(path)["nodes"][0]["widgets_values"][0]
    for needed in needed_models(load(path, CLASSES), host):
        if (MODELS / needed.folder / needed.name).is_file():
            continue
        assert len(needed.elsewhere) == 1 or needed.present
        assert needed.published.url(needed.name) in note and f"`{needed.folder}`: [{needed.name}]" in note


SMALL = {
    "text_to_video": (
        "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=9",
    ),
    "two_models_a14b": (
        "WanVideoImageToVideoEncode.width=64", "WanVideoImageToVideoEncode.height=64",
        "WanVideoImageToVideoEncode.num_frames=9", "High noise.steps=2", "Low noise.steps=2", "High noise.end_step=1",
        "Low noise.start_step=1",
    ),
    "infinitetalk_two_speakers": (
        "WanVideoImageToVideoMultiTalk.width=64", "WanVideoImageToVideoMultiTalk.height=64",
        "WanVideoImageToVideoMultiTalk.frame_window_size=9", "WanVideoImageToVideoMultiTalk.motion_frame=1",
        "MultiTalkWav2VecEmbeds.num_frames=9",
    ),
    "vace_picture_to_video": (
        "WanVideoVACEEncode.width=64", "WanVideoVACEEncode.height=64", "WanVideoVACEEncode.num_frames=9",
        "WanVideoVACEStartToEndFrame.num_frames=9",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_graph_runs_to_a_video(name, host):
    prompt = load(example_graphs.FOLDER / f"{name}.json", CLASSES)
    samplers = sum(node.type == "WanVideoSampler" for node in prompt.nodes.values())
    # A CPU is many times faster in float32.
    common = ("WanVideoVAELoader.precision=fp32", *(("WanVideoSampler.steps=2",) if samplers == 1 else ()))
    for edit in (*SMALL[name], *common):
        prompt.set(edit, CLASSES)
    (shown,) = Runner(prompt, CLASSES, host).run()
    with av.open(shown["videos"][0]) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        assert len(frames) == 9 and min(frame.std() for frame in frames) > 1
        assert bool(container.streams.audio) == name.startswith("infinitetalk")
