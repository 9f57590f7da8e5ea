"""Every system on 2 and 4 ranks equals itself on one, in float32 on a CPU."""

import numpy as np
import pytest
import ranked_runs
from contract import ALL_CASES, with_extension
from PIL import Image
from several import Several
from talking import request, run, save
from wanvideo_wrapper.registry import FOLDERS


@pytest.fixture(scope="module")
def two():
    with Several(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four():
    with Several(4) as processes:
        yield processes


def same(answers):
    """Whether the first rank has what one process has, and all ranks have the same."""
    return answers[0][0] < 1e-5 and len({total for _, total in answers}) == 1


# Control blocks are half as wide as the model, so that they have two of its four heads here.
HALF_AS_MANY_HEADS = ("longvie2", "longvie2_history")


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (ranks, name)
        for name in ALL_CASES
        for ranks in ("two", "four")
        if (ranks, name) not in {("four", half) for half in HALF_AS_MANY_HEADS}
    ],
)
def test_a_system_is_the_same_on_several_ranks(request, ranks, name):
    answers = request.getfixturevalue(ranks).run("ranked", "case_difference", name)
    assert same(answers), f"{answers}: what a hook reads of all tokens comes through `on` and its shard"


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_sound_is_the_same_with_passes_that_all_ranks_run(request, ranks):
    for differences in request.getfixturevalue(ranks).run("ranked", "sound_differences"):
        assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_shares_may_be_unequal(request, ranks):
    """Six places a frame, five heads, eleven tokens behind the video."""
    for relative, lengths in request.getfixturevalue(ranks).run("ranked", "uneven_difference"):
        assert relative < 1e-5 and len(set(lengths)) > 1


@pytest.mark.parametrize("name", ["lynx_full", "one_to_all"])
def test_references_behind_references_that_a_system_reads_are_refused(two, name):
    said = two.run("ranked", "refusal_behind_others", name)
    assert all("Two systems append reference tokens" in sentence for sentence in said)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ranked_runs.save(folder)
    return folder


def test_every_system_is_in_one_of_the_tables():
    """By its extension, or as a run; the rest makes and reads prompts."""
    assert set(FOLDERS) - set(with_extension()) <= set(ranked_runs.RUNS)


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("name", ranked_runs.RUNS)
def test_a_run_is_the_same_on_several_ranks(request, files, ranks, name):
    assert same(request.getfixturevalue(ranks).run("ranked_runs", "difference", files, name))


def test_the_first_rank_shows_the_steps_and_previews_of_one_process(two, files):
    """With the host that `wanvideo run --gpus` gives to its ranks."""
    (shown, alone), (silent, _) = two.run("ranked_runs", "progress", files)
    assert not silent and [entry[:2] for entry in shown] == [entry[:2] for entry in alone]
    pictures = [(entry[2], other[2]) for entry, other in zip(shown, alone, strict=True) if other[2] is not None]
    assert len(pictures) == ranked_runs.STEPS
    for a, b in pictures:
        assert b.std() > 0.01 and (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("name", HALF_AS_MANY_HEADS)
def test_more_ranks_than_heads_are_refused(four, name):
    assert four.run("ranked", "refusal", name) == ["2 attention heads cannot be shared by 4 GPUs: use fewer."] * 4


@pytest.mark.parametrize("name", ["multitalk_two_speakers", "enhance_a_video"])
def test_a_compiled_block_holds_the_collectives(two, name):
    assert max(two.run("ranked", "compiled_difference", name)) < 1e-5


def test_what_is_sent_is_waited_for_when_it_is_read(two):
    """v is on its way while q is projected, and both while k is."""
    order = [*("projection", "send") * 3, *("wait",) * 3, "attention", "send", "wait", "projection"]
    assert two.run("ranked", "order_of_work") == [order] * 2


def test_rows_of_a_batch_share_the_forward(two):
    assert max(two.run("ranked", "batch_difference")) < 1e-5


def test_folded_speech_is_of_the_places_of_a_rank(two):
    for shared, here, all_places in two.run("ranked", "folded_difference"):
        assert shared < 1e-5 and (here, all_places) == ([2], [2, 4])


@pytest.mark.parametrize("name", ["sageattn_ultravico", "radial_sage_attention"])
def test_backends_that_know_the_grid_see_the_whole_video_in_order(two, name):
    for shared in two.run("ranked", "backend_difference", name):
        assert shared < 1e-5


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_passes_run_on_ranks_of_their_own(request, ranks):
    """Four steps, of which two have two passes: one block call a pass on one rank, half as many on several."""
    several = request.getfixturevalue(ranks)
    for difference, alone, here in several.run("ranked", "guidance_difference", (3.0, 1.0, 3.0, 1.0)):
        assert difference < 1e-5 and (alone, here) == (6, 4)


def test_a_step_cache_leaves_out_the_same_steps(two):
    for difference, alone, here in two.run("ranked", "guidance_difference", (3.0,) * 6, True):
        assert difference < 1e-5 and alone < 12 and here == alone / 2


def test_tiles_of_the_vae_are_shared_out_and_the_video_is_the_same(two, tmp_path):
    save(tmp_path)
    spreads, counts = zip(*two.run("ranked", "tiles", tmp_path), strict=True)
    assert spreads[0] == spreads[1] and min(spreads[0]) > 0.01 and counts == (4, 2)


def test_the_decoding_node_shares_tiles_out(two, tmp_path):
    save(tmp_path)
    assert two.run("ranked", "decoded", tmp_path) == [(True, [6, 4]), (True, [6, 2])]


def test_one_rank_writes_a_long_video_and_the_others_follow(two, tmp_path):
    save(tmp_path)
    run(request(tmp_path, output_path=str(tmp_path / "one"), total=17))
    assert two.run("ranked", "talking", tmp_path, tmp_path / "all").count(True) == 1
    pictures = [sorted((tmp_path / name).iterdir()) for name in ("one", "all")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] and len(pictures[0]) == 17
    for one, other in zip(*pictures, strict=True):
        a, b = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
        assert abs(a - b).max() <= 1


def test_another_sampler_goes_on_from_a_long_video(two, tmp_path):
    """Each rank decodes and encodes it for itself, so that each must have its frames."""
    save(tmp_path)
    assert same(two.run("ranked", "refined", tmp_path))
