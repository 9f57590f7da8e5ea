"""`wanvideo doctor` lists every option of the widgets with a reason where it does not run."""

import json
import re

import attention_stand_ins
import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper import doctor, nodes_doctor
from wanvideo_wrapper.attention import ATTENTION_MODES
from wanvideo_wrapper.attention_backends import probe
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.quantization import QUANTIZATIONS


def report(capsys, *arguments):
    assert main(["doctor", "--device", "cpu", *arguments]) == 0
    return capsys.readouterr().out


def test_every_option_is_listed_once(capsys):
    found = json.loads(report(capsys, "--json"))
    assert "cpu" in found["machine"]
    listed = {(entry["widget"], entry["option"]): entry for entry in found["options"]}
    assert [name for widget, name in listed if widget == "quantization"] == list(QUANTIZATIONS)
    assert [name for widget, name in listed if widget == "attention_mode"] == list(ATTENTION_MODES)
    assert len(listed) == len(found["options"])
    for entry in found["options"]:
        assert entry["what"] and entry["runs"] == (entry["reason"] is None)
    assert listed["attention_mode", "sdpa"]["runs"] and listed["quantization", "fp8_e4m3fn"]["runs"]
    sage = listed["attention_mode", "sageattn"]
    assert "needs an NVIDIA GPU of compute capability 8.0" in sage["reason"] and "pip install" in sage["get"]


def test_the_table_says_why_not(capsys):
    lines = report(capsys).splitlines()
    at = next(i for i, line in enumerate(lines) if " sageattn_3_fp4 " in line)
    assert lines[at].strip().startswith("no") and "why not: it needs an NVIDIA GPU" in lines[at + 1]
    assert "to get it: a wheel of SageAttention 3" in lines[at + 2]
    assert any(line.strip().startswith("runs  sdpa") for line in lines)


def test_kernels_are_tried_where_it_is_asked_for(monkeypatch):
    attention_stand_ins.install(monkeypatch)
    attention_stand_ins.pretend(monkeypatch, (12, 0))
    tried = []
    monkeypatch.setattr(probe, "verdict", lambda kernel, spec, tokens: tried.append((kernel.name, tokens)) or "noise")
    found = {f.option: f for f in doctor.examine(torch.device("cpu"), 32760)}
    assert ("sageattn_3_fp4", 32760) in tried and found["sageattn_3_fp4"].reason == "noise"
    assert found["sdpa"].runs


@pytest.mark.cuda
def test_on_a_gpu(capsys):
    assert main(["doctor", "--device", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.cuda.get_device_name() in found["machine"]


@pytest.fixture
def on_cpu(tmp_path):
    before = get_host()
    set_host(StandaloneHost(models=tmp_path, outputs=tmp_path, device="cpu"))
    yield
    set_host(before)


def test_the_node_tries_what_runs(on_cpu, monkeypatch):
    chosen = ("disabled", "fp8_e4m3fn", "fp4_scaled", "sdpa", "sageattn")
    every = doctor.examine(torch.device("cpu"))
    monkeypatch.setattr(doctor, "examine", lambda device: [finding for finding in every if finding.option in chosen])
    made = NODES["WanVideoDoctor"]().examine(self_test=True)
    (report,) = made["result"]
    assert made["ui"] == {"text": [report]}
    table, tested = report.split("\n\nself-test\n")
    assert "why not: it needs an NVIDIA GPU" in table
    rows = dict(line.split(maxsplit=1) for line in tested.splitlines())
    assert list(rows) == ["disabled", "fp8_e4m3fn", "fp4_scaled", "sdpa"]
    said = re.compile(r"works, (\S+) from full precision, [\d.]+ s")
    errors = {name: float(said.fullmatch(row)[1]) for name, row in rows.items()}
    assert errors["disabled"] == 0 and errors["sdpa"] < 1e-5
    assert 1e-4 < errors["fp8_e4m3fn"] < errors["fp4_scaled"] < 0.5


def test_the_node_says_what_fails(on_cpu, monkeypatch):
    def broken(name, spec):
        if name == "sdpa":
            return lambda q, k, v: torch.full_like(q, torch.nan)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(nodes_doctor.attention, "resolve", broken)
    findings = [doctor.Finding(widget="attention_mode", option=name, what="") for name in ("sdpa", "comfy")]
    monkeypatch.setattr(nodes_doctor, "_quantization_runs", lambda device: None)
    nan, raised = nodes_doctor.self_tested(findings, torch.device("cpu"))
    assert nan.split(maxsplit=1)[1].startswith("FAILED: nan") and raised.endswith("FAILED: no kernel image")
