"""The console command while the package is imported: Ctrl-C ends it with one line, as it does later."""

import subprocess
import sys
from pathlib import Path

import pytest
from limits import PATIENCE

COMMAND = Path(__file__).parents[2] / "wanvideo_command.py"
# The signal comes when this module is looked for: before the package's first line, then with more and more of it.
MOMENTS = ("wanvideo_wrapper", "wanvideo_wrapper.nodes", "torch")
CODE = """
import os, runpy, signal, sys
main = runpy.run_path({command!r})["main"]
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)
            sys.exit(7)
sys.meta_path.insert(0, Watch())
{before}
sys.exit(main())
"""
IGNORED = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
# A package that is imported at once, whose command tells whose Ctrl-C is when it runs.
STAND_IN = """
for name in ("wanvideo_wrapper", "wanvideo_wrapper.headless", "wanvideo_wrapper.headless.cli"):
    sys.modules[name] = type(sys)(name)
sys.modules[name].main = lambda: 3 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 4
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")


def start(moment, before=""):
    code = CODE.format(command=str(COMMAND), moment=moment, before=before)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_during_the_imports():
    for process in [start(moment) for moment in MOMENTS]:
        assert process.communicate(timeout=PATIENCE) == ("", "Cancelled.\n") and process.returncode == 130


def test_one_that_is_ignored_stays_so():
    process = start("wanvideo_wrapper", IGNORED)
    assert process.communicate(timeout=PATIENCE) == ("", "") and process.returncode == 7


def test_ctrl_c_is_the_commands_own_after_the_imports():
    """What it does then is in test_run_checks.py."""
    process = start("no such module", STAND_IN)
    assert process.communicate(timeout=PATIENCE) == ("", "") and process.returncode == 3
