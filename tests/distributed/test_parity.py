"""Every system on 2 and 4 ranks equals itself on one, in float32 on a CPU."""

import numpy as np
import pytest
from contract import ALL_CASES
from PIL import Image
from several import Several
from talking import request, run, save


@pytest.fixture(scope="module", params=(2, 4), ids=("2 ranks", "4 ranks"))
def several(request):
    with Several(request.param) as processes:
        yield processes


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_system_is_the_same_on_several_ranks(several, name):
    answers = several.run("ranked", "difference", name)
    assert max(relative for relative, _ in answers) < 1e-5
    assert len({total for _, total in answers}) == 1


@pytest.mark.parametrize("name", ["multitalk_two_speakers", "enhance", "vace"])
def test_compiled_blocks_hold_the_collectives(several, name):
    if name not in ALL_CASES:
        name = next(case for case in ALL_CASES if case.startswith(name))
    assert max(several.run("ranked", "compiled_difference", name)) < 1e-5


def test_rows_of_a_batch_share_the_forward(several):
    assert max(several.run("ranked", "batch_difference")) < 1e-5


@pytest.mark.parametrize("name", ["sageattn_ultravico", "radial_sage_attention"])
def test_backends_that_know_the_grid_see_the_whole_video_in_order(several, name):
    for shared, plain in several.run("ranked", "backend_difference", name):
        assert shared < 1e-5
        assert name != "sageattn_ultravico" or plain >= 0


def test_passes_run_on_ranks_of_their_own(several):
    """Four steps, of which two have two passes: one block call a pass on one rank, half as many on several."""
    for difference, alone, here in several.run("ranked", "guidance_difference", (3.0, 1.0, 3.0, 1.0)):
        assert difference < 1e-5 and (alone, here) == (6, 4)


def test_a_step_cache_leaves_out_the_same_steps(several):
    for difference, alone, here in several.run("ranked", "guidance_difference", (3.0,) * 6, True):
        assert difference < 1e-5 and alone < 12 and here == alone / 2


def test_one_rank_writes_a_long_video_and_the_others_follow(several, tmp_path):
    save(tmp_path)
    run(request(tmp_path, output_path=str(tmp_path / "one"), total=30))
    assert several.run("ranked", "talking", tmp_path, tmp_path / "all").count(True) == 1
    pictures = [sorted((tmp_path / name).iterdir()) for name in ("one", "all")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] and len(pictures[0]) == 30
    for one, other in zip(*pictures, strict=True):
        a, b = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
        assert abs(a - b).max() <= 1
