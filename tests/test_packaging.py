"""The files that pip and ComfyUI Manager read agree with each other."""

import ast
import re
import tomllib
from pathlib import Path

from test_host import modules

ROOT = Path(__file__).parents[1]
# ComfyUI has its own, and its users must not lose the builds they chose.
OF_COMFYUI = {"torch", "numpy"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_requirements_are_those_of_the_project():
    needed = [r for r in project()["project"]["dependencies"] if name_of(r) not in OF_COMFYUI]
    written = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(written) == sorted(needed)


def test_every_dependency_is_pinned():
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    meta = project()["project"]
    assert {name_of(r) for r in [*meta["dependencies"], *meta["optional-dependencies"]["test"]]} <= pinned


# Where the module has another name than its package.
MODULES = {"pillow": "PIL", "scikit-image": "skimage"}


def test_every_dependency_is_imported():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    needed = map(name_of, project()["project"]["dependencies"])
    assert not {MODULES.get(name, name.replace("-", "_")) for name in needed} - imported


def test_every_package_is_installed():
    """setup.py finds the folders that say they are packages: all with code do."""
    folders = {path.parent for path in modules() if path.name != "setup.py"} - {ROOT / "benchmarks"}
    assert len(folders) > 15 and all((folder / "__init__.py").is_file() for folder in folders)
    assert "find_packages(exclude=LEFT_OUT)" in (ROOT / "setup.py").read_text()
