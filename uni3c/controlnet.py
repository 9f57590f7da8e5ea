"""The Uni3C controlnet: a narrow transformer beside Wan's, which reads the noise, the picture and a rendered video.

Source: ewrfcas/Uni3C (src/models/controlnet.py, pcd_controller.py); attention has the names of Wan's, the rest those of
the published file. Shapes: B batch, L video tokens, D channels of the controlnet, C of the transformer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention, AttentionSpec, resolve
from ..host import Host
from ..wanvideo.assign import head_count, layer_count
from ..wanvideo.checkpoint import Checkpoint
from ..wanvideo.compilation import CompileArgs, refuse_unless_it_compiles
from ..wanvideo.config import PATCH_SIZE, WanConfig
from ..wanvideo.families import Kind
from ..wanvideo.modules.attention import WanSelfAttention
from ..wanvideo.modules.layers import FeedForward, WanLayerNorm, gated_residual, per_token
from ..wanvideo.modules.stretches import stretched
from ..wanvideo.own_model import BesideModel, fill_own, in_turns
from ..wanvideo.quantization import plan_of
from ..wanvideo.tokens import BlockInputs
from ..wanvideo.turns import InTurns

LOADER = "WanVideo Uni3C Controlnet Loader"
KIND = Kind("Uni3C controlnet", LOADER, (r"^controlnet_patch_embedding\.weight$",), whole=True)
HEAD_SIZE = 64
NORM_EPS = 1e-5
# Of the transformer's input: the noise, and the first four channels behind it, an image-to-video model's mask.
NOISE_CHANNELS, READ_CHANNELS = 16, 20
# A mask lies in pixels; the VAE's first latent frame is one of them, so that three are put in front.
MASK_STRIDE = (4, 8, 8)
MASK_PADDING = (0, 0, 0, 0, 3, 0)
QUANTIZED = re.compile(r"^(controlnet_blocks\.\d+\.(self_attn|ffn)|proj_out)\.")


@dataclass(frozen=True, kw_only=True)
class Uni3CSizes:
    """config: of the blocks, in_dim the channels of all it reads. wide: channels behind the patch embedding. time_dim,
    out_dim: of the transformer that it steers. extra, middle: channels of the mask embedding.
    """

    config: WanConfig
    wide: int
    time_dim: int
    out_dim: int
    extra: int
    middle: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Uni3CSizes:
        """From the shapes of a file with `renamed` keys. Raises ValueError, naming the first key that is missing."""
        shapes = checkpoint.shapes
        block = "controlnet_blocks.0."
        keys = {
            "patch": "controlnet_patch_embedding.weight", "in": "proj_in.weight", "out": "proj_out.0.weight",
            "norm": f"{block}norm1.linear.weight", "ffn": f"{block}ffn.0.weight",
            "mask": "controlnet_mask_embedding.mask_proj.0.weight",
        }  # fmt: skip
        missing = next((key for key in keys.values() if key not in shapes), None)
        if missing is not None:
            raise ValueError(f"{checkpoint.path.name} lacks '{missing}' of a {KIND.name}; download it again.")
        patch, mask = shapes[keys["patch"]], shapes[keys["mask"]]
        dim = shapes[keys["in"]][0]
        return cls(
            config=WanConfig(
                dim=dim,
                ffn_dim=shapes[keys["ffn"]][0],
                num_heads=head_count(checkpoint, dim, HEAD_SIZE),
                num_layers=layer_count(shapes, "controlnet_blocks."),
                in_dim=patch[1],
            ),
            wide=patch[0],
            time_dim=shapes[keys["norm"]][1],
            out_dim=shapes[keys["out"]][0],
            extra=mask[1],
            middle=mask[0],
        )


class ModulatedNorm(nn.Module):
    """A norm with weights, then shift and scale of the time embedding; its gate is for what comes behind."""

    def __init__(self, time_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_dim, 3 * dim)
        self.norm = WanLayerNorm(dim, NORM_EPS, elementwise_affine=True)

    def forward(self, x: Tensor, embedding: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, L, D], embedding [B, R, C], rows [L] or None -> modulated [B, L, D], gate [B, 1 or L, D] float32."""
        parts = self.linear(F.silu(embedding.to(self.linear.weight.dtype)))
        wide = torch.promote_types(parts.dtype, torch.float32)
        shift, scale, gate = (per_token(part, rows) for part in parts.to(wide).chunk(3, dim=-1))
        return torch.addcmul(shift, self.norm.widened(x), 1 + scale).to(x.dtype), gate


