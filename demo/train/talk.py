"""Trains the demo's transformer to make drawn faces talk: flow matching on encoded clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...clip_image.extension import ClipImage
from ...multitalk.extension import AudioWindow
from ...multitalk.speakers import half_masks
from ...wanvideo.config import WanConfig
from ...wanvideo.extension import Extension
from ...wanvideo.modules.model import WanModel
from ...wanvideo.tokens import ModelInputs
from ..faces import SIZE
from . import sizes
from .clips import LATENT_SIDE, Clips
from .gradients import Gradients
from .speech import Bank
from .trainer import Trainer

RATE = 2e-3
BATCH = 64
BIAS_ALIGNMENT = 8
SHIFT = 3.0
PAIR_SHARE = 0.3
DROP_SHARE = 0.08
MOUTH_WEIGHT = 4.0
GIVEN_NOISE = 0.1
HEAD_MARGIN = (0.42, 0.5)
TOKEN_SIDE = LATENT_SIDE // sizes.TRANSFORMER.patch_size[1]


class Prompts(nn.Module):
    """Cross-attention for training in place of `sdpa()`: few padding keys stand for all that a prompt is padded with.

    A prompt of n tokens is padded to 512 equal keys; m of them with log((512 - n) / m) added to their scores are the
    same in softmax and cost less. texts: [tokens, dim] each.
    """

    def __init__(self, texts: Sequence[Tensor], text_len: int) -> None:
        super().__init__()
        longest = -(-max(len(text) + 1 for text in texts) // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
        lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)[:, None]
        share = ((text_len - lengths) / (longest - lengths)).log()
        self.texts = torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
        self.biases = torch.where(torch.arange(longest, device=lengths.device) >= lengths, share, 0.0)[:, None, None]
        self.register_buffer("bias", self.biases.new_zeros(BATCH, 1, 1, longest), persistent=False)

    def choose(self, numbers: Tensor) -> Tensor:
        """The prompts of these numbers, [B, longest, dim]; their biases hold for the next forward."""
        self.bias.copy_(self.biases[numbers])
        return self.texts[numbers]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, D] each -> [B, L, H, D]; keys that are not the prompt's (image tokens) have no padding."""
        bias = self.bias.to(q.dtype) if k.shape[1] == self.bias.shape[-1] else None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class Patches(nn.Conv3d):
    """The patch convolution as a product, whose weight gradient is many times faster."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, out, F, H / 2, W / 2]."""
        _, height, width = self.kernel_size
        cells = x.unflatten(4, (-1, width)).unflatten(3, (-1, height)).permute(0, 2, 3, 5, 1, 4, 6)
        return F.linear(cells.flatten(4), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Learner(WanModel):
    """The transformer as it is trained: a bfloat16 residual stream, and prompts that come padded."""

    def __init__(self, config: WanConfig, extensions: Sequence[Extension]) -> None:
        super().__init__(config, extensions)
        self.patch_embedding = Patches(config.in_dim, config.dim, config.patch_size, stride=config.patch_size)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The residual stream's, whatever the weights'."""
        return torch.bfloat16

    def embed_text(self, text: Tensor, dtype: torch.dtype) -> Tensor:
        """Padded prompts [B, T, text_dim] -> [B, T, C]."""
        return self.text_embedding(text).to(dtype)


class Teacher:
    """Measures the velocity that the model predicts for random batches of the clips.

    singles, pairs: kinds of clips of one person and of two. Kinds are numbered, those of one person first.
    """

    def __init__(
        self, model: Learner, bank: Bank, texts: Sequence[Tensor], singles: Sequence[Clips], pairs: Sequence[Clips]
    ) -> None:
        self.model, self.bank = model, bank
        self.singles, self.kinds = len(singles), (*singles, *pairs)
        self.device = bank.mouth.device
        self.choices = torch.Generator().manual_seed(3)
        self.prompts = Prompts(texts, model.config.text_len)
        for block in model.blocks:
            block.cross_attn.attention = self.prompts

    def batch(self) -> tuple[int, tuple[Tensor, ...]]:
        """Number of a kind; for two people their masks [2, 128, 128] and which of them the first voice belongs to."""
        alone = float(torch.rand((), generator=self.choices)) >= PAIR_SHARE
        first, count = (0, self.singles) if alone else (self.singles, len(self.kinds) - self.singles)
        kind = first + int(torch.randint(count, (), generator=self.choices))
        places = self.kinds[kind].places
        if places is None:
            return kind, ()
        order = torch.randperm(len(places), generator=self.choices)
        return kind, (self._masks(places)[order], order)

    def loss(self, kind: int, masks: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Weighted squared error over the frames that are not given. masks, order: as `batch` gives them."""
        clips = self.kinds[kind]
        chosen = torch.randint(len(clips.latents), (BATCH,), device=self.device)
        clean = clips.latents[chosen].float()
        noise = torch.randn_like(clean)
        uniform = torch.rand(BATCH, device=self.device)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        given = clean[:, :, : clips.given]
        noisy[:, :, : clips.given] = given + GIVEN_NOISE * torch.rand_like(level) * torch.randn_like(given)
        known = torch.zeros(BATCH, 4, *clean.shape[2:], device=self.device)
        known[:, :, 0] = 1
        latents = torch.cat((noisy, known, clips.cond[chosen].float()), dim=1)
        text = self.prompts.choose(clips.prompt[chosen])
        payloads = self._speech(clips, chosen, masks, order), ClipImage(clips.looks[chosen].float())
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            made = self.model(ModelInputs(latents=latents, timestep=sigma * 1000, text=text, payloads=payloads))
        error = (made.float() - (noise - clean))[:, :, clips.given :] ** 2
        weight = 1 + (MOUTH_WEIGHT - 1) * clips.weight[chosen][:, None, None]
        return (error * weight).mean() / weight.mean()

    def _speech(self, clips: Clips, chosen: Tensor, masks: Tensor | None, order: Tensor | None) -> AudioWindow:
        audio = self.bank.features[clips.rows[chosen]] * clips.voiced[chosen][..., None, None, None, None]
        heard = torch.rand(BATCH, device=self.device) > DROP_SHARE
        audio = audio * heard.view(-1, 1, 1, 1, 1, 1)
        # The order of the voices is the order of the masks.
        audio = audio if order is None else audio[:, order]
        return AudioWindow(audio, torch.ones((), device=self.device), masks)

    def _masks(self, places: Tensor) -> Tensor:
        """Boxes round the heads, the two halves of the picture, or what the model assumes without masks."""
        kind = int(torch.randint(4, (), generator=self.choices))
        if kind == 0:
            return F.interpolate(half_masks(TOKEN_SIDE, TOKEN_SIDE)[None], size=SIZE)[0]
        masks = torch.zeros(len(places), SIZE, SIZE)
        for mask, (x, y) in zip(masks, places.tolist(), strict=True):
            if kind == 1:
                mask[:, : SIZE // 2] = float(x < 0)
                mask[:, SIZE // 2 :] = float(x >= 0)
                continue
            margin = 0.8 + 0.4 * float(torch.rand((), generator=self.choices))
            width, height = (m * margin for m in HEAD_MARGIN)
            left, right = (int(max((x + d + 1) * SIZE / 2, 0)) for d in (-width, width))
            top, bottom = (int(max((y + d + 1) * SIZE / 2, 0)) for d in (-height, height))
            mask[top:bottom, left:right] = 1
        return masks


def train(teacher: Teacher, path: Path, *, seconds: float, compiled: bool) -> nn.Module:
    """The trained transformer with averaged weights."""
    trainer = Trainer(teacher.model, path, seconds=seconds, rate=RATE)
    if compiled:
        for block in teacher.model.blocks:
            block.compile(dynamic=False)
    gradients = Gradients(teacher.model, teacher.loss)

    def step() -> Tensor:
        kind, people = teacher.batch()
        return gradients(kind, *people)

    return trainer.run(step)
