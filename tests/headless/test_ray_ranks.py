"""`wanvideo run --gpus 2 --ray`: one video on a Ray cluster of two nodes, each with room for one rank."""

import os
import signal
import sys
import threading
import time
import types
from functools import partial

import launched
import pytest
import small_cluster
import torch
from import_path import import_path
from wanvideo_wrapper.distributed import ray_cluster, ray_ranks
from wanvideo_wrapper.distributed.ray_ranks import launch_on_ray
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.headless.frame_folder import FrameFolder
from wanvideo_wrapper.host.standalone import TerminalProgress

pytest.importorskip("ray", reason="needs the package ray")
if not sys.platform.startswith("linux"):
    pytest.skip("/proc is Linux's", allow_module_level=True)

from ray.cluster_utils import Cluster

WINDOW = small_cluster.SMALL["WanVideoImageToVideoMultiTalk.frame_window_size"]
FOLDER = "frames"


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    """An item of the environment by which the cluster's processes are known."""
    return "WANVIDEO_RAY_RANKS", str(tmp_path_factory.mktemp("mark"))


@pytest.fixture(scope="module")
def address(mark):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", import_path(small_cluster.ROOT / "tests"))
        patch.setenv(*mark)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def actors(mark):
    return partial(small_cluster.actors, "=".join(mark))


def launch(work, address, **options):
    return launch_on_ray(work, address=address, device="cpu", progress=TerminalProgress, **{"count": 2, **options})


def run(folder, *options, frames=small_cluster.FRAMES):
    """The demo's graph, small, whose frames go to a folder."""
    values = {
        **small_cluster.SMALL,
        "MultiTalkWav2VecEmbeds.num_frames": frames,
        "WanVideoImageToVideoMultiTalk.output_path": FOLDER,
    }
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    folders = ("--models", "demo/models", "--input", "demo/input", "--out", str(folder))
    return main(["run", "example_workflows/demo_infinitetalk.json", "--device", "cpu", *folders, *sets, *options])


def frames_in(folder):
    return FrameFolder(next((folder / FOLDER).iterdir()))


def when_a_window_is_there(folder, act):
    """Calls `act` from another thread; returns the list that gets its result."""
    done = []

    def wait():
        while len(list(folder.glob(f"{FOLDER}/*/frame_*.png"))) < WINDOW:
            time.sleep(0.01)
        done.append(act())

    threading.Thread(target=wait, daemon=True).start()
    return done


def test_two_hosts_make_what_one_process_makes(address, tmp_path):
    (difference,) = launch(partial(launched.differs, "multitalk"), address)
    assert float(difference) < 1e-5


def test_a_run_writes_shows_and_logs_here_what_one_process_does(address, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(small_cluster.ROOT)
    caplog.set_level("INFO", logger="wanvideo")
    assert run(tmp_path / "one") == 0
    alone, logged = capsys.readouterr().out, [r.message for r in caplog.records if r.message.startswith("Running")]
    caplog.clear()
    assert run(tmp_path / "two", "--gpus", "2", "--ray", address) == 0
    assert capsys.readouterr().out.splitlines()[-1] == alone.strip().replace("/one/", "/two/")
    assert logged and [r.message for r in caplog.records if r.message.startswith("Running")] == logged
    one, two = (frames_in(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == small_cluster.FRAMES
    for number in range(len(one)):
        # A value between two levels may be rounded to either.
        assert one[number].std() > 0.05 and (one[number] - two[number]).abs().max() < 1.1 / 255
    assert next((tmp_path / "two").glob("*.mp4"))


def test_a_dead_rank_is_one_sentence_and_finished_windows_stay(address, actors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(small_cluster.ROOT)
    killed = when_a_window_is_there(tmp_path, lambda: os.kill(actors()[0], signal.SIGKILL))
    assert run(tmp_path, "--gpus", "2", "--ray", address, frames=100) == 2
    assert killed and not actors()
    assert [line for line in capsys.readouterr().err.splitlines() if "died" in line][-1].startswith("Rank ")
    assert len(frames_in(tmp_path)) >= WINDOW


def test_a_stop_does_not_wait_for_the_end(address, actors, tmp_path, monkeypatch):
    monkeypatch.chdir(small_cluster.ROOT)

    stopped = when_a_window_is_there(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path, "--gpus", "2", "--ray", address, frames=100) == 130
    assert stopped and not actors()


def test_the_reason_of_the_first_that_fails_is_told(address, tmp_path):
    with pytest.raises(RuntimeError, match=r"^The file is of another kind; choose another\.$"):
        launch(partial(launched.fails, tmp_path), address)


def test_a_host_without_what_the_work_needs_is_named(address, tmp_path, monkeypatch):
    module = types.ModuleType("here_alone")
    exec("def work(rank): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "here_alone", module)
    why = r"^Rank . of 2 died \(on .*: ModuleNotFoundError: No module named 'here_alone'\);"
    with pytest.raises(RuntimeError, match=why):
        launch(module.work, address)


def test_the_start_is_bounded(address, tmp_path):
    import ray

    with pytest.raises(RuntimeError, match="Rank 0, 1 of 2 did not start within 2 seconds: .*reach each other"):
        launch(partial(launched.never_ends, tmp_path), address, start_seconds=1.6)
    ray.init(address=address, namespace="other", log_to_driver=False)
    holder = ray.remote(launched.Holder).options(name="holder", lifetime="detached", num_cpus=1).remote()
    ray.get(holder.here.remote())
    ray.shutdown()
    try:
        with pytest.raises(RuntimeError, match="has had no 2 CPU free within 1 seconds"):
            launch(partial(launched.never_ends, tmp_path), address, start_seconds=0.6)
    finally:
        ray.init(address=address, namespace="other", log_to_driver=False)
        ray.kill(ray.get_actor("holder"))
        ray.shutdown()


def test_a_host_that_joins_while_ranks_wait_for_a_place_may_have_them(address, monkeypatch):
    with ray_cluster.connected(address) as ray:
        nodes, known = ray.nodes, []

        def joined():
            known.append(nodes())
            return known[-1][:1] if len(known) == 1 else known[-1]

        monkeypatch.setattr(ray, "nodes", joined)
        hosts = [host for host, _ in ray_ranks._places(ray, "CPU", 2, 5.0)]
        assert len(hosts) == 2 and set(hosts) <= {node["NodeManagerAddress"] for node in known[0]}


def test_what_cannot_be_is_said_before_anything_starts(address, tmp_path):
    for options, why in (
        ({"count": 3}, "3 workers of 1 CPU each were asked for"),
        ({"device": "cuda"}, "2 workers of 1 GPU each were asked for"),
        ({"device": "cuda:1"}, "Ray chooses the GPUs of its cluster: give --device cuda or cpu, not cuda:1"),
    ):
        with pytest.raises(ValueError, match=why):
            launch_on_ray(
                partial(launched.adds, tmp_path), address=address, progress=TerminalProgress,
                **{"count": 2, "device": "cpu", **options},
            )  # fmt: skip
    assert not torch.distributed.is_initialized() and not list(tmp_path.iterdir())
