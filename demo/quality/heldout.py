"""The clips of the bench: faces and voices that training has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...multitalk.audio import SAMPLE_RATE
from ..faces import Characters, Dice, draw_characters, draw_motions, mouth_boxes, render
from ..sounds import FPS, Sound, envelope, opening, read_sound

UNSEEN = Path(__file__).resolve().parent.parent / "recordings" / "unseen"
FIRST_SEED = 100_000
PLACES = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
MASK_REACH = (1.3, 1.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A portrait [128, 128, 3], the voices, where the mouths are, the true video, and masks for several people."""

    name: str
    portrait: Tensor
    sounds: tuple[Sound, ...]
    boxes: tuple[tuple[float, ...], ...]
    truth: NDArray[np.float32]
    prompt: str
    masks: Tensor | None = None

    @property
    def levels(self) -> tuple[NDArray[np.float64], ...]:
        """Loudness of every voice by frame."""
        return tuple(envelope(sound, len(sound) * FPS // SAMPLE_RATE) for sound in self.sounds)


def voices() -> list[tuple[str, Sound]]:
    """Name and sound of the recordings; neighbours in the list are different voices."""
    paths = sorted(UNSEEN.glob("*.opus"), key=lambda path: (path.stem[-1], path.stem))
    return [(path.stem, read_sound(path)) for path in paths]


def single(number: int) -> Case:
    """One person; `number` chooses face and voice."""
    recordings = voices()
    name, sound = recordings[number % len(recordings)]
    return case(name, (sound,), number)


def pair(number: int) -> Case:
    """Two people who talk at once."""
    recordings = voices()
    (first, a), (second, b) = (recordings[(2 * number + i) % len(recordings)] for i in range(2))
    return case(f"{first} and {second}", (a, b), number)


def silent(number: int, seconds: float = 4.0) -> Case:
    """One person and digital silence."""
    return case("silence", (np.zeros(int(seconds * SAMPLE_RATE)),), number)


def case(name: str, sounds: tuple[Sound, ...], number: int) -> Case:
    """Draw the people for these voices."""
    people = len(sounds)
    dice = Dice(FIRST_SEED + 10 * number + people)
    characters = draw_characters(dice, 1, None if people == 1 else PLACES)
    frames = len(sounds[0]) * FPS // SAMPLE_RATE
    mouths = torch.tensor(np.stack([opening(envelope(sound, frames)) for sound in sounds]))[None].float()
    still = torch.zeros(1, people, 1)
    poses, motions = draw_motions(dice, torch.cat((still, mouths), dim=-1))
    truth = render(characters, poses)[0].movedim(1, -1)
    rest, _ = draw_motions(Dice(FIRST_SEED), still)
    rest.eyes.fill_(1)
    portrait = (render(characters, rest)[0, 0].movedim(0, -1) * 255).round() / 255
    return Case(
        name=name,
        portrait=portrait,
        sounds=sounds,
        boxes=tuple(tuple(box.tolist()) for box in mouth_boxes(characters)[0]),
        truth=truth[1:].numpy(),
        prompt=f"{characters.prompts[0]}, {motions[0]}",
        masks=None if people == 1 else head_masks(characters, portrait.shape[0]),
    )


def head_masks(characters: Characters, side: int) -> Tensor:
    """A box round every head, [P, side, side], 0 or 1."""
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    reach = characters.size[0, :, None] * torch.tensor(MASK_REACH)
    (left, top), (right, bottom) = ((characters.place[0] + sign * reach)[..., None].unbind(1) for sign in (-1, 1))
    across, down = (axis > left) & (axis < right), (axis > top) & (axis < bottom)
    return (across[:, None] & down[..., None]).float()
