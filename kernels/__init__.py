"""Opaque operators and the eager PyTorch that each of them must equal."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from types import ModuleType

import torch

log = logging.getLogger("wanvideo")

# The pack may be loaded twice in one process (by ComfyUI from its folder and as `wanvideo_wrapper`); operators are
# global to the process, so each copy registers under its own name.
NAMESPACE = "wan_" + re.sub(r"\W", "_", __name__)


def op_name(name: str) -> str:
    """The operator's registered name."""
    return f"{NAMESPACE}::{name}"


_runs: dict[torch.device, bool] = {}


def triton_runs(device: torch.device) -> bool:
    """Whether Triton's kernels run on the GPU; if not, the log says why, once.

    For operators that are as exact in eager PyTorch: Triton is installed with torch, but needs a C compiler. Raises
    torch.AcceleratorError for a fault of a kernel before.
    """
    if device in _runs:
        return _runs[device]
    try:
        why = _trouble(device)
    except _FullError:
        # Says nothing of Triton. The kernel that is to run will find memory, or say so itself.
        return True
    _runs[device] = why is None
    if why is not None:
        log.warning(
            "Triton does not run here (%s): norm and position take several passes in PyTorch, which is slower.", why
        )
    return _runs[device]


class _FullError(Exception):
    """No memory for a trial."""


def _trouble(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package is not installed"
    try:
        triton_kernels("trial_triton").run(device)
    # A missing compiler, a DLL that does not load, a GPU that is too old: all are reasons.
    except Exception as error:
        if "out of memory" in str(error):
            raise _FullError from error
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise
        return in_a_line(error)
    return None


@functools.cache
def holds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of the dtype can be on the device: Apple's MPS has no float64, nor FP8."""
    try:
        torch.empty(1, dtype=dtype, device=device)
    except TypeError:
        return False
    return True


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return device if holds(device, torch.float64) else torch.device("cpu")


def in_a_line(error: BaseException) -> str:
    """The error's class, and the first line of what it says: compilers' errors go on for pages, or say nothing."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def triton_kernels(name: str) -> ModuleType:
    """The module `name` of this package, which holds Triton kernels.

    Raises ImportError where Triton is missing: the eager form would be several times slower, so it is not a substitute.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "FP8 matrix products on a GPU need the package 'triton' (on Windows 'triton-windows'), which is not "
            "installed; a quantization without '_fast' needs none."
        )
    return importlib.import_module(f".{name}", __package__)
