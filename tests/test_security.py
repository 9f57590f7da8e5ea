"""Promises of SECURITY.md, watched by Python's audit events in a process of their own."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_host import imported, modules

ROOT = Path(__file__).resolve().parents[1]

# Audit hooks cannot be taken away again, so the run happens in another process, which prints what it saw.
WATCHED = """
import json, sys
from pathlib import Path
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless import cli, core_nodes, media, picture_file
import av, PIL.Image, safetensors.torch, torch, wave
PIL.Image.init()
arguments = json.loads(sys.argv[1])
seen, watching = [], [True]
PREFIXES = ("subprocess", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "pty.",
            "socket.", "pickle.", "open")

def hook(event, details):
    if watching[0] and event.startswith(PREFIXES):
        seen.append([event, str(details[0]) if details else "", str(details[1]) if len(details) > 1 else ""])

sys.addaudithook(hook)
status = cli.main(arguments)
watching[0] = False
print(json.dumps([status, seen]))
"""


def write_wav(path):
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 8000, dtype=np.int16).tobytes())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that reads a picture and a sound and writes a video: its folder, status and audit events."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "in" / "a.png")
    write_wav(folder / "in" / "a.wav")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "LoadAudio", "inputs": {"audio": "a.wav"}},
        "3": {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 5}},
        "4": {"class_type": "VHS_VideoCombine", "inputs": {"images": ["3", 0], "audio": ["2", 0], "frame_rate": 10}},
        "5": {"class_type": "SimpleMath+", "inputs": {"value": "2 ** 5"}},
        "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
    }
    (folder / "w.json").write_text(json.dumps(graph))
    arguments = ["run", "w.json", "--device", "cpu", "--input", "in", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(arguments)], cwd=folder, capture_output=True, text=True, check=True
    )
    status, seen = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    assert len(list((folder / "out").glob("*.mp4"))) == 1
    return folder, seen


def test_no_reader_unpickles_or_starts_a_program(watched):
    _, seen = watched
    assert any(event == "open" for event, *_ in seen)
    assert not [entry for entry in seen if not entry[0].startswith(("open", "socket."))]


def test_a_run_opens_no_connection(watched):
    assert not [entry for entry in watched[1] if entry[0].startswith("socket.") and entry[0] != "socket.gethostname"]


def test_a_run_reads_and_writes_in_its_folders_only(watched):
    folder, seen = watched
    allowed = (folder / "in", folder / "out", folder / "w.json")
    code = (Path(sys.prefix), Path(sys.base_prefix), ROOT, ROOT.resolve())
    opened = [(folder / name, mode) for event, name, mode in seen if event == "open" and not name.isdecimal()]
    written = [path for path, mode in opened if any(letter in mode for letter in "wax+")]
    # Output folders are tried for writing beside where they will be made.
    assert all(path.is_relative_to(folder) for path in written), written
    known = (*allowed, *code, *(Path(entry).resolve() for entry in sys.path if entry), Path("/proc"), Path("/sys"))
    strange = [path for path, _ in opened if not any(path.is_relative_to(place) for place in known)]
    assert not [path for path in strange if not path.is_relative_to(folder)], strange


# What a module may call that runs code or programs, or reads what could: each for a reason that SECURITY.md tells.
RUNS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|startfile|fork|exec\w+|spawn\w+|posix_spawn\w*)"
    r"|subprocess\.\w+|(torch|np|numpy|joblib|dill)\.load|(c?[pP]ickle|marshal|dill)\.(loads?|Unpickler)|runpy\.\w+"
)
ALLOWED = {
    "attention_backends/packages.py": {"subprocess.run"},
    "demo/train/record.py": {"subprocess.run"},
    "distributed/standing.py": {"subprocess.Popen", "torch.load"},
    "distributed/standing_rank.py": {"pickle.loads", "torch.load"},
}
NETWORK = {"aiohttp", "ftplib", "http", "huggingface_hub", "requests", "smtplib", "socket", "urllib", "webbrowser"}
# Downloads that SECURITY.md names; and this computer's name, for partial files.
REACHES = {
    "multitalk/nodes_audio.py": {"huggingface_hub"},
    "wanvideo/modules/hub.py": {"huggingface_hub"},
    "wanvideo/whole_file.py": {"socket"},
}


def calls(tree):
    """Names of what is called, imports under their own names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and RUNS.fullmatch(ast.unparse(node.func)):
            yield ast.unparse(node.func)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if RUNS.fullmatch(name))


def test_no_module_can_unpickle_or_start_a_program_but_those_that_are_named():
    """What a run of one graph cannot show: all that the package has."""
    assert found_in_modules(lambda path: calls(ast.parse(path.read_text(encoding="utf-8")))) == ALLOWED


def test_no_module_reaches_the_network_but_those_that_are_named():
    assert found_in_modules(lambda path: (name.split(".")[0] for name in imported(path)), NETWORK) == REACHES


def found_in_modules(look, wanted=None):
    """What is found in each module of the package that has any of it."""
    package = (path for path in modules() if path.relative_to(ROOT).parts[0] != "benchmarks")
    found = {path.relative_to(ROOT).as_posix(): set(look(path)) for path in package}
    found = {name: names if wanted is None else names & wanted for name, names in found.items()}
    return {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("name", ["../w.json", "/etc/hostname", "in/../../w.json"])
def test_no_input_lies_outside(name, tmp_path, capsys):
    from wanvideo_wrapper.headless.cli import main
    from wanvideo_wrapper.host import get_host, set_host

    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": name}},
             "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../x"}}}  # fmt: skip
    (tmp_path / "w.json").write_text(json.dumps(graph))
    before = get_host()
    try:
        folders = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
        status = main(["run", str(tmp_path / "w.json"), *folders])
    finally:
        set_host(before)
    assert status == 2 and capsys.readouterr().err.count("lies outside the input and output folders") == 2
