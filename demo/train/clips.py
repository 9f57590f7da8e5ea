"""The transformer's training clips: drawn, encoded once by the trained VAE, and kept on the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...wanvideo.images import to_images
from ...wanvideo.modules.clip import ClipVision
from ...wanvideo.modules.vae import MEAN_21, STD_21
from ..faces import Characters, Dice, Poses, draw_characters, draw_motions, mouth_boxes, render, to_device
from . import sizes
from .speech import Bank
from .whole_clip import Z_DIM, WholeClip

log = logging.getLogger("wanvideo")

BATCH = 32
LATENT_SIDE = 16
REST_SHARE = 0.75
SILENT_SHARE = 0.25
AUDIO_WINDOW = torch.arange(-2, 3)
LAYOUTS = tuple(
    torch.tensor([[-x, y], [x, y + dy]]) for x, y, dy in ((0.5, 0.0, 0.0), (0.46, -0.08, 0.1), (0.53, 0.05, -0.1))
)


@dataclass(frozen=True, kw_only=True)
class Clips:
    """N clips of one kind. latents, cond [N, 16, F, 16, 16] normalized, bfloat16; looks: CLIP features of the picture.

    rows [N, P, frames, 5]: rows of the speech bank; voiced [N, P]: others hear and say nothing. weight [N, 16, 16].
    prompt [N]: number of the text. given: latent frames that are known. places [P, 2]: of two people, else None.
    """

    latents: Tensor
    cond: Tensor
    looks: Tensor
    rows: Tensor
    voiced: Tensor
    weight: Tensor
    prompt: Tensor
    given: int
    places: Tensor | None


class Texts:
    """Prompts by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, prompt: str) -> int:
        """The same number for the same prompt."""
        return self.numbers.setdefault(prompt, len(self.numbers))


class ClipMaker:
    """Draws and encodes clips."""

    def __init__(self, vae: WholeClip, bank: Bank, clip_vision: ClipVision) -> None:
        self.vae, self.bank, self.clip_vision = vae, bank, clip_vision
        self.texts = Texts()
        self.device = bank.mouth.device
        self.dice = Dice(2)
        self.statistics = tuple(torch.tensor(s, device=self.device).view(-1, 1, 1, 1) for s in (MEAN_21, STD_21))

    def make(self, count: int, *, goes_on: bool, places: Tensor | None = None) -> Clips:
        """`count` clips, rounded up to whole batches, that start with their picture or go on from known frames."""
        parts = [self._batch(goes_on, places) for _ in range(-(-count // BATCH))]
        names = ("latents", "cond", "looks", "rows", "voiced", "weight", "prompt")
        joined = {name: torch.cat([part[name] for part in parts]) for name in names}
        given = (sizes.MOTION_FRAMES - 1) // 4 + 1 if goes_on else 1
        log.info("%d clips are drawn and encoded.", len(joined["latents"]))
        return Clips(**joined, given=given, places=places)

    @torch.no_grad()
    def _batch(self, goes_on: bool, places: Tensor | None) -> dict[str, Tensor]:
        dice = self.dice
        people = 1 if places is None else places.shape[0]
        rows, voiced, mouth = self._speech(people)
        characters = draw_characters(dice, BATCH, places)
        poses, motions = draw_motions(dice, mouth.cpu())
        if goes_on:
            picture = self._pictures(characters, replace(_at_rest(poses), mouth=torch.zeros(BATCH, people, 1)))
        else:
            poses.mouth[:, :, 0] *= (dice.between(0, 1, BATCH, people) > REST_SHARE).float()
            picture = None
        clips = self._pictures(characters, poses)
        picture = clips[:, :, :1] if picture is None else picture
        grey = torch.zeros_like(clips[:, :, 1:])
        prompts = [f"{p}, {m}" for p, m in zip(characters.prompts, motions, strict=True)]
        return {
            "latents": self._encode(clips),
            "cond": self._encode(torch.cat((picture, grey), dim=2)),
            "looks": self.clip_vision.encode(to_images(picture[:, :, 0].movedim(1, 0))).to(self.device, torch.bfloat16),
            "rows": rows,
            "voiced": voiced,
            "weight": _weights(characters).to(self.device),
            "prompt": torch.tensor([self.texts.number(prompt) for prompt in prompts], device=self.device),
        }

    def _speech(self, people: int) -> tuple[Tensor, Tensor, Tensor]:
        dice, bank, frames = self.dice, self.bank, sizes.WINDOW_FRAMES
        take = dice.choice(len(bank.length), BATCH, people).to(self.device)
        room = (bank.length[take] - frames).clamp(min=0)
        start = (dice.between(0, 1, BATCH, people).to(self.device) * (room + 1)).long()
        # The first two frames' windows reach before the clip; a clip at a take's start repeats its first frame.
        offsets = (torch.arange(frames)[:, None] + AUDIO_WINDOW).to(self.device)
        voiced = (dice.between(0, 1, BATCH, people) > (SILENT_SHARE if people > 1 else 0.0)).to(self.device)
        mouth = bank.mouth[bank.frames(take, start, torch.arange(frames, device=self.device))] * voiced[..., None]
        return bank.frames(take, start, offsets), voiced, mouth

    def _pictures(self, characters: Characters, poses: Poses) -> Tensor:
        drawn = render(characters.to(self.device), to_device(poses, self.device))
        # 8 bits, as a file holds them.
        return (drawn * 255).round().movedim(2, 1) / 127.5 - 1

    def _encode(self, video: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            moments = self.vae.encode(video.contiguous(memory_format=torch.channels_last_3d))
        mean, deviation = self.statistics
        return ((moments[:, :Z_DIM].float() - mean) / deviation).to(torch.bfloat16).contiguous()


def _at_rest(poses: Poses) -> Poses:
    """The movements' first frame alone, with the head in its place."""
    first = {name: getattr(poses, name)[:, :, :1] for name in ("tilt", "zoom", "gaze", "mouth")}
    return Poses(shift=torch.zeros_like(poses.shift[:, :, :1]), eyes=torch.ones_like(first["tilt"]), **first)


def _weights(characters: Characters) -> Tensor:
    """1 where a latent cell lies near a mouth, else 0: [B, 16, 16]."""
    axis = (torch.arange(LATENT_SIDE) + 0.5) * 2 / LATENT_SIDE - 1
    half = 1 / LATENT_SIDE
    left, top, right, bottom = mouth_boxes(characters)[..., None].unbind(-2)
    across = (axis + half > left) & (axis - half < right)
    down = (axis + half > top) & (axis - half < bottom)
    return (across[..., None, :] & down[..., None]).any(1).float()
