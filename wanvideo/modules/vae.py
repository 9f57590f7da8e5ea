"""The Wan 2.1 and 2.2 video autoencoders: diffusers' AutoencoderKLWan behind the published key names.

Video is [3, F, H, W] in -1..1 with F = 4n+1; latents are [z, n+1, h, w], normalised per channel. Both directions run
chunk by chunk with the model's causal cache, so device memory does not grow with the length.
Source: Wan-Video/Wan2.1, Wan-Video/Wan2.2 (architecture, latent statistics), huggingface/diffusers (modules).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, open_checkpoint
from ..payloads import VAE_TIME_STRIDE
from .vae_keys import VaeLayout, read_layout, to_diffusers

if TYPE_CHECKING:
    from ...host import Host

log = logging.getLogger("wanvideo")

# Per-channel statistics of the 2.2 latents (Wan-Video/Wan2.2); diffusers' defaults are those of 2.1.
MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
MEAN_FIELD, STD_FIELD = "wanvideo.latents_mean", "wanvideo.latents_std"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Spatial tiles in pixels: width x, height y, and the distance between their starts. Overlaps are blended."""

    x: int = 272
    y: int = 272
    stride_x: int = 144
    stride_y: int = 128


class WanVAE:
    """A loaded Wan VAE under the host's memory management.

    latent_channels: 16 (2.1) or 48 (2.2); spatial_factor: pixels a side behind one latent, 8 or 16.
    """

    def __init__(
        self, model: nn.Module, layout: VaeLayout, statistics: tuple[Tensor, Tensor], *, dtype: torch.dtype, host: Host
    ) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self.model = model
        self.layout = layout
        self.dtype = dtype
        self.managed = host.manage(model)
        self._host = host
        self._mean, self._std = (s.float().view(-1, 1, 1, 1) for s in statistics)
        self._convs = {
            side: sum(isinstance(m, WanCausalConv3d) for m in getattr(model, side).modules())
            for side in ("encoder", "decoder")
        }

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.layout.z_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels a side behind one latent."""
        return self.layout.spatial_factor

    @torch.no_grad()
    def encode(self, video: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Video [3, F, H, W] in -1..1 -> normalised latents [z, (F - 1) / 4 + 1, H / 8, W / 8], float32 on the CPU.

        The mean of the posterior, as the models were trained on. Raises ValueError if F is not 4n+1 or a side does not
        divide by the spatial factor.
        """
        self._check_video(video)
        device = self.managed.acquire()
        if tile is None:
            latents = torch.cat(list(self._encode_chunks(video, device)), dim=1)
        else:
            latents = self._encode_tiled(video, tile, device)
        return (latents - self._mean) / self._std

    def encode_with_end(self, video: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Video of 4n+2 frames whose last frame, the end image, is encoded on its own as one more latent frame."""
        parts = (self.encode(video[:, :-1], tile=tile), self.encode(video[:, -1:], tile=tile))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Normalised latents [z, F, h, w] -> video [3, 4 (F - 1) + 1, H, W] in about -1..1, float32 on the CPU."""
        return torch.cat(list(self.decode_chunks(latents, tile=tile)), dim=1)

    @torch.no_grad()
    def decode_chunks(self, latents: Tensor, *, tile: Tile | None = None) -> Iterator[Tensor]:
        """As `decode`, handing the frames over as they are made: [3, f, H, W]. Tiles are handed over as one."""
        if latents.dim() != 4 or latents.shape[0] != self.latent_channels:
            raise ValueError(
                f"This VAE decodes latents of {self.latent_channels} channels but got the shape "
                f"{tuple(latents.shape)}: use the VAE that belongs to the model (2.2 for the 5B, else 2.1)."
            )
        device = self.managed.acquire()
        raw = latents.detach().float().cpu() * self._std + self._mean
        if tile is None:
            yield from self._decode_chunks(raw, device)
        else:
            yield self._decode_tiled(raw, tile, device)

    def _check_video(self, video: Tensor) -> None:
        frames, height, width = video.shape[1:]
        if (frames - 1) % VAE_TIME_STRIDE:
            raise ValueError(f"The VAE encodes 4n+1 frames but got {frames}; use {frames - (frames - 1) % 4}.")
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(
                f"The VAE needs sides that divide by {self.spatial_factor} but got {width}x{height}; resize the images."
            )

    def _encode_chunks(self, video: Tensor, device: torch.device) -> Iterator[Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        cache: list[Tensor | str | None] = [None] * self._convs["encoder"]
        frames = video.shape[1]
        starts = [0, *range(1, frames, VAE_TIME_STRIDE)]
        for start, stop in zip(starts, [*starts[1:], frames], strict=True):
            self._host.check_cancelled()
            chunk = video[None, :, start:stop].to(device, self.dtype)
            chunk = patchify(chunk, self.layout.patch or 1).contiguous()
            moments = self.model.quant_conv(self.model.encoder(chunk, feat_cache=cache, feat_idx=[0]))
            yield moments[0, : self.latent_channels].float().cpu()

    def _decode_chunks(self, raw: Tensor, device: torch.device) -> Iterator[Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache: list[Tensor | str | None] = [None] * self._convs["decoder"]
        for frame in range(raw.shape[1]):
            self._host.check_cancelled()
            chunk = self.model.post_quant_conv(raw[None, :, frame : frame + 1].to(device, self.dtype).contiguous())
            pixels = self.model.decoder(chunk, feat_cache=cache, feat_idx=[0], first_chunk=frame == 0)
            yield unpatchify(pixels, self.layout.patch or 1)[0].float().cpu()

    def _encode_tiled(self, video: Tensor, tile: Tile, device: torch.device) -> Tensor:
        factor = self.spatial_factor
        frames, height, width = video.shape[1:]
        shape = (self.latent_channels, (frames - 1) // VAE_TIME_STRIDE + 1, height // factor, width // factor)
        blend = _Blend(shape)
        for top, left, rows, columns in _tiles(shape[2:], tile, factor):
            pixels = video[:, :, top * factor : (top + rows) * factor, left * factor : (left + columns) * factor]
            part = torch.cat(list(self._encode_chunks(pixels, device)), dim=1)
            blend.add(part, top, left, tile, factor)
        return blend.result()

    def _decode_tiled(self, raw: Tensor, tile: Tile, device: torch.device) -> Tensor:
        factor = self.spatial_factor
        _, frames, height, width = raw.shape
        blend = _Blend((3, (frames - 1) * VAE_TIME_STRIDE + 1, height * factor, width * factor))
        for top, left, rows, columns in _tiles((height, width), tile, factor):
            part = raw[:, :, top : top + rows, left : left + columns]
            pixels = torch.cat(list(self._decode_chunks(part, device)), dim=1)
            blend.add(pixels, top * factor, left * factor, tile, 1)
        return blend.result()


def _tiles(size: tuple[int, int], tile: Tile, factor: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles (top, left, height, width) in latent cells that cover `size`; the last ones end at the border."""
    height, width = size
    for top, rows in _spans(height, max(tile.y // factor, 1), max(tile.stride_y // factor, 1)):
        for left, columns in _spans(width, max(tile.x // factor, 1), max(tile.stride_x // factor, 1)):
            yield top, left, rows, columns


def _spans(length: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start + size < length:
        yield start, size
        start += stride
    yield start, length - start


class _Blend:
    """Sums overlapping tiles with weights that fall linearly towards inner borders."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self._sum = torch.zeros(shape)
        self._weight = torch.zeros(1, 1, *shape[2:])

    def add(self, part: Tensor, top: int, left: int, tile: Tile, factor: int) -> None:
        """Put a tile [C, F, h, w] in place. factor: pixels a cell of this canvas stands for."""
        height, width = part.shape[2:]
        rows = self._ramp(height, (tile.y - tile.stride_y) // factor, top, self._sum.shape[2])
        columns = self._ramp(width, (tile.x - tile.stride_x) // factor, left, self._sum.shape[3])
        weight = rows[:, None] * columns[None, :]
        self._sum[:, :, top : top + height, left : left + width] += part * weight
        self._weight[:, :, top : top + height, left : left + width] += weight

    @staticmethod
    def _ramp(length: int, overlap: int, start: int, total: int) -> Tensor:
        weight = torch.ones(length)
        edge = min(overlap, length)
        if edge > 0:
            rise = (torch.arange(edge) + 1) / (edge + 1)
            if start > 0:
                weight[:edge] = torch.minimum(weight[:edge], rise)
            if start + length < total:
                weight[-edge:] = torch.minimum(weight[-edge:], rise.flip(0))
        return weight

    def result(self) -> Tensor:
        """The blended canvas."""
        return self._sum / self._weight


def load_vae(path: Path, *, dtype: torch.dtype, host: Host) -> WanVAE:
    """Load a Wan VAE under published, `model.`-prefixed or diffusers names, of any width.

    Raises ValueError if the file is no Wan VAE or lacks tensors.
    """
    checkpoint = open_checkpoint(path)
    names, layout = _names(checkpoint)
    with torch.device("meta"):
        model = build_vae(layout)
    wanted = dict(model.named_parameters())
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise ValueError(f"{path.name} lacks {len(missing)} tensors of the Wan VAE, first '{missing[0]}'; get it anew.")
    state = {}
    for name, parameter in wanted.items():
        value = checkpoint.tensor(names[name])
        if value.numel() != parameter.numel():
            raise ValueError(f"{path.name}: '{names[name]}' has the shape {tuple(value.shape)}, which does not fit.")
        state[name] = value.reshape(parameter.shape).to(dtype)
    model.load_state_dict(state, assign=True)
    unused = len(checkpoint.shapes) - len(wanted)
    log.info("%s: Wan VAE, %d tensors matched, %d unused.", path.name, len(wanted), unused)
    model = model.eval().requires_grad_(False)
    return WanVAE(model, layout, _statistics(checkpoint, layout), dtype=dtype, host=host)


def _names(checkpoint: Checkpoint) -> tuple[dict[str, str], VaeLayout]:
    """diffusers name -> name in the file, and the sizes."""
    plain = {key.removeprefix("model."): key for key in checkpoint.shapes}
    published = plain
    if "decoder.conv_in.weight" in plain:
        published = {from_diffusers: plain[key] for key in plain for from_diffusers in [_published(key, plain)]}
    try:
        layout = read_layout({key: checkpoint.shapes[name] for key, name in published.items()})
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{checkpoint.path.name} is no Wan VAE (it has no {error}): choose a Wan 2.1 or 2.2 VAE file."
        ) from error
    if published is plain:
        return {to_diffusers(key, layout): name for key, name in plain.items()}, layout
    return plain, layout


def _published(key: str, keys: dict[str, str]) -> str:
    """The published name of a diffusers name, as far as the sizes need it."""
    ends = {
        "encoder.conv_in.": "encoder.conv1.",
        "decoder.norm_out.": "decoder.head.0.",
        "post_quant_conv.": "conv2.",
    }
    for old, new in ends.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    nested = any(name.startswith("encoder.down_blocks.0.resnets.") for name in keys)
    if key.startswith("encoder.down_blocks.") and not nested:
        return key.replace("down_blocks", "downsamples").replace(".conv2.", ".residual.6.")
    if key.startswith("encoder.down_blocks."):
        key = key.replace("down_blocks", "downsamples").replace(".conv2.", ".residual.6.")
        # The sampler comes after all residual blocks of its stage.
        return key.replace(".resnets.", ".downsamples.").replace(".downsampler.", ".downsamples.99.")
    return key


def build_vae(layout: VaeLayout) -> nn.Module:
    """An untrained VAE of this layout."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=layout.base_dim,
        decoder_base_dim=layout.decoder_base_dim,
        z_dim=layout.z_dim,
        dim_mult=list(layout.stages),
        num_res_blocks=layout.res_blocks,
        temperal_downsample=list(layout.temporal),
        is_residual=layout.nested,
        in_channels=layout.channels,
        out_channels=layout.channels,
        patch_size=layout.patch,
        scale_factor_spatial=layout.spatial_factor,
    )


def _statistics(checkpoint: Checkpoint, layout: VaeLayout) -> tuple[Tensor, Tensor]:
    """Latent mean and standard deviation: the file's own, else those of the published VAE with as many channels."""
    if MEAN_FIELD in checkpoint.metadata:
        return tuple(torch.tensor(json.loads(checkpoint.metadata[field])) for field in (MEAN_FIELD, STD_FIELD))
    if layout.z_dim == len(MEAN_22):
        return torch.tensor(MEAN_22), torch.tensor(STD_22)
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        defaults = AutoencoderKLWan().config
    if layout.z_dim != len(defaults.latents_mean):
        raise ValueError(
            f"{checkpoint.path.name} has {layout.z_dim} latent channels but does not say their mean and deviation: "
            f"add {MEAN_FIELD} and {STD_FIELD} to its header."
        )
    return torch.tensor(defaults.latents_mean), torch.tensor(defaults.latents_std)
