"""Wan's transformer in float64, in parts that tests of systems put together as the systems' authors do.

Written from the paper and Wan-Video/Wan2.1 with complex rotations; it shares nothing with the package but the weights.
"""

import torch
import torch.nn.functional as F


class Exact:
    """The weights of a model of the package in float64. Tokens are [B, L, C], heads [B, L, H, D]."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.blocks = range(model.config.num_layers)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def rms(self, name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps) * self.weights[f"{name}.weight"]

    def norm(self, x, name=None):
        affine = () if name is None else (self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        return F.layer_norm(x, x.shape[-1:], *affine, eps=self.config.eps)

    def patches(self, latents):
        """Latents [B, C, F, H, W] -> tokens."""
        w = self.weights
        x = F.conv3d(latents.double(), w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
        return x.flatten(2).transpose(1, 2)

    def times(self, timestep):
        """[B] -> embedding [B, C] and modulation [B, 6, C]."""
        half = self.config.freq_dim // 2
        angles = timestep.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        x = torch.cat((angles.cos(), angles.sin()), dim=1)
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", x)))
        return e, self.linear("time_projection.1", F.silu(e)).unflatten(1, (6, -1))

    def text(self, prompts):
        length = max(self.config.text_len, *(p.shape[0] for p in prompts))
        x = torch.stack([F.pad(p.double(), (0, 0, 0, length - p.shape[0])) for p in prompts])
        return self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", x), approximate="tanh"))

    def turns(self, grid, start=(0, 0, 0)):
        """Complex rotations [F * H * W, D/2] of a grid of positions."""
        return self.turns_at(places(*(range(first, first + size) for first, size in zip(start, grid, strict=True))))

    def turns_at(self, positions):
        """Complex rotations [L, D/2] of positions (frame, row, column)."""
        size = self.config.dim // self.config.num_heads
        spatial = 2 * (size // 6)
        parts = []
        for axis, width in zip(zip(*positions, strict=True), (size - 2 * spatial, spatial, spatial), strict=True):
            frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            parts.append(torch.tensor(axis, dtype=torch.float64)[:, None] * frequencies)
        angles = torch.cat(parts, dim=-1)
        return torch.polar(torch.ones_like(angles), angles)

    def heads(self, x):
        return x.unflatten(-1, (self.config.num_heads, -1))

    def turned(self, x, turns):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    def attention(self, q, k, v):
        """Heads -> tokens."""
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    def modulated(self, index, modulation):
        """Shift, scale, gate of self-attention and of the feed-forward: six [B, 1, C]."""
        return (self.weights[f"blocks.{index}.modulation"] + modulation).chunk(6, dim=1)

    def self_qkv(self, index, x, turns):
        name = f"blocks.{index}.self_attn"
        q, k = (
            self.turned(self.heads(self.rms(f"{name}.norm_{part}", self.linear(f"{name}.{part}", x))), turns)
            for part in "qk"
        )
        return q, k, self.heads(self.linear(f"{name}.v", x))

    def cross(self, index, x, text, more=None):
        """Text cross-attention of the normed stream; more: (queries, what) -> tokens added before the projection."""
        name = f"blocks.{index}.cross_attn"
        q = self.heads(self.rms(f"{name}.norm_q", self.linear(f"{name}.q", self.norm(x, f"blocks.{index}.norm3"))))
        k = self.heads(self.rms(f"{name}.norm_k", self.linear(f"{name}.k", text)))
        out = self.attention(q, k, self.heads(self.linear(f"{name}.v", text)))
        return self.linear(f"{name}.o", out if more is None else out + more(q))

    def feed_forward(self, index, x):
        name = f"blocks.{index}.ffn"
        return self.linear(f"{name}.2", F.gelu(self.linear(f"{name}.0", x), approximate="tanh"))

    def velocity(self, x, e, grid):
        """Tokens -> [B, out_dim, F, H, W]."""
        shift, scale = (self.weights["head.modulation"] + e[:, None]).chunk(2, dim=1)
        x = self.linear("head.head", self.norm(x) * (1 + scale) + shift)
        x = x.reshape(x.shape[0], *grid, 2, 2, self.config.out_dim)
        return torch.einsum("bfhwpqc->bcfhpwq", x).flatten(5, 6).flatten(3, 4)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def velocity(model, latents, timestep, text, *, on_video=0.0, behind=(), after=lambda index, video: 0.0):
    """Of latents [in_dim, F, H, W]. on_video [L, C]: added to the patches. behind: (tokens [N, C], positions) that are
    seen at time 0. after: (index, video tokens) -> what is added to them behind a block."""
    exact = Exact(model)
    grid = (latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2)
    x, positions = exact.patches(latents[None]) + on_video, places(*map(range, grid))
    count = x.shape[1]
    for tokens, more in behind:
        x, positions = torch.cat((x, tokens[None]), dim=1), positions + more
    turns, text = exact.turns_at(positions), exact.text([text])
    (time, now), (_, clean) = (exact.times(torch.tensor([t])) for t in (float(timestep), 0.0))
    for i in exact.blocks:
        pairs = zip(exact.modulated(i, now), exact.modulated(i, clean), strict=True)
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = (
            torch.cat((a.expand(-1, count, -1), b.expand(-1, x.shape[1] - count, -1)), dim=1) for a, b in pairs
        )
        heads = exact.self_qkv(i, exact.norm(x) * (1 + gain) + shift, turns)
        x = x + exact.linear(f"blocks.{i}.self_attn.o", exact.attention(*heads)) * gate
        x = x + exact.cross(i, x, text)
        x = x + exact.feed_forward(i, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_gate
        x = torch.cat((x[:, :count] + after(i, x[0, :count]), x[:, count:]), dim=1)
    return exact.velocity(x[:, :count], time, grid)[0]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(module):
    return {k: v.double() for k, v in module.state_dict().items()}


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def rms(weight, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x, eps=1e-6):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def heads_attend(q, k, v, heads):
    """q [L, C], k and v [T, C]."""
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], dim=-1)


def causal_conv(p, name, x, stride=1):
    """x [T, C] through a convolution of three taps that see no later row; the first row repeats in front."""
    weight, out = p[f"{name}.conv.weight"], []
    for end in range(0, len(x), stride):
        rows = [x[max(end - back, 0)] for back in (2, 1, 0)]
        out.append(sum(weight[..., tap] @ row for tap, row in enumerate(rows)) + p[f"{name}.conv.bias"])
    return torch.stack(out)


def patches(weight, bias, latents):
    """[z, F, H, W] in patches of the weight's size as rows [L, C]; what fills no patch is left out."""
    frames, height, width = weight.shape[2:]
    grid = [side // size for side, size in zip(latents.shape[1:], weight.shape[2:], strict=True)]
    rows = [
        weight.flatten(1) @ latents[:, frames * f : frames * (f + 1), height * h : height * (h + 1),
                                    width * w : width * (w + 1)].flatten()
        for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])
    ]  # fmt: skip
    return torch.stack(rows) + bias


def places(times, rows, columns):
    return [(t, h, w) for t in times for h in rows for w in columns]
