"""The host outside ComfyUI: folders with ComfyUI's names, torch's devices, a bar on stderr."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from .protocol import (
    KINDS,
    MODEL_SUFFIXES,
    CancelledError,
    Host,
    Managed,
    MemoryMode,
    Place,
    Progress,
    check_name,
    find_in,
    names_in,
)
from .residence import ModuleResidence


class ModuleOnDevice:
    """Managed on the standalone host: moves the module, nothing else competes for the memory."""

    def __init__(self, module: nn.Module, host: Host, place: Place | None) -> None:
        self.module = module
        self._host = host
        self._place = place or ModuleResidence(module)

    def acquire(self, working: int = 0) -> torch.device:
        """To the compute device, on which nothing can be evicted."""
        device = self._host.device()
        self._place(device)
        return device

    def release(self) -> None:
        """To the offload device."""
        self._place(self._host.offload_device())
        self._host.free_memory()


class TerminalProgress:
    """A tqdm bar on stderr; silent where stderr is no terminal."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.close()

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """Move the bar; previews have nowhere to go."""
        if note:
            self._bar.set_description(note, refresh=False)
        self._bar.update(done - self._bar.n)


class StandaloneHost:
    """Runs without ComfyUI. models: a folder with ComfyUI's sub-folders; device: "auto", "cpu", "cuda" or "cuda:1".

    A GPU that is given by its number becomes torch's current one. Raises ValueError for one that is not there.
    """

    name = "standalone"

    def __init__(
        self,
        *,
        models: Path | None = None,
        inputs: Path | None = None,
        outputs: Path | None = None,
        device: str = "auto",
        allowed: tuple[Path, ...] = (),
    ) -> None:
        base = Path.cwd()
        self._models = Path(models or os.environ.get("WANVIDEO_MODELS") or base / "models")
        self._inputs = Path(inputs or base / "input")
        self._outputs = Path(outputs or base / "output")
        self._device = _choose_device(device)
        self._allowed = tuple(folder.resolve() for folder in allowed)
        self.cancel = threading.Event()

    def device(self) -> torch.device:
        """The device asked for."""
        return self._device

    def offload_device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")

    def results_device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")

    def _folders(self, kind: str) -> tuple[list[Path], tuple[str, ...]]:
        folder, suffixes = KINDS.get(kind, (kind, MODEL_SUFFIXES))
        return [self._models / folder], suffixes

    def list_files(self, kind: str) -> list[str]:
        """Files below models/<kind>."""
        return names_in(*self._folders(kind))

    def find_file(self, kind: str, name: str) -> Path:
        """A file below models/<kind>."""
        return find_in(kind, name, self._folders(kind)[0])

    def models_dir(self, kind: str) -> Path:
        """models/<kind>."""
        return self._folders(kind)[0][0]

    def input_dir(self) -> Path:
        """The input folder."""
        return self._inputs

    def output_dir(self) -> Path:
        """The output folder."""
        return self._outputs

    def temp_dir(self) -> Path:
        """output/temp."""
        return self._outputs / "temp"

    def cache_dir(self) -> Path:
        """output/cache."""
        return self._outputs / "cache"

    def readable_file(self, name: str) -> Path:
        """A file of the user's: below the input folder, or absolute below the input, output or an allowed folder.

        Raises ValueError outside them, FileNotFoundError where there is none.
        """
        base, name = self._folder_named_in(name)
        path = self._confined(base, name)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{name}' in {base}; put it there, or give another name.")
        return path

    def _folder_named_in(self, name: str) -> tuple[Path, str]:
        """ComfyUI writes "name [output]" for a file that is not in the input folder."""
        folders = {" [input]": self._inputs, " [output]": self._outputs, " [temp]": self.temp_dir()}
        for ending, folder in folders.items():
            if name.endswith(ending):
                return folder, name.removesuffix(ending)
        return self._inputs, name

    def writable_folder(self, name: str) -> Path:
        """Below the output folder, or in one that is allowed."""
        return self._confined(self._outputs, name)

    def _confined(self, base: Path, name: str) -> Path:
        check_name(name)
        path = (base / name.replace("\\", "/")).resolve()
        folders = (base.resolve(), self._inputs.resolve(), self._outputs.resolve(), *self._allowed)
        if not any(path.is_relative_to(folder) for folder in folders):
            raise ValueError(f"'{name}' lies outside the input and output folders: allow it with --allow-path DIR.")
        return path

    def progress(self, total: int, label: str = "") -> Progress:
        """A bar on stderr."""
        return TerminalProgress(total, label)

    def check_cancelled(self) -> None:
        """Raises CancelledError once `cancel` is set."""
        if self.cancel.is_set():
            raise CancelledError("Cancelled.")

    def manage(
        self, module: nn.Module, *, place: Place | None = None, resident: Callable[[], int] | None = None
    ) -> Managed:
        """Moves the module on demand."""
        return ModuleOnDevice(module, self, place)

    def free_memory(self) -> None:
        """Empties torch's cache."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def make_room(self) -> None:
        """Nodes release their models themselves; what is left is torch's cache."""
        self.free_memory()

    def reserved_memory(self) -> int:
        """None of it."""
        return 0

    def memory_mode(self) -> MemoryMode:
        """There is no option."""
        return "normal"

    def attention(self) -> None:
        """None: there is no ComfyUI to choose one."""


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU, but the device 'cuda' was asked for: use 'cpu', or a CUDA torch.")
    if device.type == "cuda" and device.index is not None:
        have = torch.cuda.device_count()
        if device.index >= have:
            raise ValueError(f"The device '{name}' was asked for, but torch sees {have} GPUs, counted from cuda:0.")
        # Kernels of other packages are launched on the current device, wherever their tensors are.
        torch.cuda.set_device(device)
    return device
