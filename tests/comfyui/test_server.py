"""The nodes in a real ComfyUI server on CPU: their interfaces, and graphs posted over its HTTP API.

Needs ComfyUI at COMFYUI_PATH (default ~/comfy/ComfyUI) and, in COMFYUI_PYTHON (default this interpreter), what ComfyUI
and this pack import. Nodes of other packs come from this pack's stand-ins.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import pytest
import torch
import wanvideo_wrapper
from safetensors.torch import save_file
from saved_models import GRAPH_RUNS, GRAPHS, ROOT, fill
from wanvideo_wrapper.demo import INPUT, MODELS, WORKFLOW
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, as_api, load
from wanvideo_wrapper.headless.widgets import checked, inputs_of
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
START_SECONDS, RUN_SECONDS = 120, 400
CLIP_DIM = 1280
FOREIGN = ("VHS_VideoCombine", "VHS_LoadVideo", "ImageResizeKJv2", "INTConstant", "FloatConstant")
FOREIGN += ("GetImageSizeAndCount", "GetImageRangeFromBatch", "ImageConcatMulti")

# A copy of the package of its own, with the server's folders.
STAND_IN_PACK = """
import sys
from pathlib import Path
sys.path.insert(0, {packages!r})
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as ALL
from wanvideo_wrapper.host import set_host
from wanvideo_wrapper.host import StandaloneHost
set_host(StandaloneHost(inputs=Path({base!r}) / "input", outputs=Path({base!r}) / "output", device="cpu"))
NODE_CLASS_MAPPINGS = {{name: ALL[name] for name in {names!r}}}
"""


def missing():
    if not (COMFYUI / "main.py").is_file():
        return f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)"
    code = "import aiohttp, alembic, torchsde, kornia, comfyui_frontend_package, diffusers"
    probe = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    reason = (probe.stderr.strip().splitlines() or ["?"])[-1]
    return "" if probe.returncode == 0 else f"{PYTHON} lacks what ComfyUI needs ({reason}); set COMFYUI_PYTHON"


REASON = missing()
pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def save_clip(path):
    """ViT-H at full size, the only one that ComfyUI's own loader takes, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CLIP_DIM, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        projection_dim=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        scale = 0.02 if parameter.dim() > 1 else 0.0
        value = torch.randn(parameter.shape) * scale + (1.0 if name.endswith("norm.weight") else 0.0)
        tensors[f"vision_model.{name.removeprefix('vision_model.')}"] = value.half()
    tensors["visual_projection.weight"] = torch.zeros(1024, CLIP_DIM).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


class Server:
    def __init__(self, base, port):
        self.base, self.url = base, f"http://127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def run(self, prompt, workflow):
        """Post a prompt and wait; returns the files that it wrote."""
        before = set((self.base / "output").rglob("*.mp4")) | set((self.base / "temp").rglob("*.mp4"))
        body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        request = urllib.request.Request(
            f"{self.url}/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"refused: {error.read().decode()[:2000]}")
        deadline = time.time() + RUN_SECONDS
        while time.time() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-2000:]
                written = set((self.base / "output").rglob("*.mp4")) | set((self.base / "temp").rglob("*.mp4"))
                return sorted(written - before)
            time.sleep(0.5)
        pytest.fail(f"the prompt did not finish in {RUN_SECONDS} seconds")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "output", "temp", "user"):
        (base / folder).mkdir()
    shutil.copytree(MODELS, base / "models")
    shutil.copytree(INPUT, base / "input")
    fill(base / "models", base / "input", clip_dim=CLIP_DIM)
    save_clip(base / "models" / "clip_vision" / "clip_vision_h.safetensors")
    (base / "custom_nodes" / "ComfyUI-WanVideoWrapper-Aligned").symlink_to(ROOT)
    (base / "custom_nodes" / "stand_ins").mkdir()
    (base / "packages").mkdir()
    (base / "packages" / "wanvideo_wrapper").symlink_to(ROOT)
    pack = STAND_IN_PACK.format(packages=str(base / "packages"), base=str(base), names=FOREIGN)
    (base / "custom_nodes" / "stand_ins" / "__init__.py").write_text(pack)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON, Path(__file__).with_name("launch.py"), COMFYUI, "--cpu", "--listen", "127.0.0.1"]
    command += ["--port", port, "--disable-auto-launch", "--base-directory", base]
    command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}"]
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, cwd=COMFYUI)
    running = Server(base, port)
    try:
        deadline = time.time() + START_SECONDS
        while True:
            try:
                running.get("/system_stats")
                break
            except OSError:
                tail = (base / "log.txt").read_text()[-2000:]
                assert process.poll() is None and time.time() < deadline, f"the server did not start:\n{tail}"
                time.sleep(0.5)
        yield running
    finally:
        process.terminate()
        process.wait(20)


def api_prompt(path, base, edits, bypassed):
    """The graph as the editor would post it: edited, and without nodes that no output needs."""
    before = get_host()
    set_host(StandaloneHost(models=base / "models", inputs=base / "input", device="cpu"))
    try:
        classes = {**STAND_INS, **wanvideo_wrapper.NODE_CLASS_MAPPINGS}
        prompt = load(path, classes, bypass=bypassed)
        for edit in edits:
            prompt.set(edit, classes)
        needed = set()

        def need(key):
            if key not in needed:
                needed.add(key)
                for value in prompt.nodes[key].inputs.values():
                    if isinstance(value, Link):
                        need(value.node)

        for node in prompt.nodes.values():
            if getattr(classes.get(node.type), "OUTPUT_NODE", False):
                need(node.id)
        prompt.nodes = {key: node for key, node in prompt.nodes.items() if key in needed}
        for node in prompt.nodes.values():
            for entry in inputs_of(classes[node.type]):
                value = node.inputs.get(entry.name)
                if entry.is_widget and not isinstance(value, Link) and entry.name in node.inputs:
                    node.inputs[entry.name] = checked(entry, value, node.label)
        return as_api(prompt), prompt.workflow
    finally:
        set_host(before)


def frames_of(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(container.streams.video[0]))


def test_interfaces(server):
    original = json.loads((ROOT / "tests/data/node_interfaces.json").read_text())
    listed = server.get("/object_info")
    for name in wanvideo_wrapper.NODE_CLASS_MAPPINGS:
        for section in ("required", "optional"):
            wanted = [entry[0] for entry in original[name]["inputs"].get(section, [])]
            assert list(listed[name]["input"].get(section, {}))[: len(wanted)] == wanted
        assert [list(pair) for pair in zip(listed[name]["output"], listed[name]["output_name"], strict=True)] == (
            original[name]["outputs"]
        )


def test_demo(server):
    edits = ("WanVideoSampler.steps=2", "MultiTalkWav2VecEmbeds.num_frames=40")
    prompt, workflow = api_prompt(WORKFLOW, server.base, edits, ())
    (path,) = server.run(prompt, workflow)
    assert frames_of(path) == 40


@pytest.mark.skipif(not GRAPHS.is_dir(), reason=f"no saved graphs in {GRAPHS} (set WANVIDEO_GRAPHS)")
@pytest.mark.parametrize("name", GRAPH_RUNS)
def test_saved_graph(name, server):
    pattern, edits, bypassed, frames = GRAPH_RUNS[name]
    (graph,) = GRAPHS.glob(pattern)
    prompt, workflow = api_prompt(graph, server.base, edits, bypassed)
    (path,) = server.run(prompt, workflow)
    assert frames_of(path) == frames