class Uni3CBlock(nn.Module):
    """Self-attention and feed-forward, each behind a modulated norm."""

    def __init__(self, sizes: Uni3CSizes, attention: Attention) -> None:
        super().__init__()
        dim = sizes.config.dim
        self.norm1 = ModulatedNorm(sizes.time_dim, dim)
        self.self_attn = WanSelfAttention(sizes.config, attention)
        self.norm2 = ModulatedNorm(sizes.time_dim, dim)
        self.ffn = FeedForward(dim, sizes.config.ffn_dim)

    def forward(self, x: Tensor, embedding: Tensor, inputs: BlockInputs) -> Tensor:
        """x [B, L, D], time embedding [B, R, C] -> [B, L, D]."""
        y, gate = self.norm1(x, embedding, inputs.rows)
        y, _ = self.self_attn(y, inputs, (), self)
        x = gated_residual(x, y, gate)

        def fed(tokens: slice) -> Tensor:
            piece, rows = x[:, tokens], None if inputs.rows is None else inputs.rows[tokens]
            y, gate = self.norm2(piece, embedding, rows)
            return gated_residual(piece, self.ffn(y), gate)

        return stretched(fed, x.shape[1], inputs.parts)


class MaskEmbedding(nn.Module):
    """What is known of the render in pixels (where it is valid, camera rays) to the grid of the tokens."""

    def __init__(self, sizes: Uni3CSizes) -> None:
        super().__init__()
        self.mask_proj = nn.Sequential(
            nn.Conv3d(sizes.extra, sizes.middle, kernel_size=MASK_STRIDE, stride=MASK_STRIDE),
            nn.GroupNorm(sizes.middle // 8, sizes.middle),
            nn.SiLU(),
        )
        self.mask_zero_proj = nn.Conv3d(sizes.middle, sizes.wide, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, mask: Tensor) -> Tensor:
        """[B, extra, T, H, W] in pixels -> [B, wide, F, h, w] on the grid."""
        padded = F.pad(mask.to(self.mask_zero_proj.weight.dtype), MASK_PADDING)
        return self.mask_zero_proj(self.mask_proj(padded))


class Uni3CControlnet(InTurns):
    """Runs block by block beside the transformer (extension.py), so that no states but the last are held."""

    def __init__(self, sizes: Uni3CSizes, attention: Attention) -> None:
        super().__init__()
        config = sizes.config
        self.sizes = sizes
        self.controlnet_patch_embedding = nn.Conv3d(
            config.in_dim, sizes.wide, kernel_size=PATCH_SIZE, stride=PATCH_SIZE
        )
        self.controlnet_mask_embedding = MaskEmbedding(sizes)
        self.proj_in = nn.Linear(sizes.wide, config.dim)
        self.controlnet_blocks = nn.ModuleList(Uni3CBlock(sizes, attention) for _ in range(config.num_layers))
        self.proj_out = nn.ModuleList(nn.Linear(config.dim, sizes.out_dim) for _ in range(config.num_layers))

    def quantizable(self, name: str) -> bool:
        """Attention, feed-forward and what they give to the transformer; norms are not."""
        return QUANTIZED.match(f"{name}.") is not None

    def turns(self) -> list[tuple[nn.Module, ...]]:
        """What `embed` runs, then each block with its projection."""
        entrance = (self.controlnet_patch_embedding, self.controlnet_mask_embedding, self.proj_in)
        return [entrance, *zip(self.controlnet_blocks, self.proj_out, strict=True)]

    def embed(self, latents: Tensor, mask: Tensor | None, parts: int = 1) -> Tensor:
        """Latents [B, in_dim, F, h, w], mask [1, 1, T, 8 h, 8 w] -> tokens [B, L, D], in pieces of some frames."""
        patch_embedding, marks = self.controlnet_patch_embedding, None
        if mask is not None:
            marks = self.controlnet_mask_embedding(mask)

        def embedded(frames: slice) -> Tensor:
            x = patch_embedding(latents[:, :, frames].to(patch_embedding.weight.dtype))
            if marks is not None:
                x = x + marks[:, :, frames]
            places = x.shape[-2] * x.shape[-1]
            x = x.flatten(2).transpose(1, 2).to(self.proj_in.weight.dtype).contiguous()
            return self.proj_in(x).unflatten(1, (-1, places))

        frames = latents.shape[2]
        return stretched(embedded, frames, min(parts, frames)).flatten(1, 2)


def joined_latents(latents: Tensor, render: Tensor) -> Tensor:
    """The transformer's latents [B, 16 or more, F, h, w] and the render [1, c, f, h', w'] -> [B, 20 + c, F, h, w].

    A text-to-video model has no mask channels: they are zero. The render is resized where it has another size.
    """
    if latents.shape[1] == NOISE_CHANNELS:
        latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, READ_CHANNELS - NOISE_CHANNELS))
    wide = resized(render, latents.shape[2:]).to(latents)
    return torch.cat((latents[:, :READ_CHANNELS], wide.expand(latents.shape[0], -1, -1, -1, -1)), dim=1)


