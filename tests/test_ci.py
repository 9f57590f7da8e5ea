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
    assert {"make gpu-test", "make gpu-memcheck", "make gpu-trend"} <= set(commands(gpu))
    assert "pytest -m cuda" in (ROOT / "Makefile").read_text("utf-8")


STEP_KEYS = {"name", "id", "if", "uses", "run", "with", "env", "working-directory", "shell", "continue-on-error"}
JOB_KEYS = {"name", "needs", "if", "strategy", "runs-on", "timeout-minutes", "env", "steps", "environment"}
JOB_KEYS |= {"permissions"}
CONTEXT = re.compile(r"\$\{\{ (?:matrix|vars|env|secrets|github)\.[\w.]+ \}\}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_whole(path):
    """What makes a workflow fail before its first step; actionlint, which CI runs, knows more."""
    workflow = yaml.safe_load(path.read_text("utf-8"))
    # YAML 1.1 reads the key "on" as true.
    assert workflow["name"] == path.stem and workflow[True] and workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert set(job) <= JOB_KEYS and job["timeout-minutes"] <= 360, name
        needs = job.get("needs", [])
        assert ({needs} if isinstance(needs, str) else set(needs)) <= set(workflow["jobs"])
        matrix = set(job.get("strategy", {}).get("matrix", {}))
        assert set(re.findall(r"matrix\.(\w+)", str(job))) <= matrix, name
        for step in job["steps"]:
            assert set(step) <= STEP_KEYS and ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step.get("uses", "a/b@c")), step
            text = str(step)
            assert text.count("${{") == len(CONTEXT.findall(text)), step


def test_only_the_release_has_rights_and_secrets():
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
        powerful = {name for name, job in jobs.items() if "permissions" in job or "secrets." in str(job)}
        assert powerful == ({"pypi", "comfy-registry"} if path.stem == "release" else set())


def test_coverage_is_printed():
    (path,) = [path for path in WORKFLOWS if path.stem == "test"]
    lines = commands(path)
    assert lines.index("python -m coverage run -m pytest -rs") < lines.index("python -m coverage report")


def test_actions_of_others_are_pinned():
    """A branch or a tag of theirs can change under a release, with its secrets at hand."""
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
            for action in (step["uses"] for step in job["steps"] if "uses" in step):
                wanted = r"actions/[\w-]+@v\d+" if action.startswith("actions/") else r".+@[0-9a-f]{40}"
                assert re.fullmatch(wanted, action), action


def test_no_later_step_reads_the_token():
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/checkout"):
                    assert step["with"]["persist-credentials"] is False
