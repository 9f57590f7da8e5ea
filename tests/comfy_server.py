"""A real ComfyUI server for tests, on the CPU unless COMFYUI_OPTIONS says otherwise ("" for its GPU).

Needs ComfyUI at COMFYUI_PATH (default ~/comfy/ComfyUI) and, in COMFYUI_PYTHON (default this interpreter), what ComfyUI
and this pack import. Nodes of other packs come from this pack's stand-ins.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from saved_models import ROOT

COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
OPTIONS = os.environ.get("COMFYUI_OPTIONS", "--cpu").split()
START_SECONDS, RUN_SECONDS = 300, 400

BROWSER = """
import shutil
from pathlib import Path
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    assert shutil.which("chromium") or shutil.which("google-chrome") or Path(p.chromium.executable_path).exists(), \
        "no Chromium"
"""

# A copy of the package of its own, with the server's folders. ComfyUI keeps its own nodes where names are the same.
STAND_IN_PACK = """
import sys
from pathlib import Path
sys.path.insert(0, {packages!r})
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.host import set_host
from wanvideo_wrapper.host import StandaloneHost
set_host(StandaloneHost(inputs=Path({base!r}) / "input", outputs=Path({base!r}) / "output", device="cpu"))
"""
# What the saved graphs of systems need besides.
SYSTEM_NODES = """
sys.path.append({tests!r})
from system_graphs import all_cases, fixed_name
for name, case in all_cases().items():
    sys.modules.update((module, make()) for module, make in case.modules.items())
    NODE_CLASS_MAPPINGS.update((fixed_name(name, node), kind) for node, kind in case.nodes.items())
"""


def missing():
    if not (COMFYUI / "main.py").is_file():
        return f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)"
    code = "import aiohttp, alembic, torchsde, kornia, comfyui_frontend_package, diffusers"
    probe = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    reason = (probe.stderr.strip().splitlines() or ["?"])[-1]
    return "" if probe.returncode == 0 else f"{PYTHON} lacks what ComfyUI needs ({reason}); set COMFYUI_PYTHON"


def browser_is_missing():
    """Why the front end cannot be opened; "" if it can."""
    probe = subprocess.run([PYTHON, "-c", BROWSER], capture_output=True, text=True, check=False)
    reason = (probe.stderr.strip().splitlines() or ["?"])[-1]
    return "" if probe.returncode == 0 else f"{PYTHON} cannot open a browser: {reason}"


class RefusedError(Exception):
    """The server did not take a prompt; carries its answer."""


class Server:
    def __init__(self, base, port):
        self.base, self.url = base, f"http://127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def forget(self):
        """Let the server drop its models and what nodes gave."""
        body = json.dumps({"unload_models": True, "free_memory": True}).encode()
        request = urllib.request.Request(f"{self.url}/free", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()

    def queue(self, prompt, workflow=None):
        """Post a prompt; returns its id. Raises RefusedError."""
        body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        request = urllib.request.Request(
            f"{self.url}/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from error

    def run(self, prompt, workflow=None):
        """Post a prompt and wait; returns the files that it wrote."""
        before = self._results()
        number = self.queue(prompt, workflow)
        deadline = time.time() + RUN_SECONDS
        while time.time() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                assert entry["status"]["status_str"] == "success", _why(entry["status"])
                return sorted(self._results() - before)
            time.sleep(0.5)
        pytest.fail(f"the prompt did not finish in {RUN_SECONDS} seconds")

    def _results(self):
        folders = (self.base / "output", self.base / "temp")
        return {path for folder in folders for ending in ("mp4", "png") for path in folder.rglob(f"*.{ending}")}


def _why(status):
    """What went wrong in a run, and in which node."""
    told = dict(status["messages"]).get("execution_error", status)
    return json.dumps({key: value for key, value in told.items() if not key.startswith("current_")})[-3000:]


@contextlib.contextmanager
def serving(base, more=""):
    """A server with this pack and the stand-ins of others; its folders lie below `base`. more: lines of their file."""
    for folder in ("custom_nodes", "input", "models", "output", "temp", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / "ComfyUI-WanVideoWrapper-Aligned").symlink_to(ROOT)
    (base / "custom_nodes" / "stand_ins").mkdir()
    (base / "packages").mkdir()
    (base / "packages" / "wanvideo_wrapper").symlink_to(ROOT)
    pack = (STAND_IN_PACK + more).format(packages=str(base / "packages"), base=str(base), tests=str(ROOT / "tests"))
    (base / "custom_nodes" / "stand_ins" / "__init__.py").write_text(pack)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # On a GPU ComfyUI chooses an allocator before torch is imported, which the launcher does.
    launcher = [Path(__file__).parent / "comfyui" / "launch.py", COMFYUI]
    start = launcher if "--cpu" in OPTIONS else [COMFYUI / "main.py"]
    command = [PYTHON, *start, *OPTIONS, "--listen", "127.0.0.1"]
    command += ["--port", port, "--disable-auto-launch", "--base-directory", base, "--preview-method", "auto"]
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
