"""The reference extractor of One-to-All: a transformer of its own over the reference, read by every main block.

Source: ssj9596/One-to-All-Animation (refextractor_2d). Module names are the published keys.
Shapes: B batch, S tokens of the reference, C channels, D head size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..attention import sdpa
from ..wanvideo.config import WanConfig
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import sinusoidal_embedding
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import BlockInputs, Text


def textless_block(config: WanConfig) -> WanAttentionBlock:
    """A block of self-attention and feed-forward alone."""
    return WanAttentionBlock(replace(config, text_dim=0), sdpa())


class ReferenceExtractor(nn.Module):
    """Blocks over the tokens of a reference, which has a place in height and width and none in time."""

    def __init__(self, config: WanConfig, layers: int, channels: int) -> None:
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.freq_dim = config.freq_dim
        self.patch_embedding = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(textless_block(config) for _ in range(layers))
        self.ref_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers + 1))

    def features(self, model: WanModel, latents: Tensor, timestep: Tensor, places: Tensor) -> list[Tensor]:
        """Projections [B, S, C] of the tokens before each block and behind the last one.

        latents [B, c, 1, h, w]; timestep [B]; places [S, D/2, 2]: positions.
        """
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        x = patches.flatten(2).transpose(1, 2).to(model.compute_dtype).contiguous()
        weight = self.time_embedding[0].weight
        time = self.time_embedding(sinusoidal_embedding(timestep[:, None], self.freq_dim).to(weight.dtype))
        mod = self.time_projection(time).float().unflatten(-1, (6, -1))
        read = BlockInputs(mod, None, places, Text(x[:, :0]), tuple(patches.shape[2:]))
        features = []
        for block, projection in zip(self.blocks, self.ref_blocks, strict=False):
            features.append(projection(x))
            with model.visit(block):
                x = block(x, read)
        return [*features, self.ref_blocks[-1](x)]
