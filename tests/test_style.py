"""Sizes at which code can be read, and one spelling of the field's words."""

import ast
import re

import pytest
from test_host import ROOT, modules

LONGEST_FILE, LONGEST_FUNCTION = 400, 70
BRITISH = re.compile(r"\b\w*(?:quantis|normalis|initialis|optimis)\w*", re.IGNORECASE)


@pytest.mark.parametrize("folder", sorted({path.relative_to(ROOT).parts[0] for path in modules()}))
def test_files_and_functions_are_short(folder):
    for path in modules():
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, (path, node.name)


def test_words_are_spelled_as_the_field_spells_them():
    found = {(path.name, word) for path in modules() for word in BRITISH.findall(path.read_text(encoding="utf-8"))}
    assert not found
