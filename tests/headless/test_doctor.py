"""`wanvideo doctor` lists every option of the widgets with a reason where it does not run."""

import json

import attention_stand_ins
import pytest
import torch
from wanvideo_wrapper.attention import ATTENTION_MODES
from wanvideo_wrapper.attention_backends import probe
from wanvideo_wrapper.headless import doctor
from wanvideo_wrapper.headless.cli import main
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
