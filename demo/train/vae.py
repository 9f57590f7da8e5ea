"""Trains the demo's VAE on drawn clips, short and long."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wanvideo.modules.vae import MEAN_21, STD_21, build_vae, channels_last
from ..faces import SIZE, Characters, Dice, draw_characters, draw_motions, mouth_boxes, render, to_device
from . import sizes
from .gradients import Gradients
from .speech import Take
from .trainer import Trainer
from .whole_clip import Z_DIM, WholeClip

log = logging.getLogger("wanvideo")

RATE = 2e-3


class Form(NamedTuple):
    """Clips of a batch and their frames; how many are drawn for the whole training; share of the batches."""

    count: int
    frames: int
    kept: int
    share: float


# The causal convolutions reach back many frames: a network that saw only short clips loses colour in long ones.
# Small batches, more steps: after 60 s on an H100 three clips of 17 frames a step give 24.4 dB, six or twelve 22.
FORMS = (Form(3, 17, 6000, 0.55), Form(2, 33, 2000, 0.3), Form(1, 97, 400, 0.15))
DRAWN_FRAMES = 1632
PAIR_SHARE = 0.3
MOUTH_WEIGHT = 6.0
# The first frame, which is coded on its own, counts as one frame in six whatever the clip's length.
FIRST_SHARE = 1 / 6
KL_WEIGHT = 3e-4
SHAPE_SHARE = 0.15
PLACES = torch.tensor([[-0.5, -0.02], [0.5, -0.02]])
STATISTICS_CLIPS, STATISTICS_FRAMES = 8, 33


class Drawn(NamedTuple):
    """Clips kept as a file holds them: pixels [N, T, 128, 128, 3], uint8, and weights of pixels [N, 128, 128]."""

    pixels: Tensor
    weights: Tensor

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Random ones: clips [count, 3, T, 128, 128] in -1..1, and weights [count, 1, 1, 128, 128]."""
        chosen = torch.randint(len(self.pixels), (count,), device=self.pixels.device)
        clips = self.pixels[chosen].movedim(-1, 1).float() / 127.5 - 1
        return clips, self.weights[chosen][:, None, None]


class Pictures:
    """Draws clips."""

    def __init__(self, takes: list[Take], device: torch.device, seed: int = 0) -> None:
        self.mouths = torch.cat([torch.from_numpy(take.mouth).float() for take in takes])
        self.device, self.dice = device, Dice(seed)

    def keep(self, count: int, frames: int) -> Drawn:
        """`count` clips of so many frames, of one person or two. Drawn many at a time: drawing is bound by the host."""
        pixels = torch.empty(count, frames, SIZE, SIZE, 3, dtype=torch.uint8, device=self.device)
        weights = torch.empty(count, SIZE, SIZE, device=self.device)
        many = max(DRAWN_FRAMES // frames, 1)
        for start in range(0, count, many):
            some = slice(start, min(start + many, count))
            people = 2 if float(self.dice.between(0, 1)) < PAIR_SHARE else 1
            clips, weights[some] = self.draw(some.stop - start, frames, people)
            pixels[some] = (clips.movedim(1, -1) * 127.5 + 127.5).round()
        return Drawn(pixels, weights)

    def draw(self, count: int, frames: int, people: int) -> tuple[Tensor, Tensor]:
        """Clips [count, 3, frames, 128, 128] in -1..1 and weights [count, 128, 128]."""
        dice = self.dice
        start = dice.choice(len(self.mouths) - frames, count, people)
        mouth = self.mouths[start[..., None] + torch.arange(frames)]
        characters = draw_characters(dice, count, PLACES if people == 2 else None)
        poses, _ = draw_motions(dice, mouth)
        with torch.no_grad():
            clips = render(characters.to(self.device), to_device(poses, self.device))
            clips = self._with_shapes(clips.movedim(2, 1) * 2 - 1)
        return clips, self._weights(characters, clips.shape[-1])

    def _with_shapes(self, clips: Tensor) -> Tensor:
        """Some clips get random ellipses in front, so that the VAE can do more than faces."""
        count, _, frames, size, _ = clips.shape
        axis = (torch.arange(size, device=self.device) + 0.5) * 2 / size - 1
        for _ in range(2):
            numbers = self.dice.between(-1, 1, count, 10).to(self.device)
            centre, speed, radius, color, chosen = numbers.split((2, 2, 2, 3, 1), dim=1)
            time = torch.arange(frames, device=self.device) / frames
            place = centre[:, :, None] + 0.3 * speed[:, :, None] * time
            u = (axis - place[:, 0, :, None]) / (0.1 + 0.2 * radius[:, 0, None, None].abs())
            v = (axis - place[:, 1, :, None]) / (0.1 + 0.2 * radius[:, 1, None, None].abs())
            inside = (8 * (1 - u[:, :, None, :] ** 2 - v[..., None] ** 2)).clamp(0, 1)
            inside = inside * (chosen < 2 * SHAPE_SHARE - 1)[:, :, None, None]
            clips = clips + inside[:, None] * (color[:, :, None, None, None] - clips)
        return clips

    def _weights(self, characters: Characters, size: int) -> Tensor:
        axis = (torch.arange(size) + 0.5) * 2 / size - 1
        left, top, right, bottom = mouth_boxes(characters)[..., None].unbind(-2)
        inside = ((axis > left) & (axis < right))[..., None, :] & ((axis > top) & (axis < bottom))[..., None]
        return (1 + (MOUTH_WEIGHT - 1) * inside.any(1).float()).to(self.device)


def loss(vae: WholeClip, clips: Tensor, weights: Tensor) -> Tensor:
    """Reconstruction of values and of their differences between neighbours, and a weak pull to unit variance.

    clips [B, 3, T, H, W] in -1..1, weights [B, 1, 1, H, W].
    """
    with torch.autocast(clips.device.type, dtype=torch.bfloat16):
        mean, logvar = vae.encode(clips).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 4)
        made = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
    first = torch.ones(clips.shape[2], device=clips.device)
    first[:1].fill_(max(FIRST_SHARE * len(first), 1))
    scale = weights * first[:, None, None]
    error = made - clips
    values = (scale * (error.abs() + 5 * error**2)).mean()
    edges = sum((scale.narrow(d, 1, scale.shape[d] - 1) * error.diff(dim=d).abs()).mean() for d in (-1, -2))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return values + 0.5 * edges + KL_WEIGHT * kl


