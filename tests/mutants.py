"""Mutants of the core: does any test notice if a line of it is wrong?

    python tests/mutants.py [MODULE[:LINE] ...] [--jobs N] [--list]

Every mutant changes one place of a module: a comparison, a sign, a number, a condition, a statement or a keyword that
goes. It is compiled in a process of its own, which has the libraries loaded already, and runs the tests of the core
until one fails, those of its module first. Prints the survivors as `module:line  what was changed`, those that took
much longer than no mutant does, which may be endless loops, with "late:" before it, and last how many there were.
Those of EXPLAINED change nothing that a test of the core could see and are not run. Needs os.fork.
"""

import argparse
import ast
import contextlib
import copy
import importlib.machinery
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "wanvideo_wrapper"
MODULES = ("extension", "guidance", "windows", "sampling", "conditioning", "tokens", "modules.model", "modules.block")
TESTS = (
    "wanvideo/test_hooks.py", "wanvideo/test_conditioning.py", "wanvideo/test_guidance.py", "wanvideo/test_sampling.py",
    "wanvideo/test_sampling_start.py", "wanvideo/test_model.py", "wanvideo/test_windows.py",
    "wanvideo/test_checked_inputs.py", "wanvideo/test_run_changes.py", "wanvideo/test_tokens.py",
    "wanvideo/test_rope.py", "wanvideo/test_own_model.py", "wanvideo/test_own_blocks.py",
    "wanvideo/test_models_without_text.py", "wanvideo/test_stretches.py", "wanvideo/test_shard.py",
    "wanvideo/test_advice.py", "wanvideo/test_peak_memory.py", "wanvideo/test_attention_plan.py", "freeinit",
    "prompt_segments", "multitalk/test_multitalk.py", "cache_methods/test_runs.py",
    "wanvideo/test_extension_contract.py::test_pieces_of_the_tokens_equal_all_at_once",
    "wanvideo/test_extension_contract.py::test_layers_in_bfloat16_get_what_they_can_multiply",
)  # fmt: skip
# Keywords that stay: they forbid what nobody does, or name a device where these tests have only one.
KEPT = ("frozen", "kw_only", "strict", "device")
# (module, line of it, what was changed): why no test could notice.
EXPLAINED = {
    ("sampling", "latents = held.before(latents, 0)", "0 -> 1"): "given latents are the same before every step",
    ("conditioning", "first = column[0]", "0 -> 1"): "all of a column are equal, or refused",
}
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def raises(node):
    return any(isinstance(part, (ast.Raise, ast.JoinedStr)) for part in ast.walk(node))


def for_types(node):
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def changes(node):
    """(what, function that changes a copy of the node in place) for every mutant at this node."""
    if isinstance(node, ast.Compare):
        new = COMPARE[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {new.__name__}", lambda n: n.ops.__setitem__(0, new())
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not isinstance(node.left, ast.JoinedStr):
        new = ARITHMETIC[type(node.op)]
        yield f"{type(node.op).__name__} -> {new.__name__}", lambda n: setattr(n, "op", new())
    if isinstance(node, ast.BoolOp):
        new = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} -> {new.__name__}", lambda n: setattr(n, "op", new())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not goes", lambda n: setattr(n, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = (not node.value) if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} -> {value}", lambda n: setattr(n, "value", value)
    if isinstance(node, ast.Call) and node.keywords:
        for place, keyword in enumerate(node.keywords):
            if keyword.arg in KEPT:
                continue
            yield f"{keyword.arg}= goes", lambda n, place=place: n.keywords.pop(place)
    if isinstance(node, ast.IfExp) or (isinstance(node, ast.If) and not raises(node) and not for_types(node)):
        yield "condition -> not", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))


