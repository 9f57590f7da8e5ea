"""Opaque operators and the eager PyTorch that each of them must equal."""

from __future__ import annotations

import re

# The pack may be loaded twice in one process (by ComfyUI from its folder and as `wanvideo_wrapper`); operators are
# global to the process, so each copy registers under its own name.
NAMESPACE = "wan_" + re.sub(r"\W", "_", __name__)


def op_name(name: str) -> str:
    """The operator's registered name."""
    return f"{NAMESPACE}::{name}"
