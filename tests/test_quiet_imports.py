"""Models load with attention packages that are broken, and import none that works, in processes of their own."""

import ast
import os
import subprocess
import sys

import pytest
from import_path import import_path
from limits import PATIENCE
from test_host import ROOT, modules

LIBRARIES = ("diffusers", "transformers")
PACKAGES = {
    "flash_attn": "2.8.3",
    "flash_attn_3": "3.0.0",
    "flash_attn_interface": "3.0.0",
    "sageattention": "2.2.0",
    "sageattn3": "1.0.0",
    "xformers": "0.0.35",
}
SUBMODULES = {"flash_attn": "flash_attn_interface", "xformers": "ops"}
# What a module of these packages does when it is imported. A working one has every name that is asked of it.
RAISES = "raise AttributeError('module torch has no attribute _C_old')"
ABORTS = "import os; os.abort()"
WORKS = "def __getattr__(name):\n    if name.startswith('__'): raise AttributeError(name)\n    return print"
LOG = "import os; print('imported', __name__, file=open(os.environ['IMPORTED'], 'a'))\n"

PREPARE = """
import sys
from pathlib import Path
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.multitalk.wav2vec import load_wav2vec
from wanvideo_wrapper.quiet_imports import KERNELS, kernels_hidden
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.modules import clip, t5, vae
from wanvideo_wrapper.wanvideo.schedulers import methods
kernels = lambda: {name for name in sys.modules if name.split('.')[0] in KERNELS}
"""
EVERYTHING = """
folder, options = Path(sys.argv[1]), dict(dtype=torch.float32, host=StandaloneHost(device="cpu"))
for row in methods.METHODS.values():
    row.solver(torch.tensor([0.9, 0.0]), torch.tensor([900.0]), 0)
for name in ("vae", "text_encoder", "clip_vision", "wav2vec"):
    getattr(tiny, name)().save(folder / f"{name}.safetensors")
wan = vae.load_vae(folder / "vae.safetensors", **options)
assert wan.decode(wan.encode(torch.zeros(3, 5, 32, 32))).isfinite().all()
assert t5.load_text_encoder(folder / "text_encoder.safetensors", **options).encode(["a person"])[0].isfinite().all()
assert clip.load_clip_vision(folder / "clip_vision.safetensors", **options).encode(torch.zeros(1, 64, 64, 3)).numel()
load_wav2vec(folder / "wav2vec.safetensors", **options)
assert not kernels(), kernels()
"""
ANOTHER_PACK_CAME_FIRST = """
import diffusers.utils, flash_attn.flash_attn_interface
with kernels_hidden("diffusers"):
    pass
assert diffusers.utils.is_sageattention_available(), "nothing was loaded, so nothing is forgotten"
before = sys.modules["xformers"] = type(sys)("xformers")
vae._diffusers_wan()
from diffusers.models import attention_dispatch
assert attention_dispatch.flash_attn_func is flash_attn.flash_attn_func
assert attention_dispatch._CAN_USE_FLASH_ATTN
assert not attention_dispatch._CAN_USE_SAGE_ATTN and not diffusers.utils.is_sageattention_available()
assert sys.modules["xformers"] is before
assert kernels() == {"flash_attn", "flash_attn.flash_attn_interface", "xformers"}, kernels()
import sageattention
"""
# Runs behind EVERYTHING, which may have left an answer.
TRANSFORMERS_REMEMBERS_NOTHING = """
from transformers.utils import import_utils
torch.cuda.is_available = lambda: True
with kernels_hidden("transformers"):
    assert not import_utils.is_flash_attn_2_available()
assert import_utils.is_flash_attn_2_available()
"""


@pytest.fixture
def run(tmp_path):
    """Runs a program where each package is installed and does this on import -> the process, what it imported."""

    def run(program, on_import, *arguments):
        for name, version in PACKAGES.items():
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            project = name.replace("_", "-")
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
            (info / "top_level.txt").write_text(name)
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(LOG + on_import)
            (tmp_path / name / f"{SUBMODULES.get(name, 'part')}.py").write_text(LOG + on_import)
        imported = tmp_path / "imported"
        imported.touch()
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False,
            env={**os.environ, "PYTHONPATH": import_path(tmp_path), "IMPORTED": str(imported)}, cwd="/",
        )  # fmt: skip
        return done, imported.read_text()

    return run


@pytest.mark.slow
def test_every_model_loads_and_imports_no_kernels_that_transformers_can_use_later(run, tmp_path):
    """Packages that raise or work are not imported either: what one does would happen behind its line in the log."""
    done, imported = run(PREPARE + EVERYTHING + TRANSFORMERS_REMEMBERS_NOTHING, ABORTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert imported == ""


def test_without_it_diffusers_imports_them(run):
    done, imported = run("from diffusers import AutoencoderKLWan", RAISES)
    assert done.returncode == 1 and "_C_old" in done.stderr
    assert "imported" in imported


def test_what_another_pack_loaded_is_used_and_the_rest_can_be_imported_later(run):
    done, _ = run(PREPARE + ANOTHER_PACK_CAME_FIRST, WORKS)
    assert done.returncode == 0, done.stderr


def of_libraries(tree):
    """Imports of the two libraries in a syntax tree."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        yield from ((node, name.split(".")[0]) for name in names if name.split(".")[0] in LIBRARIES)


def test_the_pack_imports_them_in_no_other_way():
    files = [path for path in modules() if path.relative_to(ROOT).parts[0] != "benchmarks"]
    found, hidden = set(), set()
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {(path.name, node.lineno) for node, _ in of_libraries(tree)}
        for block in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
            opened = {ast.unparse(item.context_expr) for item in block.items}
            hidden |= {(path.name, n.lineno) for n, lib in of_libraries(block) if f"kernels_hidden('{lib}')" in opened}
    assert len(found) >= 9
    assert found == hidden
