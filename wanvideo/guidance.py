"""Guided velocity: which forward passes a step takes, and how their predictions add up.

Guidance is data. A rule turns the text scale of a step into rows (what the pass goes without, its weight); the velocity
is the weighted sum of one prediction per row. Payloads bring rules of their own (`Payload.guidance`).

Source: classifier-free guidance (Ho and Salimans 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from .conditioning import Payload, Row, Step
from .modifier import Combine, Modifier
from .modules.model import WanModel
from .step_cache import StepMemories
from .tokens import ModelInputs

NO_TEXT = frozenset({"text"})
NO_NEGATIVE = "cfg is not 1 but there is no negative prompt: connect text embeds that have one, or set cfg to 1."


def text_rows(scale: float) -> tuple[Row, ...]:
    """Classifier-free guidance: without * (1 - scale) + with * scale; a scale of 1 takes one pass."""
    return present((Row(scale), Row(1.0 - scale, NO_TEXT)))


def present(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows that weigh something, those with equal passes joined."""
    weights: dict[frozenset[str], float] = {}
    for row in rows:
        weights[row.without] = weights.get(row.without, 0.0) + row.weight
    return tuple(Row(w, names) for names, w in weights.items() if not math.isclose(w, 0.0, abs_tol=1e-9))


def prediction_name(rows: Sequence[Row]) -> str:
    """What a forward of these rows predicts, in words."""
    names = (" and ".join(sorted(row.without)) for row in rows)
    return " and ".join(f"without {name}" if name else "with everything" for name in names)


