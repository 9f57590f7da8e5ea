"""A run that fails at its end: what was made is on disk, and the message says where and how to go on."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from wanvideo_wrapper.headless import cli, rescue
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.job import show
from wanvideo_wrapper.headless.media import Encoding, read_audio, write_video
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import CancelledError, StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo import whole_file
from wanvideo_wrapper.wanvideo.footage import MemoryFootage, write_frame
from wanvideo_wrapper.wanvideo.whole_file import partial_file, publish

FRAMES = torch.rand(5, 32, 48, 3)
SOUND = {"waveform": torch.rand(1, 2, 8000) - 0.5, "sample_rate": 16000}
LATENT = {"samples": torch.randn(1, 16, 2, 4, 6)}


class Sampler:
    """Makes everything that a failing node may take."""

    FUNCTION = "go"
    RETURN_TYPES = ("LATENT", "IMAGE", "AUDIO")
    MADE = (LATENT, FRAMES, SOUND)

    @classmethod
    def INPUT_TYPES(cls):
        return {"optional": {"model": ("WANVIDEOMODEL",)}}

    def go(self, model=None):
        return self.MADE


class Decode:
    FUNCTION = "go"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def go(self, samples):
        if samples.get("output_path"):
            return (torch.zeros(1, 64, 64, 3),)
        raise RuntimeError("The GPU has too little memory.")


class EmptyLatent:
    """Latents that no sampler made."""

    FUNCTION = "go"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def go(self):
        return (LATENT,)


CLASSES = {**NODES, "Sampler": Sampler, "Decode": Decode, "EmptyLatent": EmptyLatent}


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    set_host(host)
    yield host
    set_host(before)


def run(host, **nodes):
    made = {key: Node(id=key, type=kind, title="", inputs=dict(inputs)) for key, (kind, inputs) in nodes.items()}
    return Runner(Prompt(made, {}), CLASSES, host).run()


def combine(**more):
    return ("VHS_VideoCombine", {"images": Link("s", 1), "frame_rate": 16.0, "audio": Link("s", 2), **more})


def frames_in(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("frame_*.png"))])


def test_frames_of_a_video_that_cannot_be_written_are_rescued(host, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanvideo_wrapper.headless.video_file._encode", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(host, s=("Sampler", {}), out=combine())
    (note,) = caught.value.__notes__
    (folder,) = (tmp_path / "out").glob("rescued_*")
    assert f"5 frames before it are safe in {folder}" in note
    assert np.array_equal(frames_in(folder), (FRAMES * 255).round().byte().numpy())
    assert not list((tmp_path / "out").glob(".*"))
    # What the note says to do works.
    monkeypatch.undo()
    command = shlex.split(re.search(r"wanvideo (assemble .*)", note)[1])
    assert cli.main([*command, "--out", str(tmp_path / "again.mp4")]) == 0
    with av.open(str(tmp_path / "again.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
        assert sum(1 for _ in container.decode(video=0)) == 5
    heard = read_audio(tmp_path / "again.mp4")
    assert heard["waveform"].shape[1] == 2
    assert heard["waveform"].shape[2] / heard["sample_rate"] == pytest.approx(0.5, abs=0.05)
    assert cli.main([*command, "--out", str(tmp_path / "again.mp4")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_latents_are_rescued_in_the_form_of_comfyui(host, tmp_path):
    with pytest.raises(RuntimeError, match="too little memory") as caught:
        run(host, s=("Sampler", {}), d=("Decode", {"samples": Link("s", 0)}),
            out=("PreviewImage", {"images": Link("d", 0)}))  # fmt: skip
    (path,) = (tmp_path / "out").rglob("*.latent")
    assert str(path) in caught.value.__notes__[0]
    saved = load_file(path)
    assert torch.equal(saved["latent_tensor"], LATENT["samples"]) and "latent_format_version_0" in saved


class Stops(Decode):
    """A decoder that is cancelled in its midst."""

    def go(self, samples):
        get_host().cancel.set()
        get_host().check_cancelled()


@pytest.mark.parametrize("kind", ["Stops", "Decode"])
def test_a_cancelled_run_keeps_what_its_sampler_finished(kind, host, tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSES, "Stops", Stops)
    monkeypatch.setattr(Decode, "go", lambda self, samples: (host.cancel.set(), (FRAMES,))[1])
    if kind == "Stops":
        monkeypatch.setattr(Sampler, "MADE", (LATENT, None, None))
    with pytest.raises(CancelledError) as caught:
        run(host, s=("Sampler", {}), d=(kind, {"samples": Link("s", 0)}),
            out=("VHS_VideoCombine", {"images": Link("d", 0), "frame_rate": 25.0}))  # fmt: skip
    (folder,) = (tmp_path / "out").glob("rescued_*")
    assert str(folder) in caught.value.__notes__[0]
    if kind == "Stops":
        (path,) = folder.iterdir()
        assert torch.equal(load_file(path)["latent_tensor"], LATENT["samples"])
    else:
        assert np.array_equal(frames_in(folder), (FRAMES * 255).round().byte().numpy())


def test_a_cancelled_run_keeps_nothing_twice(host, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "MADE", (None, FRAMES, SOUND))
    monkeypatch.setitem(CLASSES, "Stops", Stops)
    with pytest.raises(CancelledError) as caught:
        run(host, s=("Sampler", {}), out=combine(), e=("EmptyLatent", {}), x=("PreviewAny", {"source": Link("y", 0)}),
            y=("Stops", {"samples": Link("e", 0)}))  # fmt: skip
    assert not hasattr(caught.value, "__notes__") and not list((tmp_path / "out").glob("rescued_*"))


def test_frames_of_a_loop_are_rescued_and_not_its_last_latents(tmp_path):
    looped = {**LATENT, "video": FRAMES * 2 - 1, "output_path": ""}
    folder = tmp_path / "it's here"
    note = rescue.rescue({"samples": looped, "denoised_samples": dict(looped)}, folder)
    (inner,) = folder.iterdir()
    assert np.abs(frames_in(inner).astype(int) - (FRAMES * 255).round().int().numpy()).max() <= 1
    assert not list(inner.glob("*.latent"))
    # A folder with a quote in its name survives the shell.
    assert shlex.split(note.partition("wanvideo ")[2])[:2] == ["assemble", str(inner)]


def test_another_folder_is_taken_when_the_first_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    (tmp_path / "out").write_text("a file")
    note = rescue.rescue({"images": FRAMES}, tmp_path / "out")
    (folder,) = (tmp_path / "temp").iterdir()
    assert str(folder) in note and len(frames_in(folder)) == 5


def test_memory_footage_never_writes_into_another_runs_frames(tmp_path, monkeypatch):
    footage = MemoryFootage(3)
    footage.add(FRAMES[:3])
    folders = {footage.rescue(tmp_path / "out" / "talk") for _ in range(2)}
    assert len(folders) == 2 and all(len(frames_in(folder)) == 3 for folder in folders)
    monkeypatch.setattr("wanvideo_wrapper.wanvideo.footage.tempfile.gettempdir", lambda: str(tmp_path / "temp"))
    (tmp_path / "file").write_text("")
    elsewhere = footage.rescue(tmp_path / "file" / "talk")
    assert elsewhere == tmp_path / "temp" / "talk" and len(frames_in(elsewhere)) == 3


def test_a_frame_that_cannot_be_written_is_one_sentence(tmp_path):
    frame = torch.randint(256, (4, 4, 3), dtype=torch.uint8)
    with pytest.raises(OSError, match=r"Frame 7 could not be written: the folder .*absent is gone, and the frames"):
        write_frame(tmp_path / "absent", 7, frame)
    (tmp_path / "frame_00007.png").mkdir()
    with pytest.raises(OSError, match=r"Frame 7 could not be written to .*; the frames before it are there"):
        write_frame(tmp_path, 7, frame)
    assert not list(tmp_path.glob("*.part"))


def test_a_result_that_the_terminal_cannot_show_is_shown_in_escapes(monkeypatch):
    """The work is done by then: an exit status of 2 would tell of a failure."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    show(["视频/é.mp4", "\ud800"])
    sys.stdout.flush()
    assert raw.getvalue().decode("cp1252").splitlines() == [r"\u89c6\u9891/é.mp4", r"\ud800"]


