"""WanVideoMultiGPU: a sampler's run on two ranks that stay, started as ComfyUI would start them, over Gloo."""

import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from limits import PATIENCE
from talking import WINDOW, request, save
from tiny_runs import Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.distributed import launch, recipes, standing
from wanvideo_wrapper.distributed.host import RankHost
from wanvideo_wrapper.headless.frame_folder import FrameFolder
from wanvideo_wrapper.host import CancelledError, StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.sampling import sample

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several GPUs need Linux")


class Watched(StandaloneHost):
    """Notes what its progress bars show, and calls `at` with the number of updates."""

    def __init__(self, folder, at=lambda number: None):
        super().__init__(models=folder, outputs=folder / "output", device="cpu")
        self.shown, self.open, self.at = [], 0, at

    def progress(self, total, label=""):
        self.shown.append((total, label))
        return self

    def __enter__(self):
        self.open += 1
        return self

    def __exit__(self, *_):
        self.open -= 1

    def update(self, done, *, note="", preview=None):
        picture = None if preview is None else preview[:, preview.shape[1] // 2]
        self.shown.append((done, note.rsplit(", ", 1)[0], picture))
        self.at(len(self.shown))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Runs(tmp_path_factory.mktemp("models")) as runs:
        yield runs


@pytest.fixture(scope="module")
def ranks(runs):
    (ranks,) = N["WanVideoMultiGPU"]().setargs(2)
    yield ranks
    ranks.close()


def load(ranks, name="t2v.safetensors"):
    (model,) = N["WanVideoModelLoader"]().loadmodel(
        name, "fp32", "offload_device", "disabled", multi_gpu_args=ranks
    )
    return model


def pids(ranks):
    return [process.pid for process in ranks._team._processes]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine a killed process may take longer to be gone."""
    monkeypatch.setattr(standing, "END_SECONDS", PATIENCE)


def test_a_stop_does_not_wait_for_their_start(runs, ranks, monkeypatch):
    host, ends, end = Watched(runs.folder), [], standing._end
    host.cancel.set()
    set_host(host)
    monkeypatch.setattr(standing, "_end", lambda processes, folder: ends.append(processes) or end(processes, folder))
    monkeypatch.setattr(standing._Team, "order", lambda *_: pytest.fail("they have started"))
    with pytest.raises(CancelledError):
        N["WanVideoSampler"]().process(
            load(ranks), N["WanVideoEmptyEmbeds"]().process(9, 32, 32)[0], 5.0, 1, 1.0, 1, "euler", 0
        )
    assert [process.returncode for process in ends[0]] == [-signal.SIGKILL] * 2 and ranks._team is None


def test_the_node_makes_what_one_process_makes_and_keeps_the_model(runs, ranks):
    host = Watched(runs.folder)
    set_host(host)
    want = runs.sample()
    alone, host.shown = host.shown, []
    runs.model, one = load(ranks), runs.model
    assert {parameter.device.type for parameter in runs.model.transformer.parameters()} == {"meta"}
    made = runs.sample()
    assert want.std() > 0.1 and relative(made, want) < 1e-5
    assert [entry[:2] for entry in host.shown] == [entry[:2] for entry in alone] and host.open == 0
    pictures = [(entry[2], other[2]) for entry, other in zip(host.shown, alone, strict=True) if len(entry) == 3]
    assert len(pictures) == 4 and all(relative(a, b) < 1e-5 for a, b in pictures)
    before = pids(ranks)
    assert torch.equal(runs.sample(), made) and pids(ranks) == before
    runs.model = one


def test_one_that_died_while_idle_is_replaced(runs, ranks, monkeypatch):
    set_host(Watched(runs.folder))
    monkeypatch.setattr(runs, "model", load(ranks))
    want, before = runs.sample(), pids(ranks)
    os.kill(before[1], signal.SIGKILL)
    ranks._team._processes[1].wait(PATIENCE)
    assert torch.equal(runs.sample(), want)
    assert not set(pids(ranks)) & set(before) and not any(map(alive, before))


def test_two_graphs_in_turn_each_get_their_model(runs, ranks, monkeypatch):
    set_host(Watched(runs.folder))
    tiny.transformer(in_dim=16, seed=5).save(runs.folder / "diffusion_models/other.safetensors")
    models = [load(ranks), load(ranks, "other.safetensors")]
    made = []
    for model in (*models, *models):
        monkeypatch.setattr(runs, "model", model)
        made.append(runs.sample())
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
    assert relative(made[1], made[0]) > 0.01


def test_a_stop_does_not_wait_for_the_decoding(runs, ranks, tmp_path):
    """Behind the last step of a window, whose VAE decodes: the ranks do not listen then."""
    save(tmp_path)

    def stop(number):
        # A bar and two steps.
        if number == 3:
            host.cancel.set()

    host = Watched(tmp_path, stop)
    set_host(host)
    asked = request(tmp_path, total=2 * WINDOW - 5)
    before = () if ranks._team is None else pids(ranks)
    with pytest.raises(CancelledError):
        sample(replace(asked, model=replace(asked.model, elsewhere=ranks)), host)
    assert len(host.shown) == 3 and host.open == 0
    assert ranks._team is None and not any(map(alive, before))


def test_ranks_end_when_nobody_holds_them(runs):
    (ranks,) = N["WanVideoMultiGPU"]().setargs(2)
    ranks._team = standing._Team(ranks._places, Watched(runs.folder))
    before = pids(ranks)
    assert all(map(alive, before))
    del ranks
    gc.collect()
    assert not any(map(alive, before))


def test_a_dead_rank_is_one_sentence_and_finished_windows_stay(runs, ranks, tmp_path):
    """Two windows of a talking video, whose VAE loads itself in the ranks; the second rank dies in the second one."""
    save(tmp_path)
    asked = request(tmp_path, total=2 * WINDOW - 5, output_path=str(tmp_path / "alone"))
    sample(asked, StandaloneHost(device="cpu"))
    loop = replace(asked.image.loop, output_path=str(tmp_path / "shared"))
    image = replace(asked.image, loop=loop)
    asked = replace(asked, model=replace(asked.model, elsewhere=ranks), image=image)
    folder, before = tmp_path / "shared", []

    def at(number):
        if len(list(folder.glob("frame_*.png"))) >= WINDOW:
            before[:] = pids(ranks)
            os.kill(before[1], signal.SIGKILL)

    set_host(Watched(runs.folder))
    with pytest.raises(RuntimeError, match=r"^Rank 1 of 2 died \(SIGKILL\); the others were ended"):
        sample(asked, Watched(runs.folder, at))
    assert len(before) == 2 and not any(map(alive, before))
    for number in range(WINDOW):
        made, want = (255 * FrameFolder(place)[number] for place in (folder, tmp_path / "alone"))
        # A value between two levels may be rounded to either.
        assert want.std() > 5 and (made - want).abs().max() < 1.1 and (made - want).abs().mean() < 0.01


def test_a_rank_that_is_long_in_leaving_its_gpu_is_one_sentence(runs, monkeypatch):
    """Killed, it takes longer than anybody waits: its memory is given back first."""

    class Leaving(subprocess.Popen):
        def wait(self, timeout=None):
            raise subprocess.TimeoutExpired(self.args, timeout)

        def poll(self):
            return None

    (ranks,) = N["WanVideoMultiGPU"]().setargs(2)
    monkeypatch.setattr(standing.subprocess, "Popen", Leaving)
    monkeypatch.setattr(standing, "LAST_WORDS_SECONDS", 0.01)
    host = Watched(runs.folder)
    team = standing._Team(ranks._places, host)
    try:
        team._processes[1].kill()
        with pytest.raises(RuntimeError, match=r"^Rank 1 of 2 died \(its pipe was closed\); the others were ended"):
            team.follow(host)
    finally:
        team.end()


def test_a_rank_that_does_not_start_is_named(runs):
    (ranks,) = N["WanVideoMultiGPU"]().setargs(2)
    ranks._start_seconds = 0.0
    with pytest.raises(RuntimeError, match="Rank 0, 1 of 2 did not start within 0 seconds"):
        ranks.run("anything", Watched(runs.folder))


def test_a_model_that_cannot_go_is_refused_before_anything_starts(runs):
    (ranks,) = N["WanVideoMultiGPU"]().setargs(2)
    for odd, name in ((torch.nn.Linear(2, 2), "Linear"), (lambda: None, "lambda")):
        with pytest.raises(ValueError, match=rf"cannot go to the other GPUs \(.*{name}"):
            ranks.run({"odd": odd}, Watched(runs.folder))
    assert ranks._team is None


def test_models_that_are_gone_here_are_not_kept_there(monkeypatch):
    class Model(torch.nn.Module):
        pass

    first, second = Model(), Model()
    numbers = recipes._number(first), recipes._number(second)
    monkeypatch.setattr(recipes, "_loaded", dict.fromkeys(numbers))
    del first
    recipes.keep(recipes.living())
    assert list(recipes._loaded) == [numbers[1]] and recipes._number(second) == numbers[1]


def test_more_gpus_than_there_are_is_said_when_the_graph_is_queued(monkeypatch, runs):
    host = Watched(runs.folder)
    monkeypatch.setattr(host, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    set_host(host)
    for gpus, reason in ((2, "torch sees 1"), (1, "between 2 and 16")):
        with pytest.raises(ValueError, match=reason):
            N["WanVideoMultiGPU"].VALIDATE_INPUTS(gpus=gpus)


def test_a_rank_starts_no_ranks(runs):
    before = get_host()
    set_host(RankHost(device="cpu"))
    assert N["WanVideoMultiGPU"]().setargs(2) == (None,)
    set_host(before)
