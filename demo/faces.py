"""Drawn talking faces: random characters, their movements, and pictures of them as tensors.

Everything is drawn from signed distances with soft edges, many frames at once, on any device.
Shapes: B clips, T frames, P people a clip, H, W pixels. Lengths are in half picture sides, so a picture spans -1..1;
inside a head they are in half head widths. Colours are RGB in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

SIZE = 128
FPS = 25
# Mouth, in half head widths: how high a wide open one is, and how much of the lips' width opens.
MOUTH_HEIGHT, MOUTH_WIDTH = 0.34, 0.8
MOUTH_INSIDE = (0.13, 0.03, 0.05)
WHITE, PUPIL = (0.97, 0.97, 0.96), (0.07, 0.06, 0.07)
SKINS = ((0.98, 0.84, 0.72), (0.93, 0.75, 0.60), (0.85, 0.65, 0.48), (0.74, 0.53, 0.38), (0.64, 0.46, 0.34))
HAIRS = {
    "black": (0.10, 0.08, 0.09), "brown": (0.32, 0.20, 0.12), "blond": (0.86, 0.72, 0.40), "red": (0.66, 0.27, 0.12),
    "grey": (0.62, 0.62, 0.63),
}  # fmt: skip
WALLS = {
    "blue": (0.38, 0.55, 0.75), "green": (0.42, 0.65, 0.48), "grey": (0.60, 0.61, 0.63), "yellow": (0.90, 0.82, 0.52),
    "violet": (0.60, 0.48, 0.70), "white": (0.92, 0.91, 0.89), "dark": (0.20, 0.22, 0.27),
}  # fmt: skip
MOTIONS = ("keeps still", "sways", "nods")
# A mouth's box reaches this far above it, below it when wide open, and to the sides in lip widths.
BOX_ABOVE, BOX_BELOW, BOX_WIDTH = 0.22, 0.2, 1.2
BLINK_FRAMES, BLINK_SECONDS = 5.0, 3.0
JITTER = 0.05


@dataclass(frozen=True, kw_only=True)
class Characters:
    """What stays the same in a clip: [B, P, ...] but the background's [B, ...]; the text that describes it.

    place, size: a head's centre and half width. looks: half head height, eye distance / height / size, brow height,
    nose size, mouth height / width, lip height. hair: short, long, bald, round as weights. traits: glasses, ears.
    """

    place: Tensor
    size: Tensor
    looks: Tensor
    skin: Tensor
    hair_color: Tensor
    hair: Tensor
    lips: Tensor
    iris: Tensor
    shirt: Tensor
    traits: Tensor
    wall: Tensor
    prompts: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


@dataclass(frozen=True, kw_only=True)
class Poses:
    """What moves, [B, P, T]: shift [..., 2], tilt in radians, zoom, eyes open 0..1, gaze, mouth 0..1."""

    shift: Tensor
    tilt: Tensor
    zoom: Tensor
    eyes: Tensor
    gaze: Tensor
    mouth: Tensor


class Dice:
    """Random numbers from one generator on the CPU, so that a seed draws the same face everywhere."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform."""
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def choice(self, count: int, *shape: int) -> Tensor:
        """Integers below `count`."""
        return torch.randint(count, shape, generator=self.generator)


def draw_characters(dice: Dice, count: int, places: Tensor | None = None) -> Characters:
    """Random characters: one each in the middle, or at the `places` [P, 2] of several smaller heads."""
    people = 1 if places is None else places.shape[0]
    shape = (count, people)
    middle = torch.tensor([[0.0, -0.06]]) if places is None else places
    sizes = (0.42, 0.52) if places is None else (0.26, 0.31)
    wander = 0.08 if places is None else 0.03
    hairs, walls = torch.tensor(list(HAIRS.values())), torch.tensor(list(WALLS.values()))
    hair, wall, style = dice.choice(len(hairs), *shape), dice.choice(len(walls), count), dice.choice(4, *shape)
    ranges = (
        (1.20, 1.38), (0.38, 0.46), (0.15, 0.30), (0.17, 0.22), (0.24, 0.31),
        (0.10, 0.16), (0.58, 0.68), (0.32, 0.42), (0.07, 0.10),
    )  # fmt: skip
    skin = torch.tensor(SKINS)[dice.choice(len(SKINS), *shape)] + dice.between(-JITTER, JITTER, *shape, 3)
    backdrop = walls[wall][:, None] + dice.between(-JITTER, JITTER, count, 2, 3) + dice.between(-0.1, 0.1, count, 2, 1)
    return Characters(
        place=middle + dice.between(-wander, wander, *shape, 2),
        size=dice.between(*sizes, *shape),
        looks=torch.stack([dice.between(*r, *shape) for r in ranges], dim=-1),
        skin=skin.clamp(0, 1),
        hair_color=(hairs[hair] + dice.between(-JITTER, JITTER, *shape, 3)).clamp(0, 1),
        hair=torch.nn.functional.one_hot(style, 4).float(),
        lips=(skin * torch.tensor([0.86, 0.52, 0.55]) + dice.between(-0.05, 0.08, *shape, 1)).clamp(0, 1),
        iris=torch.stack((dice.between(0.15, 0.45, *shape), dice.between(0.2, 0.5, *shape),
                          dice.between(0.15, 0.6, *shape)), dim=-1),
        shirt=dice.between(0.1, 0.95, *shape, 3),
        traits=torch.stack((dice.between(0, 1, *shape) < 0.2, dice.between(0, 1, *shape) < 0.6), dim=-1).float(),
        wall=backdrop.clamp(0, 1),
        prompts=tuple(_prompt(h, w) for h, w in zip(hair.tolist(), wall.tolist(), strict=True)),
    )  # fmt: skip


