"""Probes forked from one process that has torch: as much on their own as those that are started, without its import."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest


class Forked:
    """Runs a script in place of `packages.other_process`; its server ends with the context."""

    def __init__(self, script):
        self._script = str(script)

    def __enter__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()

    def __call__(self, asked, timeout_s):
        with tempfile.TemporaryDirectory() as folder:
            request = {"path": [p for p in sys.path if isinstance(p, str)], "script": self._script,
                       "asked": json.dumps(asked), "folder": folder}  # fmt: skip
            self._server.stdin.write(f"{json.dumps(request)}\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            said = [(Path(folder) / name).read_text(errors="replace") for name in ("out", "err")]
        return subprocess.CompletedProcess([], status, *said)


@pytest.fixture(scope="module")
def forked():
    """What is put in the place of `packages.other_process`: itself where processes cannot be forked."""
    from wanvideo_wrapper.attention_backends import packages

    if not hasattr(os, "fork"):
        yield packages.other_process
        return
    with Forked(packages.SCRIPT) as server:
        yield server


def probe(request):
    """Never returns: runs the script as a program, and ends as Python does."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{request['folder']}/{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.path[:], sys.argv = request["path"], [request["script"], request["asked"]]
    status = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def serve():
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            probe(json.loads(line))
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