def per_step(value: float | Sequence[float]) -> tuple[float, ...]:
    """A scale as a tuple: a number stands for every step. Raises ValueError for an empty list."""
    values = (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    if not values:
        raise ValueError("The list of cfg values is empty; give at least one number.")
    return values


def at_step(values: Sequence[float], step: Step) -> float:
    """The value of this step of the run; a list that is too short goes on with its last value."""
    return values[min(step.in_run, len(values) - 1)]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The rule of a run.

    cfg: text scale of every step. payloads: of the run; at most one may bring rows of its own. modifiers: change how
    predictions are combined. batched: passes with equal shapes share one forward.
    """

    cfg: tuple[float, ...]
    payloads: tuple[Payload, ...] = ()
    modifiers: tuple[Modifier, ...] = ()
    batched: bool = False

    def rows(self, step: Step) -> tuple[Row, ...]:
        """The passes of this step. Raises ValueError, naming both, where two systems want to guide it."""
        scale = at_step(self.cfg, step)
        answers = [(p, rows) for p in self.payloads if (rows := p.guidance(scale, step)) is not None]
        if len(answers) > 1:
            names = " and ".join(type(payload).__name__ for payload, _ in answers)
            raise ValueError(
                f"Both {names} bring guidance of their own, and one step can follow only one: set the cfg_scale of all "
                "but one of them to 1."
            )
        return present(answers[0][1]) if answers else text_rows(scale)

    def combine(self, rows: Sequence[Row], predictions: Sequence[Tensor], step: Step) -> Tensor:
        """One velocity [C, F, H, W] float32 of a prediction for each row."""
        combine: Combine = weighted_sum
        for modifier in reversed(self.modifiers):
            combine = modifier.around_guidance(combine)
        return combine(rows, predictions, step)

    def check_prompts(self, steps: Sequence[Step], *, negative: bool) -> None:
        """Raises ValueError if one of the steps needs a negative prompt and there is none, or as `rows`."""
        if any("text" in row.without for step in steps for row in self.rows(step)) and not negative:
            raise ValueError(NO_NEGATIVE)

    def most_passes(self, steps: int) -> int:
        """The most passes that share a forward in a run of so many steps."""
        if not self.batched:
            return 1
        return max(len(self.rows(Step(index=index, total=steps, in_run=index))) for index in range(steps))


def weighted_sum(rows: Sequence[Row], predictions: Sequence[Tensor], step: Step) -> Tensor:
    """The sum of row.weight * prediction."""
    velocity = torch.zeros((), device=predictions[0].device)
    for row, prediction in zip(rows, predictions, strict=True):
        velocity = velocity + row.weight * prediction
    return velocity


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What one video, or one window of it, is denoised under.

    positive, negative: encoded prompts [tokens, text_dim]. payloads: whatever else the model reads.
    """

    positive: Tensor
    negative: Tensor | None = None
    payloads: tuple[Payload, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditions:
        """The same on `device`, floating-point tensors in `dtype`."""
        return Conditions(
            positive=self.positive.to(device, dtype),
            negative=None if self.negative is None else self.negative.to(device, dtype),
            payloads=tuple(payload.to(device, dtype) for payload in self.payloads),
        )


class Denoiser:
    """Velocity of a Wan model under conditions and guidance.

    Conditions are moved to `device` once; payloads and prompts become `dtype`, latents go in as float32. memories: of
    the step cache, if there is one.
    """

    def __init__(
        self,
        model: WanModel,
        conditions: Conditions,
        *,
        guidance: Guidance,
        device: torch.device,
        dtype: torch.dtype,
        riflex_index: int = 0,
        memories: StepMemories | None = None,
    ) -> None:
        self.model = model
        self.memories = memories
        self.guidance = guidance
        self.riflex_index = riflex_index
        self.device = device
        self._conditions = conditions.to(device, dtype)

    def __call__(self, latents: Tensor, timestep: Tensor, step: Step) -> Tensor:
        """Guided velocity [C, F, H, W] float32 of latents [C, F, H, W].

        timestep: 0-d, or [F] where latent frames differ; 0..1000.
        """
        rows, ranks = self.guidance.rows(step), self.model.ranks
        video = ranks.same(latents.to(self.device, torch.float32))
        groups = self._groups(rows)
        together = any(payload.together for payload in self._conditions.payloads)
        results = ranks.each(
            groups, lambda group: self._predict(video, timestep, step, group).float(), together=together
        )
        predictions: dict[Row, Tensor] = {}
        for group, result in zip(groups, results, strict=True):
            predictions |= zip(group, result, strict=True)
        return self.guidance.combine(rows, [predictions[row] for row in rows], step)

    def report(self) -> None:
        """Log what the step cache left out."""
        if self.memories is not None:
            self.memories.report()

    def forget(self) -> None:
        """Compute anew, in the next forward, what the step cache remembers."""
        if self.memories is not None:
            self.memories.clear()

    def _predict(self, video: Tensor, timestep: Tensor, step: Step, rows: Sequence[Row]) -> Tensor:
        count = len(rows)
        forms = [self._payloads(row) for row in rows]
        inputs = ModelInputs(
            latents=video.expand(count, *video.shape),
            timestep=timestep.to(self.device).expand(count, *timestep.shape),
            text=tuple(self._text(row) for row in rows),
            prompts=(self._conditions.positive,) * count,
            payloads=tuple(first.stack(others) for first, *others in zip(*forms, strict=True)),
            step=step,
            riflex_index=self.riflex_index,
        )
        if self.memories is None:
            return self.model(inputs)
        return self.model(inputs, self.memories.of(prediction_name(rows)))

    def _payloads(self, row: Row) -> tuple[Payload, ...]:
        if not row.without:
            return self._conditions.payloads
        forms = (payload.without(row.without) for payload in self._conditions.payloads)
        return tuple(form for form in forms if form is not None)

    def _text(self, row: Row) -> Tensor:
        if "text" not in row.without:
            return self._conditions.positive
        if self._conditions.negative is None:
            raise ValueError(NO_NEGATIVE)
        return self._conditions.negative

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that share a forward: each its own, or in batched mode all whose payloads can be stacked."""
        if not self.guidance.batched:
            return [[row] for row in rows]
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(_form(payload) for payload in self._payloads(row)), []).append(row)
        return list(groups.values())


def _form(value: object) -> object:
    """What must be equal where payloads share a forward: the shapes of batches, and whatever has none."""
    if isinstance(value, Tensor):
        return tuple(value.shape) if value.dim() else id(value)
    if is_dataclass(value):
        return type(value), *(_form(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple):
        return tuple(_form(part) for part in value)
    return value if value.__hash__ is not None else id(value)
