"""Saved graphs in ComfyUI's real front end: no node of this pack is missing, and every widget shows what was saved.

Needs a browser beside what the server needs: the package `playwright` in COMFYUI_PYTHON, and Chromium (on PATH, or
Playwright's own). Screenshots go to WANVIDEO_SCREENSHOTS where that is set.
"""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import wanvideo_wrapper
from comfy_server import PYTHON, browser_is_missing
from saved_models import GRAPHS, ROOT

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SAVED = [*sorted((ROOT / "example_workflows").glob("*.json")), *sorted(GRAPHS.glob("*.json"))]
GROUPED = sorted((ROOT / "tests" / "data" / "group_nodes").glob("*.json"))
OURS = set(wanvideo_wrapper.NODE_CLASS_MAPPINGS)
DEMO = ROOT / "example_workflows" / "demo_infinitetalk.json"
# Where the demo's models lay on another machine; one is nowhere.
MOVED = {
    "tiny_wan_i2v.safetensors": "Wan\\tiny\\tiny_wan_i2v.safetensors",
    "tiny_umt5.safetensors": "elsewhere/tiny_umt5.safetensors",
    "tiny_wan_vae.safetensors": "elsewhere/gone.safetensors",
}


def nodes_of(graph):
    """All nodes, those inside subgraphs too: by place, type, and which of that type it is there.

    Newer versions give nodes numbers of their own where two subgraphs have the same.
    """
    places = {"": graph, **{entry["id"]: entry for entry in (graph.get("definitions") or {}).get("subgraphs", ())}}
    found, counts = {}, Counter()
    for place, part in places.items():
        for node in part["nodes"]:
            counts[place, node["type"]] += 1
            found[place, node["type"], counts[place, node["type"]]] = node
    return found


def moved():
    """The demo's graph as another machine saved it."""
    graph = json.loads(DEMO.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        values = node.get("widgets_values") or []
        node["widgets_values"] = [MOVED.get(value, value) if isinstance(value, str) else value for value in values]
    return graph


@pytest.fixture(scope="module")
def opened(server, tmp_path_factory):
    reason = browser_is_missing()
    if reason:
        pytest.skip(reason)
    pictures = Path(os.environ.get("WANVIDEO_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("grouped")
    for path in GROUPED:
        workflow = json.loads(path.read_text(encoding="utf-8"))["workflow"]
        (folder / path.name).write_text(json.dumps(workflow), encoding="utf-8")
    (folder / "moved.json").write_text(json.dumps(moved()), encoding="utf-8")
    script = Path(__file__).with_name("browser.py")
    command = [PYTHON, script, server.url, pictures, *SAVED, *sorted(folder.glob("*.json"))]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_graph_opens_as_saved(path, opened):
    saved = nodes_of(json.loads(path.read_text(encoding="utf-8")))
    shown, types = nodes_of(opened[path.name]["made"]), set(opened[path.name]["types"])
    # Newer versions make a copy of a subgraph for each of its uses.
    assert set(shown) >= set(saved)
    assert not set(opened[path.name]["red"]) & OURS
    # A subgraph shows widgets of nodes inside.
    subgraphs = {place for place, *_ in saved}
    checked = [key for key, node in saved.items() if node["type"] in OURS | subgraphs]
    assert checked
    for key in checked:
        node = saved[key]
        assert node["type"] in types or node["type"] in subgraphs
        was, now = (part.get("widgets_values") or [] for part in (node, shown[key]))
        # Behind the widgets, one text may have been saved that the node had shown; newer versions have more widgets.
        common = min(len(was), len(now))
        assert now[:common] == was[:common], node["type"]
        assert was[common:] == [] or [type(text) for text in was[common:]] == [str], node["type"]


def test_files_that_lie_elsewhere_are_shown_where_they_are(opened):
    made = [node.get("widgets_values") or [] for node in opened["moved.json"]["made"]["nodes"]]
    shown = {value for values in made for value in values if isinstance(value, str)}
    assert {"tiny_wan_i2v.safetensors", "tiny_umt5.safetensors", "elsewhere/gone.safetensors"} <= shown
    assert shown & set(MOVED.values()) == {"elsewhere/gone.safetensors"}
    assert not set(opened["moved.json"]["red"]) & OURS


@pytest.mark.parametrize("path", GROUPED, ids=lambda path: path.stem)
def test_group_nodes_give_the_prompt_that_is_kept(path, opened):
    """tests/headless/test_group_nodes.py compares with it. Versions of the front end differ where groups are odd."""
    kept, got = json.loads(path.read_text(encoding="utf-8")), opened[path.name]
    if got["version"] != kept["front_end"]:
        pytest.skip(f"the prompt is that of front end {kept['front_end']}, not of {got['version']}")
    plain = {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in got["output"].items()}
    assert plain == kept["prompt"]
