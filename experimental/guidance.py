"""Other ways to combine the pass with the prompt and the pass without it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..wanvideo.conditioning import EVERYTHING, Row, Step
from ..wanvideo.guidance import NO_TEXT
from ..wanvideo.modifier import Combine, Modifier
from .formulas import FrequencyScales, adaptive_scale, optimal_scale, tangential

log = logging.getLogger("wanvideo")


@dataclass(frozen=True, kw_only=True)
class TextGuidance(Modifier):
    """Changes steps of two passes, with and without the prompt; others by `frequencies` only, if all have the prompt.

    zero_star: the pass without the prompt is scaled to lie near the other; projected: and loses what leads off it;
    raag_alpha: how fast the scale falls with the passes' difference, 0 is off; frequencies: of guidance, or of the
    prediction where no pass goes without the prompt.
    """

    zero_star: bool = False
    projected: bool = False
    raag_alpha: float = 0.0
    frequencies: FrequencyScales | None = None

    def around_guidance(self, combine: Combine) -> Combine:
        """`combine` of changed predictions and weights."""

        def changed(rows: Sequence[Row], predictions: Sequence[Tensor], step: Step) -> Tensor:
            passes = {row.without: prediction for row, prediction in zip(rows, predictions, strict=True)}
            if set(passes) == {EVERYTHING, NO_TEXT}:
                scale = next(row.weight for row in rows if row.without == EVERYTHING)
                scale, cond, uncond = self._two(passes[EVERYTHING], passes[NO_TEXT], scale)
                return combine((Row(scale), Row(1.0 - scale, NO_TEXT)), (cond, uncond), step)
            prompted = not any("text" in names for names in passes)
            if step.in_run == 0 and (self.zero_star or self.projected or self.raag_alpha or not prompted):
                log.warning(
                    "Guidance options of WanVideoExperimentalArgs act only in steps of one pass with and one without "
                    "the prompt: where cfg is not 1 and no other system guides."
                )
            if prompted and self.frequencies is not None:
                pairs = zip(rows, predictions, strict=True)
                predictions = [p if row.without else self.frequencies(p) for row, p in pairs]
            return combine(rows, predictions, step)

        return changed

    def _two(self, cond: Tensor, uncond: Tensor, scale: float) -> tuple[float, Tensor, Tensor]:
        """The scale and the two predictions to go on with."""
        nearest = optimal_scale(cond, uncond) if self.zero_star else 1.0
        uncond = uncond * nearest
        if self.projected:
            uncond = tangential(cond, uncond)
        if self.raag_alpha > 0:
            scale = adaptive_scale(cond, uncond, scale, self.raag_alpha)
            log.info("RAAG: cfg is %.3f in this step.", scale)
        if self.frequencies is not None:
            cond = uncond + self.frequencies(cond - uncond) * nearest
        return scale, cond, uncond
