"""The files that pip and ComfyUI Manager read agree with each other."""

import re
import tomllib
from pathlib import Path

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


def test_every_package_is_installed():
    folders = {path.parent for path in ROOT.glob("**/__init__.py") if "tests" not in path.parts}
    folders = {path for path in folders if not {".venv", "build"} & set(path.relative_to(ROOT).parts)}
    names = {".".join(("wanvideo_wrapper", *path.relative_to(ROOT).parts)) for path in folders}
    assert set(project()["tool"]["setuptools"]["packages"]) == names
