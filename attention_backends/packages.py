"""Optional packages: whether they import, found out where a crash cannot reach this process.

A broken wheel fails in every way there is: ImportError, an OSError from a DLL, a RuntimeError of its own, a crash. So a
package that is not imported yet is first imported in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .probe_kernel import REASON

Export = tuple[str, str]

SCRIPT = Path(__file__).with_name("probe_kernel.py")
TIMEOUT_S = 120
NOT_INSTALLED = "ModuleNotFoundError: it is not installed"
TRACEBACK = "Traceback (most recent call last)"
_RAISED = re.compile(r"[\w.]+: ")
# Starts the probe with this process' path. Not through PYTHONPATH, which comes before Python's own modules and is read
# by no embedded Python; nor from the folder of the script, whose `sage3.py` would hide the package of that name.
_START = (
    "import json, runpy, sys\n"
    "for stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='utf-8', errors='replace')\n"
    "sys.path[:], script = json.loads(sys.argv.pop(1)), sys.argv.pop(1)\n"
    "runpy.run_path(script, run_name='__main__')\n"
)


def found(exports: Sequence[Export]) -> Export | None:
    """The first of the exports that imports; None if none does."""
    return next((export for export in exports if trouble(export) is None), None)


def load(exports: Sequence[Export]) -> Callable[..., object]:
    """The function behind the first of the exports that imports. Raises ImportError where none does."""
    for module, name in exports:
        # The usual case, at every call of a kernel: it is imported.
        if hasattr(sys.modules.get(module), name):
            return getattr(sys.modules[module], name)
    export = found(exports)
    if export is None:
        raise ImportError(reason(exports))
    return getattr(importlib.import_module(export[0]), export[1])


def reason(exports: Sequence[Export]) -> str | None:
    """Why none of the exports can be had, with every import error; None if there are none or one imports."""
    if not exports or found(exports) is not None:
        return None
    present = [(export, trouble(export)) for export in exports if _is_there(export[0])]
    if not present:
        names = " or ".join(f"'{name}'" for name in dict.fromkeys(export[0] for export in exports))
        return f"the package {names} is not installed"
    return "; ".join(f"'from {module} import {name}' fails ({why})" for (module, name), why in present)


def trouble(export: Export) -> str | None:
    """What goes wrong when the export is imported; None if nothing does."""
    module, name = export
    if sys.modules.get(module) is not None:
        names, why = dir(sys.modules[module]), None
    elif _is_there(module):
        names, why = _tried(module)
    else:
        return NOT_INSTALLED
    return why if why is not None or name in names else f"AttributeError: {module} has no '{name}'"


def _is_there(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _tried(module: str) -> tuple[tuple[str, ...], str | None]:
    """The names in a module, and what went wrong with its import in another process."""
    try:
        done = other_process({"module": module}, timeout_s=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return (), f"the import took more than {TIMEOUT_S} s"
    except OSError as error:
        return (), f"it is first imported in a process of its own, and none could be started: {error}"
    return tuple(done.stdout.splitlines()), outcome(done)


def other_process(asked: dict[str, object], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """What `probe_kernel.py` says to `asked`, in a Python that imports from where this one does.

    Raises subprocess.TimeoutExpired, and OSError where no process can be started.
    """
    # Other packs put paths of other types there, which Python passes over.
    path = json.dumps([entry for entry in sys.path if isinstance(entry, str) and entry])
    return subprocess.run(
        [sys.executable, "-P", "-c", _START, path, str(SCRIPT), json.dumps(asked)],
        capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False,
    )  # fmt: skip


def outcome(done: subprocess.CompletedProcess[str]) -> str | None:
    """What a finished process says went wrong; None if it ended well."""
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    # Signals end with negative numbers, Windows exceptions with very large ones.
    if not 0 < done.returncode < 256 or not lines:
        return f"the process crashed (exit status {done.returncode})"
    given = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
    if given:
        return given[-1]
    # CUDA's errors go on for lines of general advice after the one that says what happened.
    raised = [line for line in lines if _RAISED.match(line)] if TRACEBACK in done.stderr else []
    return raised[-1] if raised else lines[-1]