def resized(video: Tensor, sizes: torch.Size | tuple[int, ...]) -> Tensor:
    """[B, c, f, h, w] with other frames, height and width."""
    if tuple(video.shape[2:]) == tuple(sizes):
        return video
    wide = video.to(torch.promote_types(video.dtype, torch.float32))
    return F.interpolate(wide, size=tuple(sizes), mode="trilinear", align_corners=False)


def renamed(key: str) -> str:
    """The name in this module of a published key: attention is diffusers' in the file."""
    key = re.sub(r"\.self_attn\.to_([qkv])\.", r".self_attn.\1.", key)
    return key.replace(".self_attn.to_out.0.", ".self_attn.o.")


@dataclass(frozen=True)
class Uni3CModel(BesideModel):
    """A loaded controlnet (socket WANVIDEOCONTROLNET)."""

    compile: CompileArgs | None = None


@dataclass(frozen=True, kw_only=True)
class Uni3COptions:
    """What the loader node asks for."""

    base_dtype: torch.dtype
    quantization: str = "disabled"
    attention_mode: str = "sdpa"
    compile: CompileArgs | None = None


def unfilled(sizes: Uni3CSizes, attention: Attention) -> Uni3CControlnet:
    """On the meta device."""
    with torch.device("meta"):
        return Uni3CControlnet(sizes, attention)


def load_uni3c(path: Path, opened: Checkpoint, options: Uni3COptions, host: Host) -> Uni3CModel:
    """Load a controlnet of any size. Raises ValueError if the file is incomplete, or an option cannot run."""
    checkpoint = opened.renamed(renamed)
    sizes, base = Uni3CSizes.of(checkpoint), options.base_dtype
    plan = plan_of(options.quantization, checkpoint, device=host.device(), base=base)
    refuse_unless_it_compiles(options.compile, host.device())
    config = sizes.config
    spec = AttentionSpec(device=host.device(), heads=config.num_heads, head_dim=config.head_dim, dtype=base)
    attention = resolve(options.attention_mode, spec)
    module = unfilled(sizes, attention)
    fill_own(
        module,
        checkpoint,
        what=KIND.name,
        plan_of=lambda name: plan if module.quantizable(name) else None,
        dtype_of=lambda name: torch.float32 if name.startswith("controlnet_patch_embedding.") else base,
    )
    chosen = (str(base), options.quantization, options.attention_mode)
    return Uni3CModel(path, chosen, *in_turns(module, host), options.compile)
