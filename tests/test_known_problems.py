"""docs/known_problems.md: every problem has a test, and every test that it names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"`(tests/[\w/]+\.py): (test_\w+)`")
ROWS = re.findall(r"^\| ([A-H]?\d+) \|(.*)$", (ROOT / "docs/known_problems.md").read_text("utf-8"), re.MULTILINE)


@cache
def in_file(path):
    return {node.name for node in ast.parse((ROOT / path).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("number", "row"), ROWS, ids=[number for number, _ in ROWS])
def test_the_tests_exist(number, row):
    entries = ENTRY.findall(row)
    # What is in code quotes and looks like a test is one.
    assert entries and len(entries) == row.count("`tests/")
    assert not [f"{path}: {name}" for path, name in entries if name not in in_file(path)]


# How many problems were found of each kind: LoRA, files, one bad part, refused late, graphs, media, ComfyUI, the core.
FOUND = {"A": 7, "B": 6, "C": 6, "D": 8, "E": 10, "F": 3, "G": 8, "H": 8}
REPORTED = 25


def test_no_number_is_left_out():
    numbers = [number for number, _ in ROWS]
    assert len(set(numbers)) == len(numbers)
    wanted = [str(n + 1) for n in range(REPORTED)]
    wanted += [f"{letter}{n + 1}" for letter, count in FOUND.items() for n in range(count)]
    assert not set(wanted) - set(numbers)


def test_numbers_are_in_order():
    keys = [(number.rstrip("0123456789"), int(number.lstrip("ABCDEFGH"))) for number, _ in ROWS]
    assert keys == sorted(keys)
