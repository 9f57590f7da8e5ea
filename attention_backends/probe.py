"""Try a third-party kernel in a process of its own, at the run's shape, before the model goes to the device.

A kernel that faults poisons the CUDA context: no `except` saves the run then. Verdicts are kept for the process, keyed
by GPU, driver, package versions and shape; good ones on disk, too, as a trial takes seconds. After a bad one the next
process tries again: whatever was wrong may have been mended.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from .contract import AttentionSpec
from .packages import other_process, outcome
from .probe_kernel import OUT_OF_MEMORY
from .third_party import DTYPES, Kernel, Sizes

log = logging.getLogger("wanvideo")

TIMEOUT_S = 300
MOST_KEPT = 1000
_verdicts: dict[tuple[object, ...], str | None] = {}


def verdict(
    kernel: Kernel, spec: AttentionSpec, tokens: int, batch: int = 1, *, kept: Path | None = None
) -> str | None:
    """Why the kernel cannot run self-attention of so many tokens; None if it can, or had no memory to be tried.

    kept: the file of good verdicts.
    """
    refused = kernel.limit(Sizes(tokens, tokens, spec.heads, spec.device))
    if refused is not None:
        return refused
    key = (kernel.name, _versions(kernel), _machine(spec.device), spec, tokens, batch)
    if key not in _verdicts:
        name = hashlib.sha256(repr((key, sorted(kernel.options.items()), kernel.exports)).encode()).hexdigest()
        if kept is not None and name in _good(kept):
            _verdicts[key] = None
            return None
        try:
            why = _try(kernel, spec, tokens, batch)
        except MemoryError:
            # No verdict: the next run may find room for the trial.
            log.warning("'%s' was not tried before the run: there was not enough free memory on the GPU.", kernel.name)
            return None
        _verdicts[key] = None if why is None else f"a trial in a process of its own failed: {why}"
        if why is None and kept is not None:
            _keep(kept, name)
    return _verdicts[key]


def _good(kept: Path) -> list[str]:
    """The names in the file; none where it is missing or damaged, which costs a trial."""
    try:
        names = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) else []


def _keep(kept: Path, name: str) -> None:
    """Adds a name; the file is there whole or not at all."""
    part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([*_good(kept), name][-MOST_KEPT:]), encoding="utf-8")
        part.replace(kept)
    except OSError as error:
        log.warning("That a kernel runs is not kept in %s: %s.", kept, error.strerror or error)


def _try(kernel: Kernel, spec: AttentionSpec, tokens: int, batch: int) -> str | None:
    """The verdict of another process. Raises MemoryError where that found no room on the device."""
    dtype = spec.dtype if spec.dtype in DTYPES else DTYPES[0]
    asked = {
        "exports": kernel.exports,
        "heads_first": kernel.heads_first,
        "packed": kernel.packed,
        "options": dict(kernel.options),
        "shape": (batch, tokens, spec.heads, spec.head_dim),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(spec.device),
    }
    try:
        done = other_process(asked, timeout_s=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"it did not finish within {TIMEOUT_S} s"
    except OSError as error:
        return f"no process could be started: {error}"
    if done.returncode == OUT_OF_MEMORY:
        raise MemoryError
    return outcome(done)


def _machine(device: torch.device) -> tuple[object, ...]:
    if device.type != "cuda":
        return (device.type, torch.__version__)
    driver = torch.cuda.get_device_properties(device)
    versions = (torch.version.cuda, torch.__version__, _driver_version())
    return (driver.name, str(getattr(driver, "uuid", "")), *versions)


def _driver_version() -> int:
    """As the driver itself says: PyTorch's own word for it is private, and not in every version."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _versions(kernel: Kernel) -> tuple[str, ...]:
    packages = importlib.metadata.packages_distributions()
    names = {name for module, _ in kernel.exports for name in packages.get(module, ())}
    return tuple(sorted(f"{name} {importlib.metadata.version(name)}" for name in names))
