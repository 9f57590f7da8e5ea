"""The published Wan transformer in float64, a token, head or frame at a time where that is short.

Systems whose tests need a whole model add what they do to it: terms on the video's tokens, clean tokens behind them,
terms behind a block.
"""

import math

import torch


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(module):
    return {k: v.double() for k, v in module.state_dict().items()}


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def rms(weight, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x, eps=1e-6):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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


def turned(x, positions, heads):
    """RoPE: channels of a head are pairs; frames, rows and columns have their shares of the pairs."""
    size = x.shape[-1] // heads
    spatial = 2 * (size // 6)
    out = x.clone().unflatten(-1, (heads, size // 2, 2))
    for token, place in enumerate(positions):
        angles = []
        for position, width in zip(place, (size - 2 * spatial, spatial, spatial), strict=True):
            angles += [position * 10000.0 ** (-2 * i / width) for i in range(width // 2)]
        cos, sin = torch.tensor(angles).double().cos(), torch.tensor(angles).double().sin()
        a, b = x[token].unflatten(-1, (heads, size // 2, 2)).unbind(-1)
        out[token, ..., 0], out[token, ..., 1] = a * cos - b * sin, a * sin + b * cos
    return out.flatten(1)


def modulation(p, config, timestep):
    half = config.freq_dim // 2
    angles = timestep * 10000.0 ** (-torch.arange(half).double() / half)
    time = linear(p, "time_embedding.0", torch.cat((angles.cos(), angles.sin())))
    time = linear(p, "time_embedding.2", silu(time))
    return time, linear(p, "time_projection.1", silu(time)).view(6, 1, -1)


def velocity(model, latents, timestep, text, *, on_video=0.0, behind=(), after=lambda index, video: 0.0):
    """Of latents [in_dim, F, H, W]. on_video [L, C]: added to the patches. behind: (tokens [N, C], positions) that are
    seen at time 0. after: (index, video tokens) -> what is added to them behind a block."""
    config, p = model.config, weights(model)
    latents, text, heads = latents.double(), text.double(), config.num_heads
    grid = (latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2)
    x = patches(p["patch_embedding.weight"], p["patch_embedding.bias"], latents) + on_video
    count, positions = len(x), places(*map(range, grid))
    for tokens, more in behind:
        x, positions = torch.cat((x, tokens)), positions + more
    time, now = modulation(p, config, timestep)
    clean = modulation(p, config, 0.0)[1]
    mod = torch.cat((now.expand(-1, count, -1), clean.expand(-1, len(x) - count, -1)), dim=1)
    text = torch.cat((text, text.new_zeros(config.text_len - len(text), text.shape[1])))
    text = linear(p, "text_embedding.2", gelu(linear(p, "text_embedding.0", text)))
    for i in range(config.num_layers):
        x = block(p, f"blocks.{i}.", x, mod, positions, text, heads)
        x = torch.cat((x[:count] + after(i, x[:count]), x[count:]))
    shift, gain = p["head.modulation"][0] + time
    out = linear(p, "head.head", layer_norm(x[:count]) * (1 + gain) + shift)
    cells = out.view(*grid, 2, 2, config.out_dim).permute(5, 0, 1, 3, 2, 4)
    return cells.reshape(config.out_dim, grid[0], 2 * grid[1], 2 * grid[2])


def block(p, b, x, mod, positions, text, heads):
    shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = p[f"{b}modulation"][0][:, None] + mod
    y = layer_norm(x) * (1 + gain) + shift
    q, k = (rms(p[f"{b}self_attn.norm_{n}.weight"], linear(p, f"{b}self_attn.{n}", y)) for n in "qk")
    v = linear(p, f"{b}self_attn.v", y)
    y = heads_attend(turned(q, positions, heads), turned(k, positions, heads), v, heads)
    x = x + linear(p, f"{b}self_attn.o", y) * gate
    y = layer_norm(x) * p[f"{b}norm3.weight"] + p[f"{b}norm3.bias"]
    q = rms(p[f"{b}cross_attn.norm_q.weight"], linear(p, f"{b}cross_attn.q", y))
    k = rms(p[f"{b}cross_attn.norm_k.weight"], linear(p, f"{b}cross_attn.k", text))
    y = heads_attend(q, k, linear(p, f"{b}cross_attn.v", text), heads)
    x = x + linear(p, f"{b}cross_attn.o", y)
    y = gelu(linear(p, f"{b}ffn.0", layer_norm(x) * (1 + ffn_gain) + ffn_shift))
    return x + linear(p, f"{b}ffn.2", y) * ffn_gate
