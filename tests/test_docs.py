"""The site: every page is in its menu, and the tables of files say what `wanvideo models` says."""

import re
from pathlib import Path

import pytest
import yaml
from wanvideo_wrapper.headless.graph import Node, Prompt
from wanvideo_wrapper.headless.model_list import needed_models
from wanvideo_wrapper.headless.published_files import published
from wanvideo_wrapper.host import StandaloneHost

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)]+)\) \| `([^`]+)` \| ([\d.]+) \|$", re.MULTILINE)
FILES = [(page.stem, *row) for page in sorted(DOCS.rglob("*.md")) for row in ROW.findall(page.read_text("utf-8"))]
LOADERS = {
    "diffusion_models": "WanVideoModelLoader",
    "vae": "WanVideoVAELoader",
    "text_encoders": "LoadWanVideoT5TextEncoder",
    "clip_vision": "CLIPVisionLoader",
    "loras": "WanVideoLoraSelect",
    "wav2vec2": "Wav2VecModelLoader",
}


def pages(entry):
    if isinstance(entry, str):
        return {entry}
    return set().union(*(pages(part) for part in (entry.values() if isinstance(entry, dict) else entry)))


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert pages(menu) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize(("page", "name", "url", "folder", "size"), FILES)
def test_tables_of_files(page, name, url, folder, size, tmp_path):
    row = published(name)
    assert url == row.url(name) and float(size) == row.gigabytes
    graph = Prompt({"1": Node("1", LOADERS[folder], "", {"file": name})}, {})
    (needed,) = needed_models(graph, StandaloneHost(models=tmp_path, device="cpu"))
    assert needed.folder == folder


def test_tasks_name_their_files():
    assert {page for page, *_ in FILES} == {"text-to-video", "picture-to-video", "two-models", "infinitetalk", "vace"}


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^):#]+)\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_every_example_graph_is_named():
    text = "\n".join(path.read_text("utf-8") for path in DOCS.rglob("*.md"))
    graphs = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    assert graphs and [name for name in graphs if f"`{name}`" not in text] == []
