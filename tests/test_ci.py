"""The CI workflows call what is there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MARKERS = re.compile(r'^    "(\w+): ', re.MULTILINE)


def commands(path):
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_jobs_asked_for_are_there():
    assert {path.stem for path in WORKFLOWS} == {"test", "comfyui", "gpu", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_targets_and_folders_exist(path):
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = "\n".join(commands(path))
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= targets
    assert all((ROOT / folder).exists() for folder in re.findall(r"pytest (tests\S*)", text))
    markers = set(MARKERS.findall((ROOT / "pyproject.toml").read_text("utf-8")))
    assert set(re.findall(r"pytest.* -m (\w+)", text)) <= markers


def test_cuda_runners_run_the_cuda_tests():
    (gpu,) = [path for path in WORKFLOWS if path.stem == "gpu"]
    assert "make gpu-test" in commands(gpu) and "make gpu-memcheck" in commands(gpu)
    assert "pytest -m cuda" in (ROOT / "Makefile").read_text("utf-8")