def _prompt(hairs: list[int], wall: int) -> str:
    people = " and ".join(f"a person with {list(HAIRS)[hair]} hair" for hair in hairs)
    return f"{people} in front of a {list(WALLS)[wall]} wall"


def draw_motions(dice: Dice, mouth: Tensor) -> tuple[Poses, tuple[str, ...]]:
    """Random slow movements and blinks for mouths [B, P, T] in 0..1, and the words for them."""
    count, people, frames = mouth.shape
    time = torch.arange(frames) / FPS
    kind = dice.choice(len(MOTIONS), count)

    def wave(low: float, high: float) -> Tensor:
        phase = dice.between(0, 2 * math.pi, count, people, 1)
        return torch.sin(2 * math.pi * dice.between(low, high, count, people, 1) * time + phase)

    def strength(still: float, moving: float, chosen: int) -> Tensor:
        share = torch.where(kind == chosen, moving, still)[:, None, None]
        return share * dice.between(0.5, 1.0, count, people, 1)

    period = dice.between(BLINK_SECONDS * 0.6, BLINK_SECONDS * 1.5, count, people, 1) * FPS
    phase = (torch.arange(frames) + dice.between(0, 1, count, people, 1) * period) % period
    shut = (1 - (phase - BLINK_FRAMES / 2).abs() / (BLINK_FRAMES / 2)).clamp(min=0)
    poses = Poses(
        shift=torch.stack((wave(0.2, 0.5) * strength(0.008, 0.07, 1), wave(0.3, 0.7) * strength(0.008, 0.05, 2)), -1),
        tilt=wave(0.1, 0.4) * strength(0.015, 0.07, 1),
        zoom=1 + 0.02 * wave(0.1, 0.3),
        eyes=1 - (1.6 * shut).clamp(max=1),
        gaze=0.25 * wave(0.05, 0.3),
        mouth=mouth,
    )
    return poses, tuple(MOTIONS[k] for k in kind.tolist())


def to_device(poses: Poses, device: torch.device | str) -> Poses:
    """The same movements on another device."""
    return Poses(**{f.name: getattr(poses, f.name).to(device) for f in fields(poses)})


def render(characters: Characters, poses: Poses, size: int = SIZE) -> Tensor:
    """Pictures [B, T, 3, size, size] in 0..1."""
    axis = (torch.arange(size, device=poses.mouth.device) + 0.5) * 2 / size - 1
    y, x = axis[:, None], axis[None, :]
    blend = (y + 1)[None, None] / 2
    top, bottom = (_color(characters.wall[:, i], 1) for i in range(2))
    canvas = (top + (bottom - top) * blend[:, :, None]).expand(-1, poses.mouth.shape[2], -1, -1, size)
    for person in range(poses.mouth.shape[1]):
        canvas = _Head(characters, poses, person, (x, y), 2 / size).paint(canvas)
    return canvas


def mouth_boxes(characters: Characters) -> Tensor:
    """Where mouths can be, [B, P, 4]: left, top, right, bottom in -1..1, with room for the head's movements."""
    mouth, width, size = characters.looks[..., 6], characters.looks[..., 7], characters.size
    x, y = characters.place.unbind(-1)
    above, below = (mouth - BOX_ABOVE) * size, (mouth + MOUTH_HEIGHT + BOX_BELOW) * size
    return torch.stack((x - BOX_WIDTH * width * size, y + above, x + BOX_WIDTH * width * size, y + below), dim=-1)


def _color(rgb: Tensor, frames: int) -> Tensor:
    """[B, 3] -> [B, T or 1, 3, 1, 1]."""
    return rgb[:, None, :, None, None].expand(-1, frames, -1, 1, 1)


