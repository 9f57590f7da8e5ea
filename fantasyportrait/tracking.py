"""Landmarks of one face through a video: tracks that follow what they saw, smoothed over time.

Source: Fantasy-AMAP/fantasy-portrait (camer, det_landmarks); the smoothing is the 1 euro filter (Casiez et al. 2012),
its cutoffs set by how far each part of the face moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .faces import Array, FaceModels, Picture, eye_angle, overlap

log = logging.getLogger("wanvideo")

LEAST_SCORE = 1e-4
# Smaller faces are not followed.
LEAST_SIDE = 96
MOST_OVERLAP = 0.12
CHEEKS = (0, 32)


class Part(NamedTuple):
    """Landmarks that are smoothed together. measured: those whose motion counts. Motion is a share of the face's size:
    from none to `slow` the strength of the filter goes up to `at_slow`, from there to `fast` up to `at_fast`.
    """

    places: slice
    measured: slice
    slow: float
    at_slow: float
    at_fast: float
    fast: float = 0.02

    def strength(self, motion: float) -> float:
        """How fast the landmarks follow: 0 not at all."""
        return float(np.interp(motion, (0, self.slow, self.fast), (0, self.at_slow, self.at_fast)))


def _part(first: int, end: int, slow: float, at_slow: float, at_fast: float, measured: slice | None = None) -> Part:
    places = slice(first, end)
    return Part(places, measured or places, slow, at_slow, at_fast)


PARTS = (
    _part(0, 33, 0.005, 0.05, 0.3, measured=slice(9, 24)),  # outline, measured at the chin
    _part(33, 48, 0.003, 0.03, 0.7),  # nose
    _part(48, 74, 0.003, 0.02, 0.5),  # brows
    _part(74, 96, 0.003, 0.03, 0.7),  # left eye
    _part(96, 118, 0.003, 0.03, 0.7),  # right eye
    _part(118, 182, 0.003, 0.05, 0.7),  # mouth
    _part(182, 202, 0.003, 0.03, 0.7),  # left pupil
    _part(202, 222, 0.003, 0.03, 0.7),  # right pupil
)


def _share(period: float, cutoff: float | Array) -> float | Array:
    """The share of the new value in exponential smoothing."""
    rate = 2 * np.pi * cutoff * period
    return rate / (rate + 1)


@dataclass
class Smoother:
    """Smoothed landmarks of one face, and their speeds."""

    points: Array | None = None
    speeds: list[Array | float] = field(default_factory=lambda: [0.0] * len(PARTS))

    def __call__(self, points: Array, size: float) -> Array:
        """The landmarks [222, 2] as they are shown. size: of the face, in pixels."""
        if self.points is None:
            self.points = points
            return points
        motion = np.linalg.norm(points - self.points, axis=1) / size
        smooth = points.copy()
        for number, part in enumerate(PARTS):
            strength = part.strength(float(motion[part.measured].mean()))
            smooth[part.places] = self._filtered(number, points[part.places], self.points[part.places], strength)
        self.points = smooth
        return smooth

    def _filtered(self, number: int, new: Array, old: Array, strength: float) -> Array:
        if strength == 0:
            # What does not move at all stays; there is no speed without time.
            return old
        share = _share(strength, 1.0)
        speed = share * (new - old) / strength + (1 - share) * self.speeds[number]
        self.speeds[number] = speed
        share = _share(strength, 1.0 + strength * np.abs(speed))
        return share * new + (1 - share) * old


@dataclass
class Track:
    """One face that is followed. box: around it; size: its own, in pixels; points: as they were shown last."""

    box: Array
    size: float
    smoother: Smoother = field(default_factory=Smoother)
    points: Array | None = None

    @classmethod
    def of(cls, box: Array) -> Track:
        """A new one."""
        return cls(np.asarray(box, dtype=np.float64), float(np.hypot(box[2] - box[0], box[3] - box[1])))

    @property
    def area(self) -> float:
        """Of its box."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))

    def follow(self, models: FaceModels, picture: Picture) -> bool:
        """See the next picture; whether it is still a face that can be followed."""
        if self.points is None:
            face = models.landmarks(picture, self.box.reshape(2, 2))
        else:
            face = models.landmarks(picture, self.points, eye_angle(self.points))
        if face.score < LEAST_SCORE:
            return False
        self.points = self.smoother(face.points, self.size)
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        self.box = np.concatenate((low, high))
        # A face that is turned away is narrower than it is.
        turned = abs(face.pitch) + 0.6 * abs(face.yaw)
        self.size = float(np.linalg.norm(self.points[CHEEKS[0]] - self.points[CHEEKS[1]])) * (1 + turned / 18)
        return bool((high - low).min() >= LEAST_SIDE)


class Tracker:
    """All faces of a video, picture by picture."""

    def __init__(self, models: FaceModels) -> None:
        self.models = models
        self.tracks: list[Track] = []

    def largest(self, picture: Picture, first_box: Array | None = None) -> Track | None:
        """The largest face of the next picture. first_box: where it is, while none is followed."""
        boxes = [first_box] if not self.tracks and first_box is not None else self.models.boxes(picture)
        tracks = [*self.tracks, *(Track.of(box) for box in boxes)]
        self.tracks = _apart([track for track in tracks if track.follow(self.models, picture)])
        return max(self.tracks, key=lambda track: track.area, default=None)


def _apart(tracks: Sequence[Track]) -> list[Track]:
    """Of tracks that lie over each other, the larger, and of equal ones the first."""
    chosen: list[Track] = []
    for track in sorted(tracks, key=lambda track: -track.area):
        if all(overlap(track.box, other.box) <= MOST_OVERLAP for other in chosen):
            chosen.append(track)
    return [track for track in tracks if any(track is other for other in chosen)]


def landmarks_of(
    models: FaceModels, pictures: Sequence[Picture], done: Callable[[], None]
) -> tuple[list[Array], list[Array]]:
    """Boxes and landmarks [222, 2] of the largest face in every picture. done: called after each of two passes' steps.

    The second pass begins where the first found the face. Pictures without one have what the one before has, at the
    start what the first has. Raises ValueError where there is no face at all.
    """
    boxes: list[Array | None] = []
    tracker = Tracker(models)
    for picture in pictures:
        track = tracker.largest(picture)
        boxes.append(None if track is None else track.box)
        done()
    points: list[Array | None] = []
    tracker = Tracker(models)
    for picture, box in zip(pictures, boxes, strict=True):
        track = None if box is None else tracker.largest(picture, box)
        points.append(None if track is None else track.points)
        done()
    missing = sum(value is None for value in points)
    if missing == len(points):
        raise ValueError(
            f"No face of at least {LEAST_SIDE} pixels was found in any of the {len(points)} images: give pictures in "
            "which one is larger."
        )
    if missing:
        log.warning("%d of %d images have no face; the nearest one before them stands in.", missing, len(points))
    return _held(boxes), _held(points)


def _held(values: Sequence[Array | None]) -> list[Array]:
    """Each gap filled by what is before it, at the start by the first value."""
    last = next(value for value in values if value is not None)
    filled = []
    for value in values:
        last = last if value is None else value
        filled.append(last)
    return filled