def test_an_output_folder_that_vanishes_is_made_again(host, tmp_path, monkeypatch):
    class Vanishing(Sampler):
        def go(self, model=None):
            shutil.rmtree(tmp_path / "out")
            return self.MADE

    monkeypatch.setitem(CLASSES, "Vanishing", Vanishing)
    (tmp_path / "out").mkdir()
    run(host, s=("Vanishing", {}), out=combine())
    (path,) = (tmp_path / "out").iterdir()
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


@pytest.mark.parametrize("kind", ["VHS_VideoCombine", "PreviewImage"])
def test_a_run_with_output_path_ends_with_its_video(kind, host, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "out" / "talk"
    folder.mkdir(parents=True)
    for index, image in enumerate((FRAMES * 255).byte()):
        write_frame(folder, index, image)
    monkeypatch.setattr(Sampler, "MADE", ({**LATENT, "output_path": str(folder)}, FRAMES, SOUND))
    inputs = {"images": Link("d", 0)}
    with caplog.at_level("INFO", "wanvideo"):
        run(host, s=("Sampler", {}), d=("Decode", {"samples": Link("s", 0)}), out=(kind, inputs))
    assert f"The frames are in {folder}." in caplog.text
    if kind == "PreviewImage":
        assert f"gets one black frame as 'images': the frames are in {folder}" in caplog.text
        return
    with av.open(str(next((tmp_path / "out").glob("*.mp4")))) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 5 and shown[0].shape == (32, 48, 3)


def test_processes_in_one_folder_take_different_numbers(tmp_path):
    def write(index):
        with partial_file(tmp_path, "v") as partial:
            partial.write_text(str(index))
            taken = (tmp_path / f"v_{n}" for n in range(1000))
            publish(partial, lambda: next(taken))

    threads = [threading.Thread(target=write, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(path.read_text()) for path in tmp_path.iterdir()) == list(range(20))


def test_what_a_killed_process_left_is_swept(tmp_path):
    script = (
        "import os, pathlib, runpy, sys\n"
        "with runpy.run_path(sys.argv[2])['partial_file'](pathlib.Path(sys.argv[1]), 'v.mp4') as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    # By path: the package would load torch first.
    subprocess.run([sys.executable, "-c", script, str(tmp_path), whole_file.__file__], check=False)
    (stray,) = tmp_path.iterdir()
    own = stray.with_name(stray.name.replace(stray.name.split(".")[-4], str(os.getpid())))
    own.write_text("being written")
    write_video(tmp_path / "v.mp4", FRAMES, Encoding(fps=25))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own.name, "v.mp4"])


STOPS = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("name", STOPS)
def test_sigterm_is_ctrl_c(name, tmp_path, monkeypatch, capsys):
    number = getattr(signal, name)

    def stopped(self):
        os.kill(os.getpid(), number)
        self._host.check_cancelled()

    workflow = tmp_path / "w.json"
    workflow.write_text('{"1": {"class_type": "PreviewAny", "inputs": {"source": "x"}}}')
    monkeypatch.setattr(Runner, "run", stopped)
    # Tests that nohup starts have it ignored.
    before, handler = get_host(), signal.signal(number, signal.SIG_DFL)
    try:
        assert cli.main(["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]) == 130
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, handler)
        set_host(before)
    assert capsys.readouterr().err.endswith("Stopping at the next step; once more stops at once.\nCancelled.\n")


@pytest.mark.skipif("SIGHUP" not in STOPS, reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    """As nohup starts it."""
    workflow = tmp_path / "w.json"
    workflow.write_text('{"1": {"class_type": "PreviewAny", "inputs": {"source": "x"}}}')
    monkeypatch.setattr(Runner, "run", lambda self: os.kill(os.getpid(), signal.SIGHUP) or [])
    before, handler = get_host(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)
        set_host(before)


def test_a_terminal_that_is_gone_changes_no_status(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self._host.check_cancelled()

    workflow = tmp_path / "w.json"
    workflow.write_text('{"1": {"class_type": "PreviewAny", "inputs": {"source": "x"}}}')
    monkeypatch.setattr(Runner, "run", stopped)
    monkeypatch.setattr(sys, "stderr", Gone())
    before = get_host()
    try:
        assert cli.main(["run", str(workflow), "--device", "cpu", "--out", str(tmp_path)]) == 130
    finally:
        set_host(before)


def test_a_relative_output_folder_is_not_entered_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = get_host()
    host = StandaloneHost(outputs=Path("res"), device="cpu")
    set_host(host)
    try:
        run(host, s=("Sampler", {}), out=combine(filename_prefix="sub/clip"))
    finally:
        set_host(before)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.mp4")] == [Path("res/sub/clip_00001.mp4")]
