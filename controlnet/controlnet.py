"""TheDenk's controlnets for Wan: a few narrow blocks read the noise and a control video, and steer every few of Wan's.

Source: TheDenk/wan2.1-dilated-controlnet and wan2.2-controlnet (wan_controlnet.py). Files have diffusers' names, which
are read as Wan's (key_names.py). Shapes: B batch, L video tokens, D channels of the controlnet, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attention import sdpa
from ..host import Host
from ..wanvideo.assign import head_count, layer_count
from ..wanvideo.checkpoint import Checkpoint
from ..wanvideo.config import WanConfig
from ..wanvideo.families import Kind
from ..wanvideo.modules.attention import WanSelfAttention, WanT2VCrossAttention
from ..wanvideo.modules.layers import (
    FeedForward,
    WanLayerNorm,
    at_tokens,
    gated_residual,
    modulate,
    sinusoidal_embedding,
)
from ..wanvideo.modules.stretches import stretched
from ..wanvideo.own_model import BesideModel, fill_own, in_turns
from ..wanvideo.quantization import Plan, plan_of
from ..wanvideo.rope import rope_table
from ..wanvideo.tokens import BlockInputs, Text
from ..wanvideo.turns import InTurns

KIND = Kind("Wan ControlNet", "WanVideo Controlnet Loader", (r"^control_encoder\.0\.0\.weight$",), whole=True)
HEAD_SIZE = 128
NORM_GROUPS = 2
NO_FAST_FFN = "_no_ffn"
QUANTIZATIONS = ("disabled", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", f"fp8_e4m3fn_fast{NO_FAST_FFN}")


@dataclass(frozen=True, kw_only=True)
class ControlnetSizes:
    """config: of the blocks; its in_dim and out_dim are the channels at the patch embedding and of the noise alone.

    encoder: channels of the control video and behind each stage of its encoder; stride: pixels to a latent, in height
    and width; out_dim: channels of the transformer that is steered.
    """

    config: WanConfig
    encoder: tuple[int, int, int, int]
    stride: int
    out_dim: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ControlnetSizes:
        """From the shapes of a file. Raises ValueError, naming the first key that is missing."""
        shapes = checkpoint.shapes
        stages = [f"control_encoder.{stage}.0.weight" for stage in range(3)]
        patch, ffn, text, time = (
            "patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight",
        )  # fmt: skip
        out = "controlnet_blocks.0.weight"
        missing = next((key for key in (*stages, patch, ffn, text, time, out) if key not in shapes), None)
        if missing is not None:
            raise ValueError(f"{checkpoint.path.name} lacks '{missing}' of a {KIND.name}; download it again.")
        first, last = shapes[stages[0]], shapes[stages[2]]
        dim, joined = shapes[patch][:2]
        config = WanConfig(
            dim=dim,
            ffn_dim=shapes[ffn][0],
            num_heads=head_count(checkpoint, dim, HEAD_SIZE),
            num_layers=layer_count(shapes, "blocks."),
            in_dim=joined,
            out_dim=joined - last[0],
            text_dim=shapes[text][1],
            freq_dim=shapes[time][1],
        )
        encoder = (first[1], *(shapes[stage][0] for stage in stages))
        return cls(config=config, encoder=encoder, stride=first[-1] - 1, out_dim=shapes[out][0])


class ControlBlock(nn.Module):
    """A block of Wan's without the norm in front of text cross-attention."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = WanLayerNorm(config.dim, config.eps)
        self.self_attn = WanSelfAttention(config, sdpa())
        self.cross_attn = WanT2VCrossAttention(config, sdpa())
        self.norm2 = WanLayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        rows = (self.modulation.to(inputs.mod.dtype).unsqueeze(1) + inputs.mod).unbind(2)
        shift, scale, gate = at_tokens(rows[:3], inputs.rows, slice(None))
        y, _ = self.self_attn(modulate(self.norm1, x, shift, scale, self.self_attn.readers()), inputs, (), self)
        x = gated_residual(x, y, gate)
        y, _ = self.cross_attn(x, inputs, (), self)
        x = x + y

        def fed(tokens: slice) -> Tensor:
            piece, (shift, scale, gate) = x[:, tokens], at_tokens(rows[3:], inputs.rows, tokens)
            return gated_residual(piece, self.ffn(modulate(self.norm2, piece, shift, scale, self.ffn.readers())), gate)

        return stretched(fed, x.shape[1], inputs.parts)


