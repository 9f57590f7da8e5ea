"""What the pack needs from where it runs: model files, compute device, memory management, progress, cancellation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

MemoryMode = Literal["normal", "low", "none"]
Place = Callable[[torch.device], None]
# q, k, v [B, H, L, D] -> [B, L, H * D]
HostAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

# The models that come with the pack.
DEMO_MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"
# Folders whose files this pack lists, and the endings that count. GGUF files lie among the others.
MODEL_SUFFIXES = (".safetensors", ".sft")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "diffusion_models": ("diffusion_models", MODEL_SUFFIXES),
    "unet_gguf": ("diffusion_models", (".gguf",)),
    "vae": ("vae", MODEL_SUFFIXES),
    "text_encoders": ("text_encoders", MODEL_SUFFIXES),
    "text_encoders_gguf": ("text_encoders", (".gguf",)),
    "clip_vision": ("clip_vision", MODEL_SUFFIXES),
    "loras": ("loras", MODEL_SUFFIXES),
    "wav2vec2": ("wav2vec2", MODEL_SUFFIXES),
    "audio_encoders": ("audio_encoders", MODEL_SUFFIXES),
    "transformers": ("transformers", MODEL_SUFFIXES),
    "vae_approx": ("vae_approx", MODEL_SUFFIXES),
    "controlnet": ("controlnet", MODEL_SUFFIXES),
    "nlf": ("nlf", MODEL_SUFFIXES),
    "mmaudio": ("mmaudio", MODEL_SUFFIXES),
    "detection": ("detection", (".onnx",)),
}


class CancelledError(Exception):
    """The user stopped the run. Nothing went wrong; what was finished stays."""


class Progress(Protocol):
    """A progress bar, used as a context manager."""

    def __enter__(self) -> Self:
        """Show the bar."""

    def __exit__(self, *failure: object) -> None:
        """Take it away."""

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """`done` of the total are done; note: what is going on; preview: latents [C, F, H, W] to show."""


class Managed(Protocol):
    """A model under the host's memory management."""

    module: nn.Module

    def acquire(self, working: int = 0) -> torch.device:
        """Put the model on the compute device, making room by evicting others; returns that device.

        working: bytes that it needs there besides what stays of its weights.
        """

    def release(self) -> None:
        """Back to the offload device."""


class Host(Protocol):
    """What the pack needs from where it runs."""

    name: str

    def device(self) -> torch.device:
        """Where models compute."""

    def offload_device(self) -> torch.device:
        """Where models wait."""

    def results_device(self) -> torch.device:
        """Where pictures lie between nodes."""

    def list_files(self, kind: str) -> list[str]:
        """Names of the model files of a kind (KINDS), sorted, with '/' between folders."""

    def find_file(self, kind: str, name: str) -> Path:
        """The file of that name. Raises FileNotFoundError that says where it was looked for."""

    def models_dir(self, kind: str) -> Path:
        """The folder that new files of a kind go to."""

    def input_dir(self) -> Path:
        """The user's pictures, sounds and videos."""

    def output_dir(self) -> Path:
        """Finished results."""

    def temp_dir(self) -> Path:
        """Results that may be thrown away."""

    def cache_dir(self) -> Path:
        """What was computed and need not be again, kept from run to run."""

    def writable_folder(self, name: str) -> Path:
        """The folder a workflow asks to write to: below the output folder, or an absolute one that is allowed.

        Raises ValueError for a folder that is not.
        """

    def progress(self, total: int, label: str = "") -> Progress:
        """A new progress bar of `total` steps."""

    def check_cancelled(self) -> None:
        """Raises CancelledError (in ComfyUI its own interruption) if the user stopped the run."""

    def manage(
        self, module: nn.Module, *, place: Place | None = None, resident: Callable[[], int] | None = None
    ) -> Managed:
        """Put a model under memory management. place(device) moves it, where `module.to` is not enough.

        resident: how many bytes of it will be on the device; None for all.
        """

    def reserved_memory(self) -> int:
        """Bytes of the device that its user wants left alone."""

    def memory_mode(self) -> MemoryMode:
        """How much of the device models may take: "low" asks for offloading, "none" for as much of it as there is."""

    def free_memory(self) -> None:
        """Give cached device memory back."""

    def make_room(self) -> None:
        """Give as much of the device's memory as can be to other processes that are about to use it."""

    def attention(self) -> HostAttention | None:
        """The attention that the host chose by its own options; None where it has none."""


# Bytes of one part of a path that file systems take.
LONGEST_NAME = 255


def check_name(name: str) -> None:
    """Raises ValueError for a path that no file system takes: null characters, lone surrogates, parts too long."""
    try:
        parts = [os.fsencode(part) for part in name.replace("\\", "/").split("/")]
    except UnicodeEncodeError:
        parts = [b"\0"]
    if any(b"\0" in part for part in parts):
        raise ValueError(f"{name!r:.80} has characters that no file name can have: take them out.")
    if max(map(len, parts)) > LONGEST_NAME:
        raise ValueError(f"'{name[:40]}...' is longer than the {LONGEST_NAME} bytes of a file's name: shorten it.")


def inside(folder: Path, name: str) -> Path:
    """folder / name with '\\' read as '/'. Raises ValueError if that leaves the folder, or is no name."""
    check_name(name)
    root = folder.resolve()
    path = Path(os.path.normpath(folder / name.replace("\\", "/"))).absolute()
    if not path.is_relative_to(folder.absolute()) and not path.resolve().is_relative_to(root):
        raise ValueError(f"'{name}' lies outside {folder}; give a name below that folder.")
    return path


def _leads_up(folder: Path) -> bool:
    """Whether this is a link to a folder that it lies in."""
    return folder.is_symlink() and any(folder.samefile(above) for above in folder.parents)


def names_in(folders: Iterable[Path], suffixes: tuple[str, ...]) -> list[str]:
    found = set()
    for folder in folders:
        for parent, inner, files in os.walk(folder, followlinks=True):
            # Links back to a folder above would be followed dozens of times, two of them for ever.
            inner[:] = [name for name in inner if not _leads_up(Path(parent, name))]
            found |= {(Path(parent) / f).relative_to(folder).as_posix() for f in files if f.lower().endswith(suffixes)}
    return sorted(found)


def find_in(kind: str, name: str, folders: list[Path]) -> Path:
    for folder in folders:
        path = inside(folder, name)
        if path.is_file():
            return path
    places = " or ".join(str(folder) for folder in folders)
    shown = name.replace("\\", "/")
    raise FileNotFoundError(f"There is no model file '{shown}': put it into {places}, or choose another.")