def mutants(source):
    """(line, what, function that makes the tree) of every mutant of a module."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    annotations = {id(part) for node in nodes for name in ("annotation", "returns") if getattr(node, name, None)
                   for part in ast.walk(getattr(node, name))}  # fmt: skip
    kept = {id(node.value) for node in nodes if isinstance(node, ast.keyword) and node.arg in KEPT}
    for place, node in enumerate(nodes):
        if id(node) in annotations | kept or isinstance(node, ast.JoinedStr):
            continue
        for what, change in changes(node):
            yield node.lineno, what, partial(altered, tree, place, change)
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            for index, statement in enumerate(statements if isinstance(statements, list) else ()):
                if is_text(statement) or raises(statement):
                    continue
                if isinstance(statement, (ast.Expr, ast.AugAssign, ast.For, ast.Continue)):
                    drop = lambda n, f=field, i=index: getattr(n, f).__setitem__(i, ast.Pass())  # noqa: E731
                    text = " ".join(ast.unparse(statement).split())[:50]
                    yield statement.lineno, f"'{text}' goes", partial(altered, tree, place, drop)


def altered(tree, place, change):
    made = copy.deepcopy(tree)
    change(list(ast.walk(made))[place])
    return ast.fix_missing_locations(made)


def asked_for(place):
    """(module, line, what, function that makes the tree) of every mutant of a place that is not explained."""
    name, _, only = place.partition(":")
    source = (ROOT / "wanvideo" / f"{name.replace('.', '/')}.py").read_text()
    lines = source.splitlines()
    for line, what, made in mutants(source):
        if only in ("", str(line)) and (name, lines[line - 1].strip(), what) not in EXPLAINED:
            yield name, line, what, made


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads the mutant in the place of the module's file."""

    tree: ast.Module

    def get_code(self, fullname):
        return compile(self.tree, self.path, "exec")


class Finder:
    def __init__(self, name, tree):
        self.name, self.tree = name, tree

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = Mutated(name, spec.origin)
        loader.tree = self.tree
        spec.loader = loader
        return spec


def started(name, made, seconds=0):
    """A child process that runs the tests with the mutant that is made (None: without one); 0 is its end if all pass.

    seconds: when SIGALRM ends it, 0 for never.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            if made is not None:
                sys.meta_path.insert(0, Finder(f"{PACKAGE}.wanvideo.{name}", made()))
            import pytest

            near = [test for test in TESTS if f"test_{name.rpartition('.')[2]}" in test]
            rounds = [near or TESTS[:1], [test for test in TESTS if test not in near]]
            quiet = ["-x", "-q", "-p", "no:cacheprovider"]
            failed = any(pytest.main([*quiet, *(f"{ROOT}/tests/{test}" for test in tests)]) for tests in rounds)
        os._exit(int(failed))
    return child


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    import torch
    import torch._dynamo.testing  # noqa: F401
    from diffusers import WanTransformer3DModel  # noqa: F401

    torch.set_num_threads(1)
    work = [mutant for place in options.modules for mutant in asked_for(place)]
    if options.list:
        sys.stdout.write("".join(f"{name}:{line}  {what}\n" for name, line, what, _ in work))
        return
    began = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(started("extension", None), 0)[1]):
        raise SystemExit("The tests of the core fail without a mutant, so they would tell nothing: mend them first.")
    seconds = 60 + int(3 * options.jobs * (time.monotonic() - began))
    left, late, running, waiting = 0, 0, {}, list(reversed(work))
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, line, what, made = waiting.pop()
            running[started(name, made, seconds)] = f"{name}:{line}  {what}\n"
        child, status = os.wait()
        told, code = running.pop(child), os.waitstatus_to_exitcode(status)
        left, late = left + (code == 0), late + (code == -signal.SIGALRM)
        if code in (0, -signal.SIGALRM):
            sys.stdout.write(told if code == 0 else f"late: {told}")
            sys.stdout.flush()
    sys.stdout.write(f"{len(work)} mutants, {left} survive, {late} took more than {seconds} s\n")


if __name__ == "__main__":
    main()
