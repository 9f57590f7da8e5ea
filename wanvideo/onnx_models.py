"""ONNX models of detectors: what their authors publish, run by onnxruntime, which is an optional package.

Files are named when they are missing and never fetched.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("wanvideo")

Array = NDArray[np.floating]


class Port(Protocol):
    """Description of an input: a side that is no number may have any length."""

    name: str
    shape: list[int | str | None]


class Session(Protocol):
    """What onnxruntime.InferenceSession gives."""

    def run(self, outputs: None, inputs: dict[str, Array]) -> list[Array]:
        """The outputs of the model."""

    def get_inputs(self) -> list[Port]:
        """Descriptions of its inputs."""


@dataclass(frozen=True)
class OnnxModels:
    """Models that one detector needs. owner: the detector; names: file names; source: what to put there, from where."""

    owner: str
    names: tuple[str, ...]
    source: str

    def open(self, folder: Path, device: str, *, required: bool = True) -> list[Session]:
        """A session for each file. device: "cpu" or "cuda".

        required: refuse where onnxruntime lacks the device, instead of using the CPU with a line in the log. Raises
        ValueError, with what to do, for a missing file, package or device.
        """
        missing = [name for name in self.names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.owner} needs {' and '.join(missing)} in {folder}: put there {self.source}.")
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f"{self.owner} needs the package onnxruntime, which is not installed: pip install onnxruntime, or "
                "onnxruntime-gpu for a GPU."
            ) from error
        cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
        provider = cuda if device == "cuda" else cpu
        if provider not in onnxruntime.get_available_providers():
            if required:
                raise ValueError(
                    "The installed onnxruntime has no CUDA: choose device 'cpu', or install onnxruntime-gpu in its "
                    "place."
                )
            log.warning(
                "%s runs on the CPU, which is slow: install onnxruntime-gpu in place of onnxruntime.", self.owner
            )
            provider = cpu
        return [onnxruntime.InferenceSession(str(folder / name), providers=[provider]) for name in self.names]
