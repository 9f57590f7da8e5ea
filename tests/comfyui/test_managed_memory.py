"""ComfyUI's own memory management, on a GPU that is only counted: who makes room for whom, and what the options do."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from comfy_server import COMFYUI, PYTHON, missing
from import_path import import_path
from saved_models import ROOT
from wanvideo_wrapper.demo import tiny

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
GIB = 2**30
# What ComfyUI keeps free besides what it is asked for: for inference, and for others.
INFERENCE, RESERVE = int(0.8 * GIB), 400 * 2**20
SIZE, WORKING, OTHER = 400_000_000, 300_000_000, 200_000_000


def told(folder, *options):
    (folder / "packages").mkdir()
    (folder / "packages" / "wanvideo_wrapper").symlink_to(ROOT)
    tiny.transformer(in_dim=16).save(folder / "models" / "tiny_t2v.safetensors")
    script = Path(__file__).with_name("managed_memory.py")
    command = [str(part) for part in (PYTHON, script, folder / "models", COMFYUI, *options)]
    environment = {**os.environ, "PYTHONPATH": import_path(folder / "packages")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    return told(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """With the options for little memory."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    return told(tmp_path_factory.mktemp("small"), "--lowvram", "--reserve-vram", "1.5")


def test_ours_make_room_only_where_it_is_short(plain):
    room, tight = plain["evictions"]["room"], plain["evictions"]["tight"]
    assert room["after"] == room["before"] == tight["before"] == [OTHER] * 2
    assert sum(tight["after"]) < sum(tight["before"])
    assert tight["free_at_arrival"] >= 1.1 * SIZE + max(INFERENCE + RESERVE, WORKING + RESERVE)


def test_others_make_ours_leave_and_they_come_back(plain):
    room, tight = plain["evictions"]["room"], plain["evictions"]["tight"]
    assert room["moves"] == ["cpu:0"] and tight["moves"] == ["cpu:0", "cpu"]
    assert tight["arrived"] == room["arrived"] == 600_000_000
    assert tight["again"] == ["cpu:0", "cpu"] and tight["listed"] == 0


def test_reserve_and_lowvram(plain, small):
    assert (plain["mode"], plain["reserved"]) == ("normal", RESERVE)
    assert (small["mode"], small["reserved"]) == ("low", int(1.5 * GIB))
    # What is reserved is wanted free as well, so that all others leave; ours come whole, as they swap by themselves.
    tight = small["evictions"]["tight"]
    assert tight["after"] == [0, 0] and tight["moves"][0] == "cpu:0"


def test_load_device_and_force_offload(plain):
    loaders = plain["loaders"]
    assert loaders["main_device"] and not loaders["offload_device"]
    assert loaders["force_offload False"] and not loaders["force_offload True"]


def test_only_what_does_not_wait_takes_room(plain):
    """WanVideoVRAMManagement with shares 0, 1/2 and 1: all, without one of two blocks, and hardly anything."""
    whole, half, least = plain["loaders"]["resident"]
    assert 0.45 < half / whole < 0.55 and 0 < least < whole / 10
