"""The help pages in web/docs: one per node, and every widget they explain exists."""

import re
from pathlib import Path

import pytest
from wanvideo_wrapper import NODE_CLASS_MAPPINGS, WEB_DIRECTORY

PAGES = sorted((Path(__file__).resolve().parents[1] / WEB_DIRECTORY / "docs").glob("*.md"))


def test_every_node_has_a_page_and_no_other():
    assert {page.stem for page in PAGES} == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_explains_inputs_of_its_node(page):
    groups = NODE_CLASS_MAPPINGS[page.stem].INPUT_TYPES()
    inputs = {name for group in ("required", "optional") for name in groups.get(group, {})}
    explained = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert bool(explained) == bool(inputs)
    assert set(explained) <= inputs
    assert len(explained) == len(set(explained))
