"""attention_mode 'comfy' runs what a real ComfyUI runs. Needs what test_server.py needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import wanvideo_wrapper
from import_path import import_path

COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
ROOT = Path(wanvideo_wrapper.__file__).resolve().parent

SCRIPT = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(COMFYUI)!r}]
import launch
kept = launch.declare_torchvision()
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths, comfy.model_management, torch
from wanvideo_wrapper.attention import AttentionSpec, resolve, sdpa
from wanvideo_wrapper.host import get_host
assert get_host().name == "comfyui"
backend = resolve("comfy", AttentionSpec(device=torch.device("cpu"), heads=3, head_dim=64))
q, k, v = (torch.randn(2, 33, 3, 64) for _ in range(3))
before, got, want = k.clone(), backend(q, k, v), sdpa()(q, k, v)
assert got.shape == q.shape and got.is_contiguous() and torch.equal(before, k)
print(float((got - want).norm() / want.norm()))
"""


@pytest.mark.comfyui
@pytest.mark.slow
@pytest.mark.skipif(not (COMFYUI / "main.py").is_file(), reason=f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)")
def test_comfy_equals_sdpa(tmp_path):
    (tmp_path / "wanvideo_wrapper").symlink_to(ROOT)
    needed = subprocess.run([PYTHON, "-c", "import aiohttp, torchsde, kornia"], capture_output=True, check=False)
    if needed.returncode:
        pytest.skip(f"{PYTHON} lacks what ComfyUI needs; set COMFYUI_PYTHON")
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": import_path(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5
