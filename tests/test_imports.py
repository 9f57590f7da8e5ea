"""Imports go one way, type-only ones included: no module imports one of a higher floor, and there is no circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter

from test_host import ROOT, modules

# From the ground up; a floor is a list of folders and files. Systems are folders of the registry, without their nodes.
FLOORS = (
    ("tensor_layout", "quiet_imports", "host"),
    ("kernels",),
    ("quantized", "attention_backends"),
    ("attention", "fp8_optimization"),
    ("wanvideo",),
    ("SYSTEMS", "cache_methods", "unbuilt"),
    ("registry",),
    ("distributed",),
    ("NODES", "doctor", "node_checks", "node_tools", "node_tips", "node_results", "linked_values", "saved_values"),
    ("__init__",),
    ("headless", "demo", "bench"),
    ("benchmarks", "wanvideo_command"),
)
FOLDERS = ast.literal_eval(
    (ROOT / "registry.py").read_text().split("FOLDERS = ")[1].split("\n)")[0] + "\n)"
)


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor(name):
    top, *rest = name.split(".")
    is_node = top.startswith("nodes") or (rest and rest[-1].startswith("nodes"))
    group = "NODES" if is_node else "SYSTEMS" if top in FOLDERS else top
    return next(number for number, groups in enumerate(FLOORS) if group in groups)


def imports(path, names):
    """Modules of this package that the file imports, wherever in it."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in names else ".".join(base)


def graph():
    paths = {dotted(path): path for path in modules() if path.name != "setup.py"}
    return {name: {target for target in imports(path, paths) if target in paths} for name, path in paths.items()}


def test_no_module_imports_from_a_higher_floor():
    upward = {(a, b) for a, targets in graph().items() for b in targets if floor(b) > floor(a)}
    assert not upward


def test_there_is_no_circle():
    edges = graph()
    assert len(edges) > 100
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        raise AssertionError(f"These modules import each other: {' -> '.join(error.args[1])}") from None
    assert set(order) == set(edges)


def words(path):
    """Names and strings of the code, without docstrings and comments."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_the_core_names_no_system():
    """But for schedulers, whose names are options of a widget, and for the nodes that an error advises."""
    systems = {*FOLDERS, "infinitetalk", "skyreels", "feta"} - {"experimental", "controlnet"}
    names = re.compile(rf"(?<![a-z])({'|'.join(systems)})(?![a-z])|infinitetalk|multitalk", re.IGNORECASE)
    files = [p for p in (ROOT / "wanvideo").rglob("*.py") if p.parent.name != "schedulers"]
    told = {(p.name, word) for p in files for word in words(p) if names.search(word)}
    assert not {(name, word) for name, word in told if "WanVideoImageToVideoMultiTalk" not in word}
