"""Guided velocity: which forward passes a step takes, and how their predictions add up.

Guidance is data. A rule turns the scales of a step into rows (keep the text? keep the audio? weight); the velocity is
the weighted sum of one prediction per row. A new guidance is a new rule.

Sources: classifier-free guidance (Ho and Salimans 2022); text and audio guidance of MeiGen-AI/InfiniteTalk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .extension import Payload, RunCache, Step
from .modules.model import ModelInputs, WanModel
from .step_cache import StepMemories


class Row(NamedTuple):
    """One forward pass: whether it keeps the prompt and the speech, and its weight in the sum."""

    text: bool
    audio: bool
    weight: float


def prediction_name(rows: Sequence[Row]) -> str:
    """What a forward of these rows predicts, in words."""
    names = (("prompt" if r.text else "no prompt") + ("" if r.audio else ", no speech") for r in rows)
    return " and ".join(names)


def guidance_rows(text_scale: float, audio_scale: float = 1.0) -> tuple[Row, ...]:
    """The passes of a step. A scale of 1 takes no pass of its own, rows that weigh nothing are left out.

    With both scales each term has its own: nothing + text * (all - no text) + audio * (no text - nothing). Without text
    guidance, speech is dropped under the same prompt.
    """
    if math.isclose(text_scale, 1.0):
        rows = (Row(True, True, audio_scale), Row(True, False, 1.0 - audio_scale))
    else:
        rows = (
            Row(True, True, text_scale),
            Row(False, True, audio_scale - text_scale),
            Row(False, False, 1.0 - audio_scale),
        )
    return tuple(row for row in rows if not math.isclose(row.weight, 0.0, abs_tol=1e-9))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scales of every step of a run; a tuple that is too short goes on with its last value.

    batched: passes with equal shapes share one forward.
    """

    cfg: tuple[float, ...]
    audio_cfg: tuple[float, ...] = (1.0,)
    batched: bool = False

    def scales(self, index: int) -> tuple[float, float]:
        """Text and audio scale of step `index`, counted from 0 in this run."""
        return _at(self.cfg, index), _at(self.audio_cfg, index)

    @property
    def batch(self) -> int:
        """The most passes that may share a forward."""
        if not self.batched:
            return 1
        steps = range(max(len(self.cfg), len(self.audio_cfg)))
        return max(len(guidance_rows(*self.scales(index))) for index in steps)


