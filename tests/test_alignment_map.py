"""Every entry of the map in docs/alignment.md names a function and a test that exist, and every system is in it."""

import ast
import re
from pathlib import Path

import pytest
from contract import with_extension

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"`([\w/]+\.py): (\w+)`")
MAP = (ROOT / "docs" / "alignment.md").read_text()
ENTRIES = sorted(set(ENTRY.findall(MAP)))


@pytest.mark.parametrize(("path", "name"), ENTRIES)
def test_it_exists(path, name):
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_is_a_map():
    assert len(ENTRIES) > 25


@pytest.mark.parametrize("folder", with_extension())
def test_every_system_has_a_row_or_a_reason(folder):
    rows = any(path.startswith(f"{folder}/") for path, _ in ENTRIES)
    assert rows != bool(re.search(rf"^\|.*`{folder}`.*\|$", MAP, re.MULTILINE))
