"""Folders, names and the one module that knows ComfyUI."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from wanvideo_wrapper.host import OWN_FILES, CancelledError, ComfyHost, StandaloneHost, copies_in
from wanvideo_wrapper.host.protocol import DEMO_MODELS, KINDS, MODEL_SUFFIXES, inside

ROOT = Path(__file__).parents[1]
COMFYUI = {"comfy", "folder_paths", "comfy_extras", "comfy_execution", "latent_preview", "server", "execution"}


def modules():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    return [ROOT / name for name in listed if not name.startswith("tests/")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_only_the_host_knows_comfyui():
    files = modules()
    assert len(files) > 40
    using = {p.name for p in files if any(name.split(".")[0] in COMFYUI for name in imported(p))}
    assert using == {"comfy.py"}


def test_imports_inside_the_package_are_relative():
    absolute = {p for p in modules() if any(n.startswith("wanvideo_wrapper") for n in imported(p))}
    # What runs outside of it.
    assert {p for p in absolute if p.parent.name != "benchmarks"} == {ROOT / "wanvideo_command.py"}


def test_import_is_light_and_needs_no_network_and_no_optional_package():
    heavy = {"diffusers", "transformers", "av", "gguf", "skimage", "pyloudnorm"}
    optional = {"sageattention", "sageattn3", "flash_attn", "flash_attn_interface", "spas_sage_attn", "cudnn"}
    code = (
        "import sys; reached = [];"
        "sys.addaudithook(lambda name, _: name in ('socket.connect', 'socket.getaddrinfo') and reached.append(name));"
        "import wanvideo_wrapper as w; assert len(w.NODE_CLASS_MAPPINGS) >= 146; assert not reached, reached;"
        f"loaded = {heavy | optional!r} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_a_family_that_fails_hides_no_other(monkeypatch, caplog):
    code = (
        "import sys, logging; logging.basicConfig(); sys.modules['wanvideo_wrapper.multitalk.nodes'] = None;"
        "import wanvideo_wrapper as w; print(sorted(w.NODE_CLASS_MAPPINGS))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert "WanVideoSampler" in done.stdout and "WanVideoImageToVideoMultiTalk" not in done.stdout
    assert "multitalk.nodes are not available" in done.stderr


def test_files_are_listed_and_found(tmp_path):
    names = ("diffusion_models/sub/a.safetensors", "diffusion_models/b.gguf", "diffusion_models/c.txt", "vae/v.sft")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    host = StandaloneHost(models=tmp_path, device="cpu")
    assert host.list_files("diffusion_models") == ["sub/a.safetensors"]
    assert host.list_files("unet_gguf") == ["b.gguf"] and host.list_files("loras") == []
    assert host.find_file("diffusion_models", "sub\\a.safetensors") == tmp_path / "diffusion_models/sub/a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no model file 'x\.safetensors': put it into"):
        host.find_file("vae", "x.safetensors")
    with pytest.raises(ValueError, match="lies outside"):
        host.find_file("vae", "../diffusion_models/b.gguf")


def test_links_back_to_a_folder_above_end(tmp_path):
    inner = tmp_path / "vae/inner"
    inner.mkdir(parents=True)
    (inner / "v.safetensors").touch()
    for name in ("back", "again"):
        (inner / name).symlink_to(tmp_path / "vae")
    (tmp_path / "vae/other").symlink_to(inner)
    names = StandaloneHost(models=tmp_path, device="cpu").list_files("vae")
    assert names == ["inner/v.safetensors", "other/v.safetensors"]


def test_inside():
    assert inside(Path("/a/b"), "c\\d.txt") == Path("/a/b/c/d.txt")
    for name in ("../x", "/etc/passwd", "c/../../x"):
        with pytest.raises(ValueError, match="lies outside"):
            inside(Path("/a/b"), name)


def test_models_move_and_runs_stop():
    host, moves = StandaloneHost(device="cpu"), []
    managed = host.manage(torch.nn.Linear(2, 2), place=moves.append)
    assert managed.acquire() == torch.device("cpu")
    managed.release()
    assert moves == [torch.device("cpu")] * 2
    host.check_cancelled()
    host.cancel.set()
    with pytest.raises(CancelledError):
        host.check_cancelled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no CUDA GPU"):
        StandaloneHost(device="cuda")


def test_a_gpu_of_a_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert StandaloneHost(device="cuda").device() == torch.device("cuda") and not current
    assert [StandaloneHost(device="cuda:1").device()] == current == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="'cuda:2' was asked for, but torch sees 2 GPUs"):
        StandaloneHost(device="cuda:2")
    assert len(current) == 1


def test_copies_of_the_pack_are_told_by_their_files(tmp_path):
    def pack(name, files=OWN_FILES):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        return tmp_path / name

    here, renamed, original = pack("aligned"), pack("my fork of wan"), pack("ComfyUI-WanVideoWrapper")
    pack("another-pack", OWN_FILES[:2])
    pack("comfyui-wanvideowrapper.disabled")
    (tmp_path / "example_node.py.example").touch()
    assert copies_in(tmp_path, here) == sorted([original, renamed])
    assert copies_in(tmp_path / "gone", here) == []


@pytest.fixture
def folder_paths(tmp_path, monkeypatch):
    """ComfyUI's module, as far as a host uses it, where the user's extra_model_paths.yaml has named a folder."""
    module = types.ModuleType("folder_paths")
    known = {kind: ([str(tmp_path / kind)], {".safetensors"}) for kind in ("diffusion_models", "vae", "text_encoders")}
    known["wav2vec2"] = (["/mnt/share/wav2vec2"], set())

    def add(kind, folder, is_default=False):
        folders = known.setdefault(kind, ([], set()))[0]
        if folder not in folders:
            folders.append(folder)

    module.models_dir, module.folder_names_and_paths, module.add_model_folder_path = str(tmp_path), known, add
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return module


def test_comfyui_gets_the_folders_of_the_pack_after_those_of_the_user(folder_paths, tmp_path):
    ComfyHost()
    known = folder_paths.folder_names_and_paths
    assert known["wav2vec2"] == (
        ["/mnt/share/wav2vec2", str(tmp_path / "wav2vec2"), str(DEMO_MODELS / "wav2vec2")],
        set(MODEL_SUFFIXES),
    )
    assert known["vae"][0] == [str(tmp_path / "vae"), str(DEMO_MODELS / "vae")]
    assert known["unet_gguf"] == ([str(tmp_path / "diffusion_models")], {".gguf"})
    assert set(KINDS) <= set(known)


def test_comfyui_knows_the_folders_before_it_lists_any_node(tmp_path):
    """Its own nodes come first, and all share what was listed first."""
    code = f"""
import sys, types
paths = types.ModuleType("folder_paths")
paths.models_dir = {str(tmp_path)!r}
paths.folder_names_and_paths = known = {{
    kind: ([], set()) for kind in ("diffusion_models", "vae", "text_encoders", "clip_vision", "loras", "wav2vec2")
}}
paths.add_model_folder_path = lambda kind, folder: known.setdefault(kind, ([], set()))[0].append(folder)
paths.get_folder_paths = lambda kind: []
sys.modules.update({{name: types.ModuleType(name) for name in ("comfy", "comfy.model_management")}}, folder_paths=paths)
import wanvideo_wrapper
assert {str(DEMO_MODELS / "vae")!r} in known["vae"][0], known
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
