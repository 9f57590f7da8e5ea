"""Loading from diffusers and transformers without the attention kernels that both import of their own accord.

With its first model diffusers imports every kernel package that is installed, and some versions of transformers import
FlashAttention. A broken one raises there, or ends the process, though nobody asked for it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

# Each package with the module that is loaded once its kernels are: of a package that broke off while it was imported,
# the first part can stay behind.
KERNELS = {
    "flash_attn": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_interface": "flash_attn_interface",
    "sageattention": "sageattention",
    "sageattn3": "sageattn3",
    "sageattn": "sageattn",
    "sage3": "sage3",
    "xformers": "xformers.ops",
    "flashinfer": "flashinfer",
    "aiter": "aiter",
}

# Imports of two threads would otherwise put back what they saw of each other.
_LOCK = threading.RLock()


@contextmanager
def kernels_hidden(library: str) -> Iterator[None]:
    """While it is open, kernel packages that nobody has loaded yet seem not to be installed.

    library: 'diffusers' or 'transformers', whichever is imported inside. What is loaded stays visible, so where another
    node pack came first, nothing changes.
    """
    with _LOCK:
        # It looks for packages without importing them. First, so that what it keeps for later is the truth.
        utils = importlib.import_module(f"{library}.utils.import_utils")
        hidden = [package for package, proof in KERNELS.items() if sys.modules.get(proof) is None]
        with _flags_down(utils, hidden), _out_of_sight(hidden):
            yield


@contextmanager
def _out_of_sight(names: Sequence[str]) -> Iterator[None]:
    """Nothing finds or imports these modules: None in `sys.modules` is Python's own way to say so."""
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            # Unless another thread has loaded it in the meantime.
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
                sys.modules.update({name: before[name]} if name in before else {})
        _forget_answers()


@contextmanager
def _flags_down(utils: ModuleType, names: Sequence[str]) -> Iterator[None]:
    """diffusers' flags for these packages say that they are not installed; they may be older than the hiding."""
    flags = {flag: getattr(utils, flag) for flag in (f"_{name}_available" for name in names) if hasattr(utils, flag)}
    vars(utils).update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        # Once its attention modules are loaded they hold no kernels of these packages. With the flags up, others would
        # call them nevertheless; with the flags down they are told so, or take torch's.
        if not any(name.startswith("diffusers.models.attention") for name in list(sys.modules)):
            vars(utils).update(flags)


def _forget_answers() -> None:
    """transformers remembers whether FlashAttention is installed, but imports it only when a model wants it."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name, function in list(vars(utils).items()) if utils else ():
        if "flash_attn" in name and hasattr(function, "cache_clear"):
            function.cache_clear()
