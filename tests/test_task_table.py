"""The memory that the docs name for each task is what `wanvideo plan` says of its graph, at published sizes."""

import re
from pathlib import Path

import example_graphs
import pytest
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import load
from wanvideo_wrapper.headless.memory_plan import plan
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo import checkpoint
from wanvideo_wrapper.wanvideo.tensor_file import StoredTensor

CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
INDEX = Path(__file__).resolve().parents[1] / "docs/index.md"
ROW = re.compile(r"^\| \[.*?\]\(.*?\).*? \| (`[^|]+`) \| ([\d.]+) \| ([\d.]+) \| \d+ \|$", re.MULTILINE)
TABLE = {
    graph: tuple(map(float, numbers))
    for graphs, *numbers in ROW.findall(INDEX.read_text("utf-8"))
    for graph in re.findall(r"`(\w+)`", graphs)
}
FP8, Q8_0 = "F8_E4M3", "GGUF Q8_0"
# File of the graphs -> whose keys and shapes it has, and what its linear layers are stored as.
FILES = {
    example_graphs.T2V: ("wan21_t2v_14B", FP8),
    example_graphs.I2V: ("wan21_i2v_14B", FP8),
    example_graphs.A14B.format("HIGH"): ("wan22_i2v_A14B", FP8),
    example_graphs.A14B.format("LOW"): ("wan22_i2v_A14B", FP8),
    example_graphs.VACE: ("vace_module_only_14B", FP8),
    example_graphs.TALKING_I2V: ("wan21_i2v_14B", Q8_0),
    example_graphs.TALK.format("Single"): ("infinitetalk_module", Q8_0),
    example_graphs.TALK.format("Multi"): ("infinitetalk_module", Q8_0),
}


class Header:
    metadata = {}

    def __init__(self, path):
        self.path = path
        keys, form = FILES[path.name]
        self.tensors = {
            name: StoredTensor(shape=shape, format=form if len(shape) == 2 and "blocks." in name else "BF16")
            for name, shape in keys_of(keys).items()
        }


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "open_files", lambda path: (Header(path),))
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    before = get_host()
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


def test_every_task_with_a_transformer_is_in_the_table():
    graphs = {path.stem for path in example_graphs.FOLDER.glob("*.json")}
    assert set(TABLE) == graphs - {"demo_infinitetalk", "doctor"}


@pytest.mark.parametrize("graph", TABLE)
def test_the_table_is_what_the_plan_says(graph, host):
    lines = "\n".join(plan(load(example_graphs.FOLDER / f"{graph}.json", CLASSES), CLASSES, host))
    assert "81 frames of 832x480" in lines
    as_saved = re.findall(r"as saved, \d+ blocks swapped: ([\d.]+) GB", lines) or re.findall(r"peak: ([\d.]+)", lines)
    swapped = re.findall(r"all blocks swapped ([\d.]+) GB", lines)
    assert {TABLE[graph]} == {tuple(map(float, pair)) for pair in zip(as_saved, swapped, strict=True)}
