"""Runs the held-out clips with every setting and gathers the numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import heldout
from .heldout import Case
from .metrics import correlation, cross_talk, lagged, lip_sync, mouth_opening, near_joins, psnr, ssim
from .talker import MOTION_FRAMES, WINDOW_FRAMES, Setting, Talker

log = logging.getLogger("wanvideo")

SEED = 7
CANNOT_RUN = (ValueError, RuntimeError, ImportError)


@dataclass(frozen=True)
class Clip:
    """A made clip: its case, video, seconds it took, and the mouth's opening by frame."""

    case: Case
    video: NDArray[np.float32]
    seconds: float
    mouth: NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Numbers of a setting: means over the clips; reason: why it could not run, then there are none.

    psnr, ssim: to the first row's videos. first_frame_psnr: to the portrait. seconds: for one clip.
    """

    setting: str
    reason: str = ""
    lip_sync: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    vae_psnr: float | None = None
    first_frame_psnr: float | None = None
    seconds: float | None = None
    clips: tuple[Clip, ...] = field(default=(), repr=False)


def make_clip(talker: Talker, case: Case, person: int = 0) -> Clip:
    """Make a case's video."""
    video, seconds = talker.make(case.portrait, case.sounds, prompt=case.prompt, seed=SEED, masks=case.masks)
    return Clip(case, video, seconds, mouth_opening(video, case.boxes[person]))


def measure(setting: Setting, cases: Sequence[Case], reference: Row | None) -> Row:
    """Make all cases with this setting. reference: the row to compare with; None for the first."""
    try:
        talker = Talker(setting)
        clips = tuple(make_clip(talker, case) for case in cases)
    except CANNOT_RUN as error:
        return Row(setting=setting.name, reason=str(error))
    others = clips if reference is None else reference.clips
    row = Row(
        setting=setting.name,
        lip_sync=_mean(lip_sync(clip.mouth, clip.case.levels[0]).correlation for clip in clips),
        psnr=_mean(psnr(a.video, b.video) for a, b in zip(clips, others, strict=True)),
        ssim=_mean(ssim(a.video[::5], b.video[::5]) for a, b in zip(clips, others, strict=True)),
        # The VAE is the same whatever the transformer's setting.
        vae_psnr=_mean(_reconstruction(talker, case) for case in cases) if reference is None else reference.vae_psnr,
        first_frame_psnr=_mean(psnr(clip.video[0], clip.case.portrait.numpy()) for clip in clips),
        seconds=_mean(clip.seconds for clip in clips),
        clips=clips,
    )
    log.info("%s: lip-sync %.3f, PSNR %.1f dB, %.1f s a clip", row.setting, row.lip_sync, row.psnr, row.seconds)
    return row


def _mean(values: object) -> float:
    return float(np.mean(list(values)))


def _reconstruction(talker: Talker, case: Case) -> float:
    truth = case.truth[: (len(case.truth) - 1) // 4 * 4 + 1]
    return psnr(talker.reconstruct(truth), truth)


def extras(row: Row, talker: Talker) -> dict[str, float]:
    """Joins of windows, silence, and two speakers, with the first row's setting.

    joins_near, joins_away: pooled correlation of frames within 8 of joins, and of the others. silence: widest mouth as
    a share of the widest in the talking clips. two_own, two_other: each mouth against its own and the other's voice.
    """
    near, away = _pooled(row.clips)
    widest = max(clip.mouth.max() for clip in row.clips)
    silence = make_clip(talker, heldout.silent(0)).mouth.max() / widest
    own, other = [], []
    for number in range(max(len(row.clips) // 8, 1)):
        case = heldout.pair(number)
        video, _ = talker.make(case.portrait, case.sounds, prompt=case.prompt, seed=SEED, masks=case.masks)
        for person, level in enumerate(case.levels):
            mouth = mouth_opening(video, case.boxes[person])
            own.append(lip_sync(mouth, level).correlation)
            other.append(cross_talk(mouth, level, case.levels[1 - person]))
    return {
        "joins_near": near,
        "joins_away": away,
        "silence": float(silence),
        "two_own": float(np.mean(own)),
        "two_other": float(np.mean(other)),
    }


def _pooled(clips: Sequence[Clip]) -> tuple[float, float]:
    parts: dict[bool, list[tuple[NDArray, NDArray]]] = {True: [], False: []}
    for clip in clips:
        lag = lip_sync(clip.mouth, clip.case.levels[0]).lag
        mouth, level = lagged(clip.mouth, clip.case.levels[0], lag)
        joins = range(WINDOW_FRAMES, len(clip.mouth), WINDOW_FRAMES - MOTION_FRAMES)
        near = near_joins(len(mouth), joins)
        for where, chosen in ((True, near), (False, ~near)):
            parts[where].append((mouth[chosen], level[chosen]))
    return tuple(correlation(*(np.concatenate(side) for side in zip(*parts[w], strict=True))) for w in (True, False))
