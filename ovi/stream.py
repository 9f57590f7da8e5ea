"""The sound of a run beside its video: where it stands, what the model predicts for it, how that is guided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from ..wanvideo.conditioning import EVERYTHING, Payload, Row, Step, Window
from ..wanvideo.guidance import NO_TEXT, at_step

# From this text scale on, sound that has no scale of its own follows the text one lower.
HIGH_SCALE, LOWERED = 4.0, 1.0


@dataclass
class SoundStream:
    """Latents of sound on their way through a run.

    audio [L, channels] float32. scales: of the prompt for sound, one a step; None follows that of the video.
    velocities: the predictions [B, L, channels] of the latest passes, by what they went without. velocity [L,
    channels]: guided, of this step; None where no pass ran. steps: taken so far.
    """

    audio: Tensor
    scales: tuple[float, ...] | None = None
    velocities: dict[frozenset[str], Tensor] = field(default_factory=dict)
    velocity: Tensor | None = None
    steps: int = 0

    def guide(self, rows: Sequence[Row], step: Step) -> None:
        """The velocity of the passes of this step, with the sound's own scale where there are two."""
        weights = {row.without: row.weight for row in rows}
        if set(weights) == {EVERYTHING, NO_TEXT}:
            text = weights[EVERYTHING]
            if self.scales is None:
                scale = text - LOWERED if text > HIGH_SCALE else text
            else:
                scale = at_step(self.scales, step)
            weights = {EVERYTHING: scale, NO_TEXT: 1.0 - scale}
        self.velocity = sum(weight * self.velocities[names][0] for names, weight in weights.items())


@dataclass(frozen=True)
class OviSound(Payload):
    """stream: of the run. negative: embedded prompts [tokens, text_dim] of what the sound avoids; None: the video's.

    missing: what this pass goes without.
    """

    stream: SoundStream
    negative: tuple[Tensor, ...] | None = None
    missing: frozenset[str] = EVERYTHING
    together: ClassVar[bool] = True
    needs: ClassVar[str] = (
        "Sound beside the video needs a model with 'audio_model': connect Ovi's audio module, by "
        "WanVideoExtraModelSelect, to extra_model of WanVideoModelLoader."
    )

    def window(self, window: Window) -> Self:
        """Raises ValueError for a part of the video: the sound is of one piece."""
        if not window.whole:
            raise ValueError(
                "Ovi makes picture and sound in one piece of 5 or 10 seconds: disconnect context_options, or lower "
                "num_frames."
            )
        return self

    def without(self, names: frozenset[str]) -> Self:
        """The same sound, told apart by what its pass goes without."""
        return replace(self, missing=names)


@dataclass(frozen=True)
class OviText(Payload):
    """Guidance of the sound, as its node gives it to text embeds. negative, scales: as in OviSound and SoundStream."""

    negative: tuple[Tensor, ...]
    scales: tuple[float, ...]
    needs: ClassVar[str] = "This model makes no sound, so that WanVideoOviCFG has no effect."
    optional: ClassVar[bool] = True
