"""What all stages share: time budget, learning rate, averaged weights, and a file to go on from."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger("wanvideo")

WARMUP_STEPS = 200
SAVE_SECONDS = 60.0
REPORT_STEPS = 200
AVERAGE = 0.999


class Trainer:
    """Runs steps until the stage's seconds are over; progress is the share of them that has passed.

    `path` is written every minute and at the end: averaged weights in float32 and the seconds used. A trainer that
    finds it goes on from there with a fresh optimizer.
    """

    def __init__(
        self, model: nn.Module, path: Path, *, seconds: float, rate: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        self.model, self.path, self.seconds, self.rate = model, path, seconds, rate
        self.used = self._resume()
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.weights, self.averages = list(model.parameters()), list(self.average.parameters())
        decayed = [p for p in self.weights if p.dim() > 1]
        plain = [p for p in self.weights if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        fused = self.weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)
        self.step = 0

    def _resume(self) -> float:
        if not self.path.is_file():
            return 0.0
        from safetensors import safe_open
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(self.path), strict=True)
        with safe_open(self.path, "pt") as file:
            used = float(file.metadata()["seconds"])
        log.info("Going on from %s after %.0f of %.0f seconds.", self.path, used, self.seconds)
        return used

    def run(self, step: Callable[[], Tensor]) -> nn.Module:
        """Train with a function that gives the loss and leaves gradients; returns the model with averaged weights."""
        begun, saved = time.monotonic() - self.used, time.monotonic()
        while self.used < self.seconds:
            self._set_rate(self.used / self.seconds)
            loss = step()
            nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
            self.optimizer.step()
            self._add_to_average()
            self.step += 1
            if self.step % REPORT_STEPS == 0:
                self._report(float(loss))
            self.used = time.monotonic() - begun
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        log.info("%s: %d steps in %.0f s", self.path.stem, self.step, self.used)
        return self.average

    def _report(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {self.step}; start again from {self.path}.")
        log.info("%s: step %d, %.0f s, loss %.5f", self.path.stem, self.step, self.used, loss)

    def _set_rate(self, progress: float) -> None:
        warm = min((self.step + 1) / WARMUP_STEPS, 1.0)
        rate = self.rate * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))) + 1e-6
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _add_to_average(self) -> None:
        keep = min(AVERAGE, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - keep)

    def save(self) -> None:
        """Write the file to go on from."""
        from safetensors.torch import save_file

        tensors = {k: v.detach().cpu().contiguous() for k, v in self.average.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise FloatingPointError(f"NaN or infinite weights at step {self.step}; start again from {self.path}.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        save_file(tensors, partial, metadata={"seconds": str(self.used)})
        partial.replace(self.path)
