"""Which frames each window of a long video covers, and settings that fit the VAE."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames, round_frames
from .settings import LoopSettings

log = logging.getLogger("wanvideo")

# SkyReels V3: so often a keyframe stands at the end of a window.
KEYFRAME_REPEATS = 5


class Window(NamedTuple):
    """One window: its number, the absolute frames it samples, and how many of them, from the first, stay."""

    index: int
    frames: range
    kept: int

    @property
    def latents(self) -> tuple[int, ...]:
        """The latent frames of the whole video that stand for these frames."""
        first = self.frames.start // VAE_TIME_STRIDE
        return tuple(range(first, first + latent_frames(len(self.frames))))


def plan_windows(total: int, size: int, motion: int, drop: int = 0) -> list[Window]:
    """Windows of `size` frames that cover `total` frames; neighbours share `motion` frames.

    drop: frames that every window but the last loses at its end.
    """
    windows: list[Window] = []
    start = 0
    while True:
        last = start + size >= total
        windows.append(Window(len(windows), range(start, start + size), size if last else size - drop))
        if last:
            return windows
        start += size - drop - motion


def check_lengths(frame_window_size: int, motion_frame: int, drop_frames: int = 0) -> None:
    """Raises ValueError if windows of these counts, once they fit the VAE, bring nothing new."""
    window, motion, drop = round_frames(frame_window_size), round_frames(motion_frame), drop_frames // 4 * 4
    if motion + drop >= window:
        dropped = f" plus drop_frames ({drop})" if drop else ""
        raise ValueError(f"motion_frame ({motion}){dropped} must be less than frame_window_size ({window}).")


def loop_settings(settings: LoopSettings, kind: str) -> LoopSettings:
    """Settings with counts that fit the VAE and a definite mode. kind: the model's, "infinitetalk" or "multitalk".

    window_frames and motion_frames are rounded down to 4n+1, drop_frames to 4n. Raises ValueError if a window brings
    nothing new, or has no room for its keyframe.
    """
    window, motion = round_frames(settings.window_frames), round_frames(settings.motion_frames)
    drop = settings.drop_frames // 4 * 4
    if (window, motion, drop) != (settings.window_frames, settings.motion_frames, settings.drop_frames):
        log.info(
            "The VAE works in 4n+1 frames: windows of %d frames, %d of them shared, %d dropped.", window, motion, drop
        )
    check_lengths(window, motion, drop)
    if settings.reference_video is not None and motion + KEYFRAME_REPEATS > window:
        raise ValueError(
            f"frame_window_size ({window}) holds motion_frame ({motion}) and the {KEYFRAME_REPEATS} frames of the "
            "reference video no more: make it larger."
        )
    mode = kind if settings.mode == "auto" else settings.mode
    return replace(settings, window_frames=window, motion_frames=motion, drop_frames=drop, mode=mode)