class WanControlnet(InTurns):
    """Runs block by block beside the transformer (extension.py), so that no states but the last are held."""

    def __init__(self, sizes: ControlnetSizes) -> None:
        super().__init__()
        config, dim = sizes.config, sizes.config.dim
        self.sizes = sizes
        self.control_encoder = nn.ModuleList(
            _stage(sizes.encoder[place], sizes.encoder[place + 1], place, sizes.stride) for place in range(3)
        )
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(ControlBlock(config) for _ in range(config.num_layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, sizes.out_dim) for _ in range(config.num_layers))

    def quantizable(self, name: str) -> bool:
        """All of the blocks, and what they give to the transformer."""
        return name.startswith(("blocks.", "controlnet_blocks."))

    def turns(self) -> list[tuple[nn.Module, ...]]:
        """What `embed` runs, then each block with its projection."""
        embeddings = (self.patch_embedding, self.text_embedding, self.time_embedding, self.time_projection)
        return [(self.control_encoder, *embeddings), *zip(self.blocks, self.controlnet_blocks, strict=True)]

    def embed(
        self, latents: Tensor, timestep: Tensor, prompts: Sequence[Tensor], control: Tensor
    ) -> tuple[Tensor, BlockInputs]:
        """Tokens [B, L, D], and what the blocks read besides.

        latents [B, c, F, h, w]: the noise. timestep [B], or [B, F] for one a frame, 0..1000. prompts: B tensors
        [T, text_dim] of one length, without padding. control [1, 3, T, H, W] in -1..1. Raises ValueError for a control
        video of another length or size.
        """
        dtype = self.text_embedding[0].weight.dtype
        features = self.encoded(control, latents).expand(latents.shape[0], -1, -1, -1, -1)
        patches = self.patch_embedding(torch.cat((latents.to(dtype), features), dim=1))
        grid = (int(patches.shape[2]), int(patches.shape[3]), int(patches.shape[4]))
        x = patches.flatten(2).transpose(1, 2).contiguous()

        times = timestep if timestep.dim() == 2 else timestep[:, None]
        embedding = self.time_embedding(sinusoidal_embedding(times, self.sizes.config.freq_dim).to(dtype))
        mod = self.time_projection(embedding).unflatten(-1, (6, -1))
        rows = None
        if times.shape[1] > 1:
            rows = torch.arange(grid[0], device=x.device).repeat_interleave(grid[1] * grid[2])
        return x, BlockInputs(
            mod=mod.to(torch.promote_types(dtype, torch.float32)),
            rows=rows,
            rope=rope_table(grid, self.sizes.config.head_dim, device=x.device),
            text=Text(self.text_embedding(torch.stack(tuple(prompts)).to(dtype))),
            grid=grid,
        )

    def encoded(self, control: Tensor, latents: Tensor) -> Tensor:
        """Control video [1, 3, T, H, W] where the latents [B, c, F, h, w] are: [1, n, F, h, w]. Raises as `embed`."""
        features = control.to(self.patch_embedding.weight.dtype)
        for stage in self.control_encoder:
            features = stage(features)
        if features.shape[2:] != latents.shape[2:]:
            frames, height, width = latents.shape[2:]
            stride = self.sizes.stride
            raise ValueError(
                f"The control video has {control.shape[2]} frames of {control.shape[4]}x{control.shape[3]}, but the "
                f"video {4 * (frames - 1) + 1} of {width * stride}x{height * stride}: give control_images of that "
                "length and size."
            )
        return features


def _stage(channels: int, out: int, place: int, stride: int) -> nn.Sequential:
    """The first stage makes height and width those of latents, the two behind it halve the frames."""
    if place:
        convolution = nn.Conv3d(channels, out, kernel_size=3, stride=(2, 1, 1), padding=1)
    else:
        kernel, padding = (3, stride + 1, stride + 1), (1, stride // 2, stride // 2)
        convolution = nn.Conv3d(channels, out, kernel_size=kernel, stride=(1, stride, stride), padding=padding)
    return nn.Sequential(convolution, nn.GELU(approximate="tanh"), nn.GroupNorm(NORM_GROUPS, out))


@dataclass(frozen=True)
class ControlnetModel(BesideModel):
    """A loaded controlnet (socket WANVIDEOCONTROLNET)."""


def unfilled(checkpoint: Checkpoint) -> WanControlnet:
    """The module of such a file, on the meta device. Raises ValueError, naming a key that the file lacks."""
    with torch.device("meta"):
        return WanControlnet(ControlnetSizes.of(checkpoint))


def load_controlnet(
    path: Path, checkpoint: Checkpoint, *, base_dtype: torch.dtype, quantization: str, host: Host
) -> ControlnetModel:
    """Load a controlnet of any size. Raises ValueError if the file is incomplete, or an option cannot run."""
    module = unfilled(checkpoint)
    option = quantization.removesuffix(NO_FAST_FFN)
    plan = plan_of(option, checkpoint, device=host.device(), base=base_dtype)
    feed_forward = plan if option == quantization else replace(plan, fast=False)

    def plan_for(name: str) -> Plan | None:
        if not module.quantizable(name):
            return None
        return feed_forward if ".ffn." in name else plan

    fill_own(module, checkpoint, what=KIND.name, plan_of=plan_for, dtype_of=lambda name: base_dtype)
    return ControlnetModel(path, (str(base_dtype), quantization), *in_turns(module, host))
