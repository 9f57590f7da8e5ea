"""Opaque operators and the eager PyTorch that each of them must equal."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

# The pack may be loaded twice in one process (by ComfyUI from its folder and as `wanvideo_wrapper`); operators are
# global to the process, so each copy registers under its own name.
NAMESPACE = "wan_" + re.sub(r"\W", "_", __name__)


def op_name(name: str) -> str:
    """The operator's registered name."""
    return f"{NAMESPACE}::{name}"


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
