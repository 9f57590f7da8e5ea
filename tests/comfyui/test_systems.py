"""The saved graphs of systems run to their videos in a real ComfyUI server, detectors replaced by fixed answers."""

import pytest
from comfy_server import SYSTEM_NODES, missing, serving
from posted_graphs import api_prompt
from system_graphs import Files, all_cases, assert_made, fixed_name

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
CASES = all_cases()


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with serving(tmp_path_factory.mktemp("systems"), SYSTEM_NODES) as running:
        yield running


@pytest.mark.parametrize("name", CASES)
def test_graph_runs_to_its_videos(name, systems, clip):
    case = CASES[name]
    if not case.path.is_file():
        pytest.skip(f"no {case.path} (set WANVIDEO_GRAPHS)")
    # The folders stay: ComfyUI looks at the time of each that it has listed.
    for file in [path for path in (systems.base / "models").rglob("*") if not path.is_dir()]:
        file.unlink()
    case.fill(Files(systems.base, clip))
    prompt, workflow = api_prompt(case.path, systems.base, case.edits, case.bypassed, case.muted, case.nodes)
    if any(node["class_type"] == "CLIPLoader" for node in prompt.values()):
        pytest.skip("ComfyUI's own loader of text encoders takes none but the published sizes")
    for node in prompt.values():
        if node["class_type"] in case.nodes:
            node["class_type"] = fixed_name(name, node["class_type"])
    systems.forget()
    made = systems.run(prompt, workflow)
    assert_made(case, [path for path in made if path.suffix == ".mp4"])
