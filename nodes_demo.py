"""The demo's picture and speech, which lie in the pack and not in ComfyUI's input folder."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .node_tools import CATEGORY, Inputs, mappings

FILES = Path(__file__).with_name("demo") / "input"
FULL_SCALE = 2**15


class WanVideoDemoInputs:
    """The portrait and the sentence of the demo, which come with the pack.

    For one's own, Load Image and Load Audio take the place of this node.
    """

    DISPLAY_NAME = "WanVideo Demo Inputs"
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "AUDIO")
    RETURN_NAMES = ("portrait", "speech")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {}}

    def load(self) -> tuple[Tensor, dict[str, object]]:
        """IMAGE [1, H, W, 3] in 0..1 and AUDIO of one channel."""
        return _picture(FILES / "portrait.png"), _sound(FILES / "speech.wav")


def _picture(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).float().div(255)[None]


def _sound(path: Path) -> dict[str, object]:
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, file.getnchannels())
        rate = file.getframerate()
    return {"waveform": torch.from_numpy(samples.T.astype(np.float32) / FULL_SCALE)[None], "sample_rate": rate}


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoDemoInputs)
