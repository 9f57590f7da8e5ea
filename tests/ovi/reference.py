"""Both towers in float64, written from the paper's figure and the published names; weights come as a state dict."""

import torch
from torch.nn import functional as F


def turned(x, angles):
    """x [B, L, H, D] by angles [L, n]; channels beyond 2 n stay."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    turns = torch.exp(1j * F.pad(angles, (0, pairs.shape[-1] - angles.shape[1])))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2)


def frequencies(size):
    return 1e4 ** -(torch.arange(0, size, 2).double() / size)


def video_angles(grid, head):
    side = 2 * (head // 6)
    axes = [
        torch.outer(torch.arange(n).double(), frequencies(s))
        for n, s in zip(grid, (head - 2 * side, side, side), strict=True)
    ]
    places = torch.cartesian_prod(*map(torch.arange, grid))
    return torch.cat([axis[places[:, i]] for i, axis in enumerate(axes)], dim=1)


def sound_angles(length, head):
    return torch.outer(torch.arange(length).double(), 0.19676 * frequencies(head - 2 * (2 * (head // 6))))


class Towers:
    def __init__(self, state, heads, text_len):
        self.w = {name: value.double() for name, value in state.items()}
        self.heads, self.text_len = heads, text_len

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def rms(self, name, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.w[f"{name}.weight"]

    def norm(self, x, name=None):
        weights = (None, None) if name is None else (self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        return F.layer_norm(x, x.shape[-1:], *weights, 1e-6)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def attention(self, q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)

    def time(self, tower, t):
        size = 256
        angles = torch.outer(t.double(), 1e4 ** -(torch.arange(size // 2).double() / (size // 2)))
        e = self.linear(
            f"{tower}time_embedding.2",
            F.silu(self.linear(f"{tower}time_embedding.0", torch.cat((angles.cos(), angles.sin()), -1))),
        )
        return e, self.linear(f"{tower}time_projection.1", F.silu(e)).unflatten(-1, (6, -1))

    def text(self, tower, text):
        padded = F.pad(text.double(), (0, 0, 0, self.text_len - len(text)))[None]
        hidden = F.gelu(self.linear(f"{tower}text_embedding.0", padded), approximate="tanh")
        return self.linear(f"{tower}text_embedding.2", hidden)

    def alone(self, block, x, mod, angles):
        y = self.norm(x) * (1 + mod[:, 1]) + mod[:, 0]
        q, k, v = (self.linear(f"{block}.self_attn.{name}", y) for name in "qkv")
        q, k = (
            turned(self.split(self.rms(f"{block}.self_attn.norm_{n}", part)), angles)
            for n, part in (("q", q), ("k", k))
        )
        return x + self.linear(f"{block}.self_attn.o", self.attention(q, k, self.split(v)).flatten(2)) * mod[:, 2]

    def together(self, block, x, mod, angles, text, other, other_angles):
        cross = f"{block}.cross_attn"
        q = self.split(self.rms(f"{cross}.norm_q", self.linear(f"{cross}.q", self.norm(x, f"{block}.norm3"))))
        k = self.split(self.rms(f"{cross}.norm_k", self.linear(f"{cross}.k", text)))
        out = self.attention(q, k, self.split(self.linear(f"{cross}.v", text)))
        other = self.norm(other, f"{cross}.pre_attn_norm_fusion")
        k = turned(
            self.split(self.rms(f"{cross}.norm_k_fusion", self.linear(f"{cross}.k_fusion", other))), other_angles
        )
        out = out + self.attention(turned(q, angles), k, self.split(self.linear(f"{cross}.v_fusion", other)))
        x = x + self.linear(f"{cross}.o", out.flatten(2))
        y = self.norm(x) * (1 + mod[:, 4]) + mod[:, 3]
        return (
            x + self.linear(f"{block}.ffn.2", F.gelu(self.linear(f"{block}.ffn.0", y), approximate="tanh")) * mod[:, 5]
        )

    def head(self, tower, x, e):
        shift, scale = (self.w[f"{tower}head.modulation"] + e[:, None]).unbind(1)
        return self.linear(f"{tower}head.head", self.norm(x) * (1 + scale) + shift)

    def patches(self, x):
        return F.conv3d(x.double(), self.w["patch_embedding.weight"], self.w["patch_embedding.bias"], stride=(1, 2, 2))

    def sounds(self, audio):
        name = "audio_model.patch_embedding"
        x = F.silu(F.conv1d(audio.double().T[None], self.w[f"{name}.0.weight"], self.w[f"{name}.0.bias"], padding=3))
        one, two, three = (self.w[f"{name}.2.w{n}.weight"] for n in (1, 2, 3))
        gated = F.silu(F.conv1d(x, one, padding=3)) * F.conv1d(x, three, padding=3)
        return F.conv1d(gated, two, padding=3).mT

    def __call__(self, latents, audio, times, text, sound_text, skip=()):
        """latents [C, F, h, w], audio [L, c], times [F] of the frames; velocities of both."""
        patches, tower = self.patches(latents[None]), "audio_model."
        grid = patches.shape[2:]
        x, y = patches.flatten(2).mT, self.sounds(audio)
        places = grid[1] * grid[2]
        e, mod = (part.repeat_interleave(places, 0) for part in self.time("", times))
        sound_e, sound_mod = self.time(tower, times.amax()[None])
        head = x.shape[-1] // self.heads
        angles, sound = video_angles(grid, head), sound_angles(len(audio), head)
        told, heard = self.text("", text), self.text(tower, sound_text)
        for index in range(sum(name.endswith("modulation") and name.startswith("blocks.") for name in self.w)):
            if index in skip:
                continue
            block = f"blocks.{index}"
            of_x, of_y = self.w[f"{block}.modulation"] + mod, self.w[f"{tower}{block}.modulation"] + sound_mod
            x, y = self.alone(block, x, of_x, angles), self.alone(tower + block, y, of_y, sound)
            x, y = (
                self.together(block, x, of_x, angles, told, y, sound),
                self.together(tower + block, y, of_y, sound, heard, x, angles),
            )
        out = self.head("", x, e).unflatten(1, grid).unflatten(-1, (2, 2, -1))
        return out[0].permute(5, 0, 1, 3, 2, 4).flatten(4).flatten(2, 3), self.head(tower, y, sound_e)[0]
