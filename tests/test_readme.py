"""What the README counts is what there is."""

import json
import re
from pathlib import Path

import wanvideo_wrapper
from wanvideo_wrapper.wanvideo.schedulers import SCHEDULERS, available

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_nodes_are_counted():
    original = json.loads((Path(__file__).parent / "data/node_interfaces.json").read_text())
    (counted,) = re.search(r"All (\d+) node types of the original are built", README).groups()
    assert int(counted) == len(original) and set(original) <= set(wanvideo_wrapper.NODE_CLASS_MAPPINGS)


def test_the_schedulers_are_counted_and_listed():
    (counted,) = re.search(r"and all (\d+) of its schedulers", README).groups()
    assert int(counted) == len(SCHEDULERS) and set(available()) == set(SCHEDULERS)
    (row,) = re.findall(r"^\| schedulers \| (.*) \|$", README, re.MULTILINE)
    assert set(re.findall(r"[\w+]{3,}", row)) >= {name.removesuffix("/beta") for name in SCHEDULERS}


def test_pages_that_it_names_exist():
    pages = re.findall(r"`((?:docs|demo)/[\w/]+\.md|SECURITY\.md|CONTRIBUTING\.md)`", README)
    assert len(set(pages)) > 5 and all((Path(__file__).parents[1] / page).is_file() for page in pages)