def train(
    takes: list[Take], path: Path, *, seconds: float, device: torch.device, compiled: bool, share: float = 1.0
) -> nn.Module:
    """The trained VAE, its latents brought to the published mean and deviation. share: of the usual clips."""
    torch.manual_seed(0)
    model = build_vae(sizes.VAE).to(device)
    channels_last(model)
    whole = WholeClip(model, compiled)
    pictures = Pictures(takes, device)
    kept = [pictures.keep(max(int(form.kept * share), 1), form.frames) for form in FORMS]
    log.info("%s clips are drawn.", " + ".join(str(len(drawn.pixels)) for drawn in kept))

    def loss_of(number: int) -> Tensor:
        return loss(whole, *kept[number].batch(FORMS[number].count))

    gradients = Gradients(model, loss_of)
    shares = torch.tensor([form.share for form in FORMS])

    def step() -> Tensor:
        return gradients(int(torch.multinomial(shares, 1)))

    trained = Trainer(model, path, seconds=seconds, rate=RATE).run(step)
    normalize(trained, Pictures(takes, device, seed=1))
    return trained


@torch.no_grad()
def normalize(vae: nn.Module, pictures: Pictures) -> None:
    """Scale the latents to the published VAE's mean and deviation; the 1x1 convolutions next to them take it up."""
    batches = [WholeClip(vae).encode(pictures.draw(STATISTICS_CLIPS, STATISTICS_FRAMES, 1)[0]) for _ in range(4)]
    latents = torch.cat(batches)[:, :Z_DIM].movedim(1, 0).flatten(1).double()
    mean, deviation = latents.mean(1), latents.std(1)
    wanted_mean, wanted = (torch.tensor(t, dtype=torch.float64, device=mean.device) for t in (MEAN_21, STD_21))
    scale = wanted / deviation
    out, back = vae.quant_conv, vae.post_quant_conv
    weight, bias = out.weight.double(), out.bias.double()
    weight[:Z_DIM] *= scale.view(-1, 1, 1, 1, 1)
    bias[:Z_DIM] = (bias[:Z_DIM] - mean) * scale + wanted_mean
    bias[Z_DIM:] += 2 * scale.log()
    inverse = back.weight.double() / scale.view(1, -1, 1, 1, 1)
    shift = F.conv3d((mean * scale - wanted_mean).view(1, -1, 1, 1, 1), inverse)
    back.bias.copy_(back.bias.double() + shift.flatten())
    back.weight.copy_(inverse)
    out.weight.copy_(weight)
    out.bias.copy_(bias)
