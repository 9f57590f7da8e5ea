"""The trend of speed: a slower run fails, a faster one becomes what later ones are compared with."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from wanvideo_wrapper.bench.report import Row, as_json

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "trend.py"


@pytest.fixture
def trend():
    spec = importlib.util.spec_from_file_location("trend", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path, own, floor, command=("bench", "step", "--json", "now.json")):
    rows = [Row("this project", {"ms a block": own}), Row("sum of the best primitives", {"ms a block": floor})]
    path.write_text(as_json(rows, command, torch.device("cpu")))
    return str(path)


def test_slower_by_more_than_5_percent_fails_whatever_the_clock(trend, tmp_path):
    best = str(tmp_path / "kept" / "best.json")
    assert trend.main([best, save(tmp_path / "now.json", 12.0, 10.0)]) == 0
    # The card is half as fast today; so is the floor.
    assert trend.main([best, save(tmp_path / "now.json", 25.0, 20.0)]) == 0
    assert trend.main([best, save(tmp_path / "now.json", 12.7, 10.0)]) == 1
    assert json.loads(Path(best).read_text())["rows"][0]["ms a block"] == 12.0


def test_small_losses_add_up_and_gains_are_kept(trend, tmp_path):
    best = str(tmp_path / "best.json")
    verdicts = [trend.main([best, save(tmp_path / "now.json", own, 10.0)]) for own in (12.0, 11.0, 11.4, 11.7)]
    assert verdicts == [0, 0, 0, 1]


def test_another_case_starts_anew_and_another_file_is_refused(trend, tmp_path):
    best = save(tmp_path / "best.json", 12.0, 10.0, ("bench", "step", "--compile", "--json", "best.json"))
    assert trend.main([best, save(tmp_path / "now.json", 20.0, 10.0)]) == 0
    (tmp_path / "now.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="make it anew"):
        trend.main([best, str(tmp_path / "now.json")])