def per_step(value: float | Sequence[float]) -> tuple[float, ...]:
    """A scale as a tuple: a number stands for every step. Raises ValueError for an empty list."""
    values = (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    if not values:
        raise ValueError("The list of cfg values is empty; give at least one number.")
    return values


def _at(values: tuple[float, ...], index: int) -> float:
    return values[min(index, len(values) - 1)]


@dataclass(frozen=True)
class Conditioning:
    """A payload, and what takes its place in passes without the prompt or without the speech (None: itself)."""

    payload: Payload
    no_text: Payload | None = None
    no_audio: Payload | None = None

    def of(self, row: Row) -> Payload:
        """The payload that this pass reads."""
        if not row.audio and self.no_audio is not None:
            return self.no_audio
        if not row.text and self.no_text is not None:
            return self.no_text
        return self.payload

    def window(self, frames: Sequence[int]) -> Conditioning:
        """The part that belongs to these pixel frames; itself if it is the same in every window."""
        forms = (self.payload, self.no_text, self.no_audio)
        parts = tuple(form if form is None else form.window(frames) for form in forms)
        return self if all(part is form for part, form in zip(parts, forms, strict=True)) else Conditioning(*parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """All forms on `device`, floating-point tensors in `dtype`."""
        moved = (p if p is None else p.to(device, dtype) for p in (self.payload, self.no_text, self.no_audio))
        return Conditioning(*moved)


class KeptConditioning:
    """A conditioning on the device, with what is kept of it over the steps: its batches, and what blocks make of them.

    It lives as long as a run, or as a window that comes again.
    """

    def __init__(self, conditioning: Conditioning, device: torch.device, dtype: torch.dtype) -> None:
        self._forms = conditioning.to(device, dtype)
        self._batches: dict[tuple[tuple[bool, bool], ...], Payload] = {}
        # What is kept has the batch size of the forward that made it.
        self._caches: dict[int, RunCache] = {}

    @property
    def has_audio(self) -> bool:
        """Whether speech can be left out of it."""
        return self._forms.no_audio is not None

    def of(self, row: Row) -> Payload:
        """The payload that this pass reads."""
        return self._forms.of(row)

    def batch(self, rows: Sequence[Row]) -> Payload:
        """One payload for passes that share a forward: the same object every time."""
        key = tuple((row.text, row.audio) for row in rows)
        if key not in self._batches:
            self._batches[key] = _stack([self.of(row) for row in rows])
        return self._batches[key]

    def cache(self, count: int) -> RunCache:
        """Where blocks keep what they make of a batch of so many passes."""
        return self._caches.setdefault(count, RunCache())

    def forget(self) -> None:
        """Compute anew, in the next forward, what blocks make of it."""
        self._caches.clear()


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What one video, or one window of it, is denoised under.

    positive, negative: encoded prompts [tokens, text_dim]. channels: [condition channels, F, H, W], joined to the
    noise. conditionings: a KeptConditioning is one that windows share.
    """

    positive: Tensor
    negative: Tensor | None = None
    channels: Tensor | None = None
    conditionings: tuple[Conditioning | KeptConditioning, ...] = ()


class Denoiser:
    """Velocity of a Wan model under conditions and guidance.

    Everything is moved to `device` once, so that what is kept of it stays valid: make a new Denoiser for every window.
    dtype is that of payloads and texts; latents go in as float32. keeps=False computes everything anew in every step,
    for weights that change within the run (per-step LoRA). texts: where keys and values of the prompts are kept, for
    windows that share prompts; None for a cache of its own. memories: of the step cache, if there is one.
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
        keeps: bool = True,
        texts: RunCache | None = None,
        memories: StepMemories | None = None,
    ) -> None:
        self.model = model
        self.memories = memories
        self.guidance = guidance
        self.riflex_index = riflex_index
        self.device = device
        self._positive = conditions.positive.to(device, dtype)
        self._negative = None if conditions.negative is None else conditions.negative.to(device, dtype)
        self._channels = None if conditions.channels is None else conditions.channels.to(device, torch.float32)
        self._conditionings = tuple(
            c if isinstance(c, KeptConditioning) else KeptConditioning(c, device, dtype)
            for c in conditions.conditionings
        )
        self._has_audio = any(c.has_audio for c in self._conditionings)
        self._keeps = keeps
        self._texts = (RunCache() if texts is None else texts) if keeps else None

    def __call__(self, latents: Tensor, timestep: Tensor, step: Step, index: int) -> Tensor:
        """Guided velocity [C, F, H, W] float32 of latents [C, F, H, W].

        timestep: 0-d, or [F] where latent frames differ; 0..1000. index: position in this run, which picks the scales.
        """
        text_scale, audio_scale = self.guidance.scales(index)
        rows = guidance_rows(text_scale, audio_scale if self._has_audio else 1.0)
        video = latents.to(self.device, torch.float32)
        if self._channels is not None:
            video = torch.cat([video, self._channels])
        velocity = torch.zeros((), device=self.device)
        for group in self._groups(rows):
            predictions = self._predict(video, timestep, step, group)
            for row, prediction in zip(group, predictions, strict=True):
                velocity = velocity + row.weight * prediction.float()
        return velocity

    def report(self) -> None:
        """Log what the step cache left out."""
        if self.memories is not None:
            self.memories.report()

    def forget(self) -> None:
        """Compute anew, in the next forward, what was kept of the conditions."""
        for conditioning in self._conditionings:
            conditioning.forget()
        if self._texts is not None:
            self._texts.clear()
        if self.memories is not None:
            self.memories.clear()

    def _predict(self, video: Tensor, timestep: Tensor, step: Step, rows: Sequence[Row]) -> Tensor:
        count = len(rows)
        inputs = ModelInputs(
            latents=video.expand(count, *video.shape),
            timestep=timestep.to(self.device).expand(count, *timestep.shape),
            text=tuple(self._text(row) for row in rows),
            payloads=tuple(c.batch(rows) for c in self._conditionings),
            step=step,
            riflex_index=self.riflex_index,
            caches=tuple(c.cache(count) for c in self._conditionings) if self._keeps else (),
            texts=self._texts,
            memory=None if self.memories is None else self.memories.of(prediction_name(rows)),
        )
        return self.model(inputs)

    def _text(self, row: Row) -> Tensor:
        if row.text:
            return self._positive
        if self._negative is None:
            raise ValueError(
                "cfg is not 1 but there is no negative prompt: connect text embeds that have one, or set cfg to 1."
            )
        return self._negative

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that share a forward: each its own, or in batched mode all whose payloads have equal shapes."""
        if not self.guidance.batched:
            return [[row] for row in rows]
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            shape = tuple(_shape_of(c.of(row)) for c in self._conditionings)
            groups.setdefault(shape, []).append(row)
        return list(groups.values())


def _stack(payloads: Sequence[Payload]) -> Payload:
    # One payload for all rows is broadcast by its extension; a copy would be computed twice.
    if all(payload is payloads[0] for payload in payloads):
        return payloads[0]
    return payloads[0].stack(payloads[1:])


def _shape_of(payload: Payload) -> tuple[object, ...]:
    return type(payload), *(_sizes(getattr(payload, field.name)) for field in fields(payload))


def _sizes(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(_sizes(part) for part in value) if isinstance(value, tuple) else None
