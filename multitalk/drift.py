"""A warning of files with which long talking videos drift.

Source: MeiGen-AI/InfiniteTalk's README (FusionX and long videos).
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ..wanvideo.advice import named

if TYPE_CHECKING:
    from ..wanvideo.loading import WanVideoModel

log = logging.getLogger("wanvideo")

DRIFTING = re.compile(r"fusion_?i?x", re.IGNORECASE)
# A minute at the 25 frames a second of talking models.
LONG = 1500


def warn_of_drift(model: WanVideoModel, frames: int) -> None:
    """Log that colours and faces of a video of so many frames drift with this model or LoRA."""
    name = named(model, DRIFTING)
    if name is not None and frames > LONG:
        log.warning(
            "%s lets colours and the face drift in talking videos of more than a minute: prefer a lightx2v LoRA, or "
            "set colormatch in WanVideoImageToVideoMultiTalk.",
            name,
        )
