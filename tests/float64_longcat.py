"""LongCat-Video in float64, written from the authors' code: norms of each head, SwiGLU, modulation of every block by
frame, and frames that see no others."""

import torch
import torch.nn.functional as F
from contract import HEIGHT, SIZES, WIDTH
from float64_wan import Exact
from wanvideo_wrapper.wanvideo.config import WanConfig

FRAMES = 5
CONFIG = WanConfig(**{**SIZES, "dim": 32})
GRID = (FRAMES, HEIGHT // 2, WIDTH // 2)
ROOM = GRID[1] * GRID[2]


class ExactLongCat(Exact):
    """As `Exact`, of a model with five latent frames."""

    def rms(self, name, x):
        by_head = x.unflatten(-1, (-1, self.weights[f"{name}.weight"].shape[0]))
        return super().rms(name, by_head).flatten(-2)

    def feed_forward(self, index, x):
        name = f"blocks.{index}.ffn"
        return self.linear(f"{name}.w2", F.silu(self.linear(f"{name}.w1", x)) * self.linear(f"{name}.w3", x))

    def frame_times(self, timesteps):
        """[F] -> embedding [1, F, E]."""
        half = self.config.freq_dim // 2
        angles = timesteps.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        x = torch.cat((angles.cos(), angles.sin()), dim=1)
        return self.linear("time_embedding.mlp.2", F.silu(self.linear("time_embedding.mlp.0", x)))[None]

    def by_token(self, name, e, parts):
        rows = self.linear(f"{name}.modulation.1", F.silu(e))
        return rows.repeat_interleave(ROOM, dim=1).chunk(parts, dim=-1)

    def prompt(self, text):
        embedded = self.text([text])
        embedded[:, len(text) :] = 0
        return embedded

    def between(self, index, x, e):
        """What an avatar adds behind the prompt."""
        return x

    def run(self, latents, timesteps, text, given, seen, positions):
        """seen [F, F]: which frame sees which."""
        x, text, e = self.patches(latents), self.prompt(text), self.frame_times(timesteps)
        turns = self.turns_at(positions)
        mask = seen.repeat_interleave(ROOM, 0).repeat_interleave(ROOM, 1)
        for index in self.blocks:
            s1, c1, g1, s2, c2, g2 = self.by_token(f"blocks.{index}", e, 6)
            q, k, v = self.self_qkv(index, self.norm(x) * (1 + c1) + s1, turns)
            self.placed = q, k
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(2)
            x = x + g1 * self.linear(f"blocks.{index}.self_attn.o", out)
            read = self.cross(index, x, text)
            read[:, : given * ROOM] = 0
            x = self.between(index, x + read, e)
            x = x + g2 * self.feed_forward(index, self.norm(x) * (1 + c2) + s2)
        shift, scale = self.by_token("head", e, 2)
        x = self.linear("head.head", self.norm(x) * (1 + scale) + shift).reshape(1, *GRID, 2, 2, 16)
        return -torch.einsum("bfhwpqc->bcfhpwq", x).flatten(5, 6).flatten(3, 4)


def all_seen():
    return torch.ones(FRAMES, FRAMES, dtype=torch.bool)
