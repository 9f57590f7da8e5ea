"""`wanvideo bench` at a size that any CPU measures in seconds: what is shown, not how fast it was."""

import json
import math
import time

import pytest
import torch
from wanvideo_wrapper.bench import clock, report
from wanvideo_wrapper.bench.cli import KINDS
from wanvideo_wrapper.bench.random_model import Case, RandomFile, inputs_of, load
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.host.standalone import ModuleOnDevice
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs

TINY = ("--model", "tiny", "--size", "32x32x5", "--device", "cpu")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    for name in ("WARM_UP", "ROUNDS", "REPEATS"):
        monkeypatch.setattr(clock, name, 1)


def bench(tmp_path, kind, *options):
    path = tmp_path / "figures.json"
    assert main(["bench", kind, *TINY, "--json", str(path), *options]) == 0
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_every_kind_measures(kind, tmp_path, capsys):
    chosen = {"steps": "2", "quantization": "fp8_e4m3fn"}
    options = [part for name in KINDS[kind].reads if name in chosen for part in (f"--{name}", chosen[name])]
    rows = bench(tmp_path, kind, *options)
    for row in rows.values():
        values = [value for unit, value in row.items() if unit != "name"]
        assert values and all(math.isfinite(value) for value in values)
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows)


def test_attention_that_cannot_run_says_why(tmp_path, capsys):
    rows = bench(tmp_path, "attention")
    assert rows["sdpa"]["error"] < 0.01 and "NVIDIA GPU" in rows["cudnn_fp8"]["refused"]
    assert f"cudnn_fp8: not run, {rows['cudnn_fp8']['refused']}" in capsys.readouterr().out


def test_peers_are_of_the_same_case(tmp_path):
    rows = bench(tmp_path, "step")
    assert set(rows) == {"this project", "diffusers, bfloat16", "sum of the best primitives"}
    own = rows["this project"]
    assert own["times as long"] == 1 and own["s a forward"] == pytest.approx(own["ms a block"] * 4 / 1000)
    assert set(bench(tmp_path, "step", "--speakers", "2")) == {"this project", "sum of the best primitives"}


def test_what_the_first_step_costs_is_told_apart(tmp_path, monkeypatch):
    inner = ModuleOnDevice.acquire
    monkeypatch.setattr(ModuleOnDevice, "acquire", lambda self, working=0: (time.sleep(0.05), inner(self, working))[1])
    rows = {name: row["s"] for name, row in bench(tmp_path, "run", "--steps", "2", "--encoders").items()}
    moving, above = rows["of it, moving weights"], rows["of it, above a later step"]
    # Once for sampling; moves of encoders and VAE are not the model's.
    assert 0.05 <= moving < rows["until the first step is done"]
    assert moving + above + rows["a later step"] == pytest.approx(rows["until the first step is done"])
    encoding = sum(seconds for name, seconds in rows.items() if name.startswith("encoding"))
    assert encoding > 0.1 and rows["all"] > encoding + rows["until the first step is done"]


def test_swapped_blocks_give_the_same_numbers(tmp_path):
    assert bench(tmp_path, "swap")["4 blocks swapped"]["equal to the bit"] == 1


@pytest.mark.parametrize("speakers", [0, 1, 2])
def test_a_random_model_is_loaded_whole_and_answers(speakers):
    case = Case(model="tiny", size=(64, 32, 9), speakers=speakers)
    model = load(case, 2, StandaloneHost(device="cpu"), BlockSwapArgs(blocks_to_swap=1))
    assert len(model.transformer.blocks) == 2 and model.block_swap.blocks_to_swap == 1
    with torch.no_grad(), model.active() as transformer:
        result = transformer(inputs_of(case, torch.device("cpu")))
    assert result.shape == (1, 16, 3, 4, 8) and result.isfinite().all() and result.std() > 0


def test_random_weights_are_drawn_by_kind():
    file = RandomFile({"a.norm.weight": (400,), "a.weight": (300, 400)}, "x")
    assert file.read("a.norm.weight").float().mean() == pytest.approx(1, abs=0.01)
    assert file.read("a.weight").float().std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("step", "--size", "40x32x5"), "40x32 is no size of tiny: give multiples of 16"),
        (("step", "--size", "32x32x8"), "8 frames are no video of tiny: give 4n+1"),
        (("linear", "--attention", "sageattn", "--swap", "3"), "does not read --attention, --swap: leave it out"),
        (("step", "--speakers", "9"), "--speakers must be between 0 and 6"),
        (("step", "--json", "no folder/x.json"), "There is no folder"),
        (("run", "--steps", "1"), "--steps must be at least 2"),
        (("run", "--limit", "8"), "--limit must be above 0 and at most the 0 GiB of the GPU, not 8."),
        (("step", "--attention", "sageattn"), "sageattn"),
    ],
)
def test_what_cannot_be_measured_is_said(options, message, capsys):
    assert main(["bench", options[0], *TINY, *options[1:]]) != 0
    assert message in capsys.readouterr().err


def test_a_size_is_three_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "step", "--size", "832x480"])
    assert "give width, height and frames" in capsys.readouterr().err


def test_a_chart_without_its_library_is_refused_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "step", *TINY, "--plot", str(tmp_path / "x.png")]) != 0
    assert "pip install matplotlib" in capsys.readouterr().err


def test_calls_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = clock.in_turns(calls, lambda call: call() or 3.0, warm_up=1, rounds=2)
    assert order == ["a", "b", "a", "b", "a", "b"] and times == {"a": 3.0, "b": 3.0}
