"""What the README counts is what there is."""

import json
import re
from pathlib import Path

import wanvideo_wrapper
from wanvideo_wrapper import nodes_unbuilt

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_nodes_that_are_built_are_counted():
    original = json.loads((Path(__file__).parent / "data/node_interfaces.json").read_text())
    nodes = [node for name, node in wanvideo_wrapper.NODE_CLASS_MAPPINGS.items() if name in original]
    built = [node for node in nodes if node.__module__ != nodes_unbuilt.__name__]
    registered, counted = re.search(r"All (\d+) node types .*?, (\d+) of them\s+built", README, re.S).groups()
    assert (int(registered), int(counted)) == (len(nodes), len(built))


def test_pages_that_it_names_exist():
    pages = re.findall(r"`((?:docs|demo)/[\w/]+\.md|SECURITY\.md|CONTRIBUTING\.md)`", README)
    assert len(set(pages)) > 5 and all((Path(__file__).parents[1] / page).is_file() for page in pages)
