"""The Wan 2.1 and 2.2 video autoencoders: diffusers' AutoencoderKLWan behind the published key names.

Video is [3, F, H, W] in -1..1 with F = 4n+1; latents are [z, n+1, h, w], normalized per channel. Both directions run
chunk by chunk with the model's causal cache, so device memory does not grow with the length.
Source: Wan-Video/Wan2.1, Wan-Video/Wan2.2 (architecture, latent statistics), huggingface/diffusers (modules).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...quiet_imports import kernels_hidden
from ..assign import assign
from ..checkpoint import Checkpoint, open_checkpoint
from ..frames import VAE_TIME_STRIDE, latent_frames, round_frames
from ..opaque import Opaque
from ..shard import ALONE, Ranks
from .hand_over import to_device, to_host
from .vae_keys import VaeLayout, file_names, read_layout
from .vae_stream import VaeStream

if TYPE_CHECKING:
    from ...host import Host

# Per-channel statistics of the latents (Wan-Video/Wan2.1, Wan-Video/Wan2.2).
MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
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
    """Spatial tiles in pixels: width x, height y, and the distance between their starts. Overlaps are blended.

    Rounded down to whole latents. Raises ValueError if the tiles would leave gaps.
    """

    x: int = 272
    y: int = 272
    stride_x: int = 144
    stride_y: int = 128

    def __post_init__(self) -> None:
        if not (0 < self.stride_x <= self.x and 0 < self.stride_y <= self.y):
            raise ValueError(
                f"Tiles of {self.x}x{self.y} pixels every {self.stride_x}x{self.stride_y} pixels leave gaps: make the "
                "strides smaller than the tiles."
            )


class WanVAE(Opaque):
    """A loaded Wan VAE under the host's memory management.

    latent_channels: 16 (2.1) or 48 (2.2); spatial_factor: pixels a side behind one latent, 8 or 16. recipe: loads it
    once more, given a host, and can be pickled; None where it came from no file.
    """

    recipe: Callable[..., WanVAE] | None = None

    def __init__(
        self, model: nn.Module, layout: VaeLayout, statistics: tuple[Tensor, Tensor], *, dtype: torch.dtype, host: Host
    ) -> None:
        self.model = model
        self.layout = layout
        self.dtype = dtype
        self.managed = host.manage(model)
        self._host = host
        self._mean, self._std = (s.float().view(-1, 1, 1, 1) for s in statistics)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.layout.z_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels a side behind one latent."""
        return self.layout.spatial_factor

    def encode(
        self, video: Tensor, *, tile: Tile | None = None, quiet: bool = False, ranks: Ranks = ALONE
    ) -> Tensor:
        """Video [3, F, H, W] in -1..1 -> normalized latents [z, (F - 1) / 4 + 1, h, w], float32 on the CPU.

        The mean of the posterior, as the models were trained on. quiet: no progress bar. ranks: processes that all
        encode this video and share its tiles. Raises ValueError if F is not 4n+1 or a side does not divide by the
        spatial factor.
        """
        self._check_video(video)
        factor = self.spatial_factor
        regions = _regions(video.shape[2] // factor, video.shape[3] // factor, tile=tile, factor=factor, scale=1)
        sources = [video[:, :, r.rows.cells(factor), r.columns.cells(factor)] for r in regions]
        frames = latent_frames(video.shape[1])
        label = "" if quiet else "VAE encoding"
        parts = [partial(self._encode_chunks, source) for source in sources]
        chunks = self._run(parts, regions, count=frames, scale=1, label=label, ranks=ranks)
        return (torch.cat(list(chunks), dim=1) - self._mean) / self._std

    def encode_with_end(self, video: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Video of 4n+2 frames -> n+2 latent frames: the last frame, the end image, is encoded on its own.

        Raises ValueError as `encode`.
        """
        if video.dim() == 4 and video.shape[1] % VAE_TIME_STRIDE != 2:
            raise ValueError(
                f"The VAE encodes 4n+1 frames and an end image but got {video.shape[1]} frames; give one of 4n+2."
            )
        return torch.cat((self.encode(video[:, :-1], tile=tile), self.encode(video[:, -1:], tile=tile)), dim=1)

    def latents_of(self, samples: Mapping[str, object]) -> Tensor:
        """What `decode` reads of a LATENT: [z, F, h, w] float32. What a VAE reads beside latents, it reads as channels.

        Raises ValueError where it is not there.
        """
        return samples["samples"][0].float()

    def decode(
        self, latents: Tensor, *, tile: Tile | None = None, quiet: bool = False, ranks: Ranks = ALONE
    ) -> Tensor:
        """Normalized latents [z, F, h, w] -> video [3, 4 (F - 1) + 1, H, W] in about -1..1, float32 on the CPU.

        quiet: no progress bar. ranks: as `decode_chunks`. Raises ValueError if the latents are not this VAE's.
        """
        chunks = self.decode_chunks(latents, tile=tile, quiet=quiet, ranks=ranks)
        factor = self.spatial_factor
        _, frames, height, width = latents.shape
        video = torch.empty(3, VAE_TIME_STRIDE * (frames - 1) + 1, height * factor, width * factor)
        done = 0
        for chunk in chunks:
            video[:, done : done + chunk.shape[1]] = chunk
            done += chunk.shape[1]
        return video

    def decode_chunks(
        self, latents: Tensor, *, tile: Tile | None = None, quiet: bool = False, ranks: Ranks = ALONE
    ) -> Iterator[Tensor]:
        """As `decode`, but yields the frames [3, f, H, W] as they are made, and keeps none.

        ranks: processes that all decode these latents and share their tiles.
        """
        self._check_latents(latents)
        factor = self.spatial_factor
        raw = latents.detach().float().cpu() * self._std + self._mean
        regions = _regions(*latents.shape[2:], tile=tile, factor=factor, scale=factor)
        sources = [raw[:, :, r.rows.cells(1), r.columns.cells(1)] for r in regions]
        frames = latents.shape[1]
        label = "" if quiet else "VAE decoding"
        parts = [partial(self._decode_chunks, source) for source in sources]
        return self._run(parts, regions, count=frames, scale=factor, label=label, ranks=ranks)

    def _check_video(self, video: Tensor) -> None:
        if video.dim() != 4 or video.shape[0] != 3 or not video.numel():
            raise ValueError(
                f"The VAE encodes video of the shape [3, frames, height, width] but got {tuple(video.shape)}; drop "
                "other channels, and give at least one frame."
            )
        frames, height, width = video.shape[1:]
        if round_frames(frames) != frames:
            raise ValueError(f"The VAE encodes 4n+1 frames but got {frames}; give {round_frames(frames)}.")
        factor = self.spatial_factor
        if height % factor or width % factor:
            raise ValueError(
                f"The VAE needs sides that divide by {factor} but got {width}x{height}; resize the images to "
                f"{max(width // factor, 1) * factor}x{max(height // factor, 1) * factor}."
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.dim() != 4 or latents.shape[0] != self.latent_channels or not latents.numel():
            raise ValueError(
                f"This VAE decodes latents of {self.latent_channels} channels but got the shape "
                f"{tuple(latents.shape)}: use the VAE that belongs to the model (2.2 for the 5B, else 2.1)."
            )

    @torch.no_grad()
    def _run(
        self,
        chunks_of: Sequence[Callable[[torch.device], Iterator[Tensor]]],
        regions: Sequence[_Region],
        *,
        count: int,
        scale: int,
        label: str,
        ranks: Ranks,
    ) -> Iterator[Tensor]:
        """The chunks of the whole: as they come for one region, else blended once all regions are through.

        Regions go one after the other, each with all its chunks, so that the device holds one region's cache. They are
        added up in one order however many ranks made them, so that the sum is the same. An empty label shows no
        progress.
        """
        device = self.managed.acquire()
        size = (regions[-1].rows.stop * scale, regions[-1].columns.stop * scale)
        blended: list[Tensor] = []
        bar = self._host.progress(len(regions) * count, label) if label else nullcontext()
        parts = [lambda chunks=chunks: to_host(chunks(device)) for chunks in chunks_of]
        # A rank that waits for one region would make the same in that time.
        spread = (ranks if len(regions) > 1 else ALONE).spread(parts)
        with bar as progress:
            for number, (region, chunks) in enumerate(zip(regions, spread, strict=True)):
                for index, chunk in enumerate(chunks):
                    if progress is not None:
                        progress.update(number * count + index + 1)
                    if len(regions) == 1:
                        yield chunk
                        continue
                    if index == len(blended):
                        blended.append(torch.zeros(*chunk.shape[:2], *size))
                    place = blended[index][:, :, region.rows.cells(scale), region.columns.cells(scale)]
                    place += chunk * region.rows.weight[:, None] * region.columns.weight
        while blended:
            yield blended.pop(0)

    def _encode_chunks(self, video: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Posterior means [z, 1, h, w]: of the first frame, then of four frames at a time."""
        patchify, stream = _diffusers_wan().patchify, VaeStream()
        for chunk in video.split([1] + [VAE_TIME_STRIDE] * (latent_frames(video.shape[1]) - 1), dim=1):
            self._host.check_cancelled()
            pixels = patchify(to_device(chunk[None], device).to(self.dtype), self.layout.patch)
            yield self.model.quant_conv(stream.encode(self.model.encoder, pixels))[0, : self.latent_channels]

    def _decode_chunks(self, raw: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Frames [3, f, H, W] of each latent frame: one of the first, four of the others."""
        unpatchify, stream = _diffusers_wan().unpatchify, VaeStream()
        for frame in raw.split(1, dim=1):
            self._host.check_cancelled()
            latent = self.model.post_quant_conv(to_device(frame[None], device).to(self.dtype))
            yield unpatchify(stream.decode(self.model.decoder, latent).contiguous(), self.layout.patch)[0]


class _Span(NamedTuple):
    """Latents start..stop along one side, and their weight among the spans that overlap, one value a result cell."""

    start: int
    stop: int
    weight: Tensor

    def cells(self, scale: int) -> slice:
        """Where the span lies in a tensor of `scale` cells a latent."""
        return slice(self.start * scale, self.stop * scale)


class _Region(NamedTuple):
    rows: _Span
    columns: _Span


def _regions(height: int, width: int, *, tile: Tile | None, factor: int, scale: int) -> list[_Region]:
    """Regions that cover height x width latents, row by row; without a tile one. scale: result cells a latent."""
    if tile is None:
        sizes = ((height, height), (width, width))
    else:
        sides = (tile.y, tile.stride_y), (tile.x, tile.stride_x)
        sizes = tuple((max(size // factor, 1), max(stride // factor, 1)) for size, stride in sides)
    rows, columns = (_spans(side, *size, scale=scale) for side, size in zip((height, width), sizes, strict=True))
    return [_Region(row, column) for row in rows for column in columns]


def _spans(length: int, size: int, stride: int, *, scale: int) -> list[_Span]:
    """Spans of `size` every `stride`, the last one up to `length`; weights ramp over the overlaps and sum to 1."""
    starts = [0]
    while starts[-1] + size < length:
        starts.append(starts[-1] + stride)
    spans = []
    for start in starts:
        stop = min(start + size, length)
        ramp = ((torch.arange((stop - start) * scale) + 1.0) / ((size - stride) * scale + 1)).clamp(max=1)
        weight = ramp if start else torch.ones_like(ramp)
        spans.append(_Span(start, stop, weight if stop == length else weight.minimum(ramp.flip(0))))
    total = torch.zeros(length * scale)
    for span in spans:
        total[span.cells(scale)] += span.weight
    return [span._replace(weight=span.weight / total[span.cells(scale)]) for span in spans]


def load_vae(path: Path, *, dtype: torch.dtype, host: Host) -> WanVAE:
    """Load a Wan VAE of any width: published names, with `model.` in front or not, or diffusers' names.

    Raises FileNotFoundError, or ValueError if the file is no Wan VAE, is truncated or lacks tensors.
    """
    checkpoint = open_checkpoint(path)
    names = file_names(checkpoint.shapes)
    try:
        layout = read_layout({name: checkpoint.shapes[key] for name, key in names.items()})
    except KeyError as error:
        raise ValueError(
            f"{path.name} is no Wan VAE (it has no {error}): choose the file of a Wan 2.1 or 2.2 VAE."
        ) from error
    statistics = _statistics(checkpoint, layout)
    with torch.device("meta"):
        model = build_vae(layout)
    assign(model, checkpoint, names, dtype=dtype, what="Wan VAE")
    channels_last(model)
    vae = WanVAE(model, layout, statistics, dtype=dtype, host=host)
    vae.recipe = partial(load_vae, path, dtype=dtype)
    return vae


def build_vae(layout: VaeLayout) -> nn.Module:
    """An untrained VAE of this layout."""
    return _diffusers_wan().AutoencoderKLWan(
        base_dim=layout.base_dim,
        decoder_base_dim=layout.decoder_base_dim,
        z_dim=layout.z_dim,
        dim_mult=list(layout.stages),
        num_res_blocks=layout.res_blocks,
        temperal_downsample=list(layout.temporal),
        is_residual=layout.nested,
        in_channels=layout.channels,
        out_channels=layout.channels,
        patch_size=layout.patch if layout.nested else None,
        scale_factor_spatial=layout.spatial_factor,
    )


@functools.cache
def _diffusers_wan() -> ModuleType:
    """diffusers' module of the Wan VAE, which is slow to load and therefore loaded when it is needed."""
    with kernels_hidden("diffusers"):
        from diffusers.models.autoencoders import autoencoder_kl_wan

    return autoencoder_kl_wan


def channels_last(model: nn.Module) -> None:
    """Put the convolutions into the memory layout that cuDNN is fast with."""
    # cuDNN's fast kernels want this layout: on an H200 in bf16 it takes a tenth of the time and the memory away.
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _statistics(checkpoint: Checkpoint, layout: VaeLayout) -> tuple[Tensor, Tensor]:
    """Latent mean and standard deviation [z]: the file's own, else those of the published VAE with as many channels."""
    if MEAN_FIELD in checkpoint.metadata or STD_FIELD in checkpoint.metadata:
        return _stated(checkpoint, MEAN_FIELD, layout.z_dim), _stated(checkpoint, STD_FIELD, layout.z_dim)
    for mean, std in ((MEAN_21, STD_21), (MEAN_22, STD_22)):
        if len(mean) == layout.z_dim:
            return torch.tensor(mean), torch.tensor(std)
    raise ValueError(
        f"{checkpoint.path.name} has {layout.z_dim} latent channels but does not say their mean and deviation: add "
        f"{MEAN_FIELD} and {STD_FIELD} to its header, JSON lists of {layout.z_dim} numbers."
    )


def _stated(checkpoint: Checkpoint, field: str, channels: int) -> Tensor:
    wrong = ValueError(
        f"{checkpoint.path.name}: the header field {field} must be a JSON list of {channels} numbers; correct it, or "
        "take both statistics out for the published ones."
    )
    try:
        values = torch.tensor(json.loads(checkpoint.metadata.get(field, "")), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if values.shape != (channels,):
        raise wrong
    return values