def _ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Signed distance to an ellipse at the origin, first order: exact on its edge."""
    u, v = x / rx, y / ry
    k = (u * u + v * v + 1e-6).sqrt()
    gradient = ((u / rx) ** 2 + (v / ry) ** 2 + 1e-6).sqrt()
    return k * (k - 1) / gradient


class _Head:
    """Paints one person. All fields broadcast as [B, T, H, W]."""

    def __init__(
        self, characters: Characters, poses: Poses, person: int, axes: tuple[Tensor, Tensor], pixel: float
    ) -> None:
        self.characters, self.person = characters, person
        at = {f.name: getattr(poses, f.name)[:, person] for f in fields(poses)}
        self.poses = {k: v[:, :, None, None] for k, v in at.items() if k != "shift"}
        place, size = characters.place[:, person], characters.size[:, person]
        centre = place[:, None] + at["shift"]
        self.scale = size[:, None, None, None] * self.poses["zoom"]
        self.pixel = pixel
        dx, dy = axes[0] - centre[..., 0, None, None], axes[1] - centre[..., 1, None, None]
        cos, sin = self.poses["tilt"].cos(), self.poses["tilt"].sin()
        self.x, self.y = (cos * dx + sin * dy) / self.scale, (cos * dy - sin * dx) / self.scale
        body = size[:, None, None, None]
        self.body_x = (axes[0] - place[:, 0, None, None, None] - 0.3 * at["shift"][..., 0, None, None]) / body
        self.body_y = (axes[1] - place[:, 1, None, None, None]) / body

    def paint(self, canvas: Tensor) -> Tensor:
        """The picture with this person in front."""
        looks = [self.characters.looks[:, self.person, i, None, None, None] for i in range(9)]
        height = looks[0]
        for color, distance, weight in (*self._behind(height), *self._face(height), *self._features(looks)):
            alpha = (0.5 - distance * self.scale / self.pixel).clamp(0, 1) * weight
            canvas = canvas + alpha[:, :, None] * (color - canvas)
        return canvas

    def _of(self, name: str) -> Tensor:
        return _color(getattr(self.characters, name)[:, self.person], 1)

    def _trait(self, name: str, index: int) -> Tensor:
        return getattr(self.characters, name)[:, self.person, index, None, None, None]

    def _behind(self, height: Tensor) -> list[tuple]:
        hair, skin = self._of("hair_color"), self._of("skin")
        long, afro = self._trait("hair", 1), self._trait("hair", 3)
        neck = torch.maximum(self.body_x.abs() - 0.38, 0.6 - self.body_y)
        return [
            (hair, _ellipse(self.x, self.y - 0.25, 1.22, height * 1.12), long),
            (self._of("shirt"), _ellipse(self.body_x, self.body_y - height - 1.15, 1.75, 1.05), 1.0),
            (skin * 0.88, torch.maximum(neck, self.body_y - height - 0.25), 1.0),
            (hair, _ellipse(self.x, self.y + 0.45, 1.25, 1.2), afro),
        ]

    def _face(self, height: Tensor) -> list[tuple]:
        hair, skin = self._of("hair_color"), self._of("skin")
        ears = _ellipse(self.x.abs() - 1.0, self.y, 0.14, 0.24)
        fringe = torch.maximum(_ellipse(self.x, self.y + 0.08, 1.06, height), self.y + height * 0.52 - 0.12 * self.x**2)
        return [
            (skin * 0.94, ears, self._trait("traits", 1)),
            (skin, _ellipse(self.x, self.y, 1.0, height), 1.0),
            (hair, fringe, 1 - self._trait("hair", 2)),
        ]

    def _features(self, looks: list[Tensor]) -> list[tuple]:
        _, spread, level, eye, brow, nose, mouth, width, lip = looks
        skin, lips = self._of("skin"), self._of("lips")
        side, eye_y = self.x.abs() - spread, self.y + level
        gaze_x = self.x - torch.where(self.x > 0, spread, -spread) - self.poses["gaze"] * eye
        lid = eye * 0.62 * self.poses["eyes"].clamp(min=0.12)
        white = _ellipse(side, eye_y, eye, lid)
        iris, pupil = (_ellipse(gaze_x, eye_y, eye * share, eye * share) for share in (0.5, 0.24))
        brow_y = eye_y + brow + 0.08 * (1 - (side / 0.25) ** 2).clamp(min=0) - 0.03
        glasses = _ellipse(side, eye_y, eye * 1.45, eye * 1.25).abs() - 0.025
        opened = self.poses["mouth"] * MOUTH_HEIGHT
        y = self.y - mouth - opened / 2
        inside = _ellipse(self.x, y, width * MOUTH_WIDTH, opened.clamp(min=1e-3) / 2 + 1e-3)
        white_color, pupil_color, dark = (torch.tensor(c, device=self.x.device) for c in (WHITE, PUPIL, MOUTH_INSIDE))
        return [
            (_color(white_color[None], 1), white, 1.0),
            (self._of("iris"), torch.maximum(iris, white), 1.0),
            (_color(pupil_color[None], 1), torch.maximum(pupil, white), 1.0),
            (self._of("hair_color") * 0.8, torch.maximum(brow_y.abs() - 0.045, side.abs() - 0.24), 1.0),
            (_color(pupil_color[None], 1), glasses, self._trait("traits", 0)),
            (skin * 0.82, _ellipse(self.x, self.y - 0.16, nose * 0.8, nose * 1.3), 1.0),
            (lips, _ellipse(self.x, y, width, lip + opened / 2), 1.0),
            (lips * 0.6, torch.maximum(y.abs() - 0.012, self.x.abs() - width * 0.8), 1.0),
            (_color(dark[None], 1), inside, (opened / 0.04).clamp(max=1)),
        ]
