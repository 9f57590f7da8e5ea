"""Triton launches on the current device, wherever its tensors are: every launch makes theirs the current one."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels"
FILES = sorted(FOLDER.glob("*_triton.py"))


def functions(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def calls(node, kernels, helpers):
    """Lines where a kernel is launched, or a function that launches one without choosing the device is called."""
    for call in (child for child in ast.walk(node) if isinstance(child, ast.Call)):
        target = call.func
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id in kernels:
            yield call.lineno
        if isinstance(target, ast.Name) and target.id in helpers:
            yield call.lineno


def chosen(node):
    """Lines on which a device was made the current one."""
    for block in (child for child in ast.walk(node) if isinstance(child, ast.With)):
        if any("torch.cuda.device" in ast.unparse(item.context_expr) for item in block.items):
            yield from range(block.lineno, block.end_lineno + 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_launches_are_on_the_tensors_device(path):
    own = functions(ast.parse(path.read_text()))
    kernels = {node.name for node in own if any("jit" in ast.unparse(d) for d in node.decorator_list)}
    host = [node for node in own if node.name not in kernels]
    assert host or path.stem == "hadamard_triton"
    bare = set()
    for _ in host:
        bare |= {node.name for node in host if set(calls(node, kernels, bare)) - set(chosen(node))}
    # A helper is fine where its callers have chosen: else these would be in the set, too.
    helped = {name for node in host for name in bare if list(calls(node, set(), {name}))}
    assert bare <= helped
