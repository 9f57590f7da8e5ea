"""Trains the demo's Wav2Vec2 encoder to hear how far a mouth is open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..sounds import FRAME
from .gradients import backward
from .speech import Take
from .trainer import Trainer

RATE = 1e-3
SOUNDS, FRAMES = 48, 125
SHUT = 0.02


class Listener(nn.Module):
    """The encoder with one linear layer behind every transformer layer, which training alone needs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in encoder.encoder.layers)
        self._found: list[Tensor] = []
        for layer in encoder.encoder.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._found.append(output[0] if isinstance(output, tuple) else output)

    def forward(self, sounds: Tensor, frames: int) -> list[Tensor]:
        """Sounds [B, samples] -> how open and how loud, [B, frames, 2], from every layer."""
        features = self.encoder.feature_extractor(sounds)
        features = nn.functional.interpolate(features.float(), size=frames, mode="linear", align_corners=True)
        hidden, _ = self.encoder.feature_projection(features.transpose(1, 2))
        self._found.clear()
        self.encoder.encoder(hidden)
        return [head(state) for head, state in zip(self.heads, self._found, strict=True)]


def train(encoder: nn.Module, takes: list[Take], path: Path, *, seconds: float, device: torch.device) -> nn.Module:
    """The trained encoder."""
    rng = np.random.default_rng(0)
    long = [take for take in takes if len(take.mouth) > FRAMES]
    listener = Listener(encoder.eval()).to(device)

    def loss() -> Tensor:
        chosen = [long[i] for i in rng.integers(len(long), size=SOUNDS)]
        starts = [int(rng.integers(len(take.mouth) - FRAMES)) for take in chosen]
        # Some starts are the take's own: its first frames are heard, too.
        starts = [0 if rng.random() < 0.3 else start for start in starts]
        pairs = list(zip(chosen, starts, strict=True))
        sounds = np.stack([take.sound[at * FRAME : (at + FRAMES) * FRAME] for take, at in pairs])
        mouths = torch.from_numpy(np.stack([take.mouth[at : at + FRAMES] for take, at in pairs])).float().to(device)
        wanted = torch.stack((mouths, (mouths + SHUT).log()), dim=-1)
        heard = listener(torch.from_numpy(sounds).float().to(device), FRAMES)
        return sum(((guess - wanted) ** 2 * wanted.new_tensor([10.0, 1.0])).mean() for guess in heard)

    return Trainer(listener, path, seconds=seconds, rate=RATE).run(lambda: backward(listener, loss)).encoder
