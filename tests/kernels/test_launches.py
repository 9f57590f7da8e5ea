"""Triton and other packages launch on the current device, wherever the tensors are: theirs is made the current one."""

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from wanvideo_wrapper.attention_backends import comfy, sol
from wanvideo_wrapper.quantized import int8

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


def test_other_packages_are_called_on_the_tensors_device(monkeypatch):
    """comfy-kitchen gets the stream of the tensors' device, and launches on the current one."""
    current, seen = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def noting(call):
        def noted(*arguments, **options):
            seen.append(len(current))
            return call(*arguments, **options)

        return noted

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(int8.comfy_kitchen, "int8_linear", noting(int8.comfy_kitchen.int8_linear))
    monkeypatch.setattr(sol.comfy_kitchen, "sol_attn", noting(lambda q, k, v: v.clone()))
    host = SimpleNamespace(attention=lambda: noting(lambda q, k, v: v.transpose(1, 2).flatten(2)))
    monkeypatch.setattr(comfy, "get_host", lambda: host)
    q = torch.randn(1, 8, 2, 128)
    int8.Int8MatmulLinear.quantize(torch.randn(16, 256), None)(q.flatten(2))
    sol.SolAttention()(q, q, q)
    comfy.ComfyAttention()(q, q, q)
    assert seen == [1, 1, 1] and not current
