"""Every entry of the map in docs/alignment.md names a function and a test that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"`([\w/]+\.py): (\w+)`")
ENTRIES = sorted(set(ENTRY.findall((ROOT / "docs" / "alignment.md").read_text())))


@pytest.mark.parametrize(("path", "name"), ENTRIES)
def test_it_exists(path, name):
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_is_a_map():
    assert len(ENTRIES) > 25
