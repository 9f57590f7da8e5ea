"""Who speaks where: each video token is tied to a speaker by how much it attends to that speaker in the first frame.

Source: MeiGen-AI/MultiTalk (label rotary position embedding, L-RoPE). Every speaker owns a range of rotary positions;
its audio keys sit at the centre of the range, and a video token that belongs to it is placed inside the range.
Shapes: B batch, L tokens, S tokens of the first frame, P speakers, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.class_attention import class_attention
from ..wanvideo.config import ROPE_THETA
from ..wanvideo.shard import WHOLE, Shard

CLASS_RANGE = 24
CLASS_INTERVAL = 4
MAX_SPEAKERS = CLASS_RANGE // CLASS_INTERVAL
BACKGROUND_POSITION = CLASS_RANGE // 2
FACE_MARGIN = 0.1
TINY = 1e-8


def speaker_starts(speakers: int, device: torch.device) -> Tensor:
    """Where each speaker's range of rotary positions begins: two sit at the ends of the class range, more follow each
    other. Computed on the device, so that no forward waits for a copy."""
    step = CLASS_RANGE - CLASS_INTERVAL if speakers == 2 else CLASS_INTERVAL
    return torch.arange(speakers, device=device, dtype=torch.float32) * step


def check_masks(masks: Tensor | None, speakers: Sequence[str]) -> None:
    """Whether masks [P or P + 1, height, width] fit the speakers, in order; the one more is the background.

    Raises ValueError that names the speaker without a mask, or the mask without a speaker.
    """
    count = len(speakers)
    if not 1 <= count <= MAX_SPEAKERS:
        raise ValueError(f"The model tells 1 to {MAX_SPEAKERS} speakers apart, not {count}.")
    if masks is None:
        if count > 2:
            raise ValueError(
                f"{count} speakers need ref_target_masks: one mask each, in the order {', '.join(speakers)}."
            )
        return
    if count == 1:
        return
    if masks.shape[0] < count:
        missing = ", ".join(speakers[masks.shape[0] :])
        raise ValueError(
            f"There are {count} speakers but {masks.shape[0]} masks in ref_target_masks: the mask of {missing} is "
            "missing."
        )
    if masks.shape[0] > count + 1:
        raise ValueError(
            f"There are {count} speakers but {masks.shape[0]} masks in ref_target_masks: give one mask for each "
            f"speaker and optionally one for the background; masks from number {count + 2} on have no audio."
        )


def check_painted(masks: Tensor | None, speakers: Sequence[str]) -> None:
    """Raises ValueError that names a speaker whose mask is empty. It reads the masks: not for every forward."""
    for speaker, mask in zip(speakers, () if masks is None or len(speakers) == 1 else masks, strict=False):
        if not bool((mask > 0).any()):
            raise ValueError(f"The mask of {speaker} in ref_target_masks is empty: paint where this speaker is.")


def token_masks(masks: Tensor | None, speakers: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Masks of the speakers and the background on the token grid: [P + 1, S], 0 or 1, float32.

    masks [P or P + 1, height, width] in any size, of which each that is painted has a token; a missing background is
    what no speaker covers. None is allowed for two speakers, who then stand in the left and the right half. Raises
    ValueError where the counts do not fit.
    """
    _, height, width = grid
    check_masks(masks, [f"speaker {number + 1}" for number in range(speakers)])
    masks = half_masks(height, width, device) if masks is None else masks
    painted = masks[None].float().to(device)
    on_grid = F.interpolate(painted, size=(height, width), mode="nearest")[0] > 0
    # A face may be smaller than a token, and lie between the places that are looked at: its speaker would be mute.
    touched = F.adaptive_max_pool2d(painted, (height, width))[0] > 0
    on_grid = torch.where(on_grid.flatten(1).any(dim=1)[:, None, None], on_grid, touched)
    if masks.shape[0] == speakers:
        on_grid = torch.cat((on_grid, ~on_grid.any(dim=0, keepdim=True)))
    return on_grid.flatten(1).float()


def half_masks(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Masks [2, height, width] of two speakers who stand in the left and the right half."""
    masks = torch.zeros(2, height, width, device=device)
    top, bottom = int(height * FACE_MARGIN), max(int(height * (1 - FACE_MARGIN)), 1)
    for side in range(2):
        start = side * (width // 2)
        left = start + int(width // 2 * FACE_MARGIN)
        right = max(start + int(width // 2 * (1 - FACE_MARGIN)), left + 1)
        masks[side, top:bottom, left:right].fill_(1)
    return masks


def speaker_map(q: Tensor, k: Tensor, masks: Tensor) -> Tensor:
    """Mean attention of every token to each class of the first frame: [B, L, P + 1] float32.

    q, k [B, L, H, D] post-RoPE; masks [P + 1, S]. Attention to a class is divided by its size afterwards: 0 and 1 are
    exact in 16 bits, and a class's weight is not.
    """
    return class_attention(q, k[:, : masks.shape[1]], masks) / (masks.sum(dim=1) + TINY)


def query_positions(scores: Tensor, shard: Shard = WHOLE) -> Tensor:
    """Rotary position of every token, [B, L], from scores [B, L, P + 1] of this part of the video.

    The strongest class decides; inside a speaker's range the score, scaled to its extremes, is the position.
    """
    speakers = scores.shape[-1] - 1
    low, high = shard.extremes(scores)
    share = (scores - low) / (high - low + TINY)
    inside = share[..., :speakers] * CLASS_INTERVAL + speaker_starts(speakers, scores.device)
    background = torch.full_like(scores[..., :1], BACKGROUND_POSITION)
    choices = torch.cat((inside, background), dim=-1)
    return choices.gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1)


def key_positions(speakers: int, tokens: int, device: torch.device) -> Tensor:
    """Rotary positions of a frame's audio tokens, [P * tokens]: each speaker's at the centre of its range."""
    centres = speaker_starts(speakers, device) + CLASS_INTERVAL / 2
    return centres.repeat_interleave(tokens)


def rotation(positions: Tensor, head_dim: int) -> Tensor:
    """Cosine and sine of 1-D rotary positions [...]: [..., D / 2, 2] float32, for `apply_rope`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * ROPE_THETA**-exponents
    return torch.stack((angles.cos(), angles.sin()), dim=-1)
