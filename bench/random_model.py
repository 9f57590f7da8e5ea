"""Wan transformers of published sizes with random weights, loaded by the pack's own loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..clip_image.extension import ClipImage, ClipImageExtension
from ..host import Host
from ..image_to_video.extension import ImageCondition, ImageToVideo
from ..multitalk.extension import AudioWindow, MultiTalk
from ..registry import SYSTEMS
from ..wanvideo.block_swap import BlockSwapArgs
from ..wanvideo.checkpoint import checkpoint_of
from ..wanvideo.conditioning import Payload
from ..wanvideo.config import PUBLISHED_CONFIGS, WanConfig
from ..wanvideo.frames import VAE_TIME_STRIDE, latent_frames
from ..wanvideo.load_plan import LoadOptions, contents_of, options_applied
from ..wanvideo.loading import WanVideoModel, build
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tensor_file import StoredTensor
from ..wanvideo.tokens import ModelInputs

# "tiny" is no model: it shows that the command works.
MODELS = {**PUBLISHED_CONFIGS, "tiny": WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=4, text_dim=64)}
DTYPE = torch.bfloat16
PROMPT_TOKENS = 200
CLIP_TOKENS, CLIP_DIM = 257, 1280
POOL, SPREAD = 2**24, 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """What runs. model: a key of MODELS; size: (width, height, frames) in pixels; speakers: 0 is text to video."""

    model: str
    size: tuple[int, int, int]
    speakers: int = 0
    quantization: str = "disabled"
    attention: str = "sdpa"

    @cached_property
    def config(self) -> WanConfig:
        """Of the model; a talking one reads a picture, too."""
        config = MODELS[self.model]
        return replace(config, in_dim=2 * config.out_dim + 4) if self.speakers else config

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the latents. Raises ValueError for a size that the model cannot make."""
        width, height, frames = self.size
        side = self.config.token_side
        if width % side or height % side:
            raise ValueError(f"{width}x{height} is no size of {self.model}: give multiples of {side}.")
        if frames < 1 or frames % VAE_TIME_STRIDE != 1:
            raise ValueError(f"{frames} frames are no video of {self.model}: give 4n+1, such as 81.")
        return latent_frames(frames), height * 2 // side, width * 2 // side

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        frames, height, width = self.latent_size
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> int:
        """Of a whole video."""
        return math.prod(self.grid)


class RandomFile:
    """A checkpoint whose values are drawn from a pool of random numbers: norm weights near 1, all else near 0."""

    metadata: Mapping[str, str] = {}

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
        self.path = Path(f"random_{name}.safetensors")
        self.tensors = {key: StoredTensor(shape=shape, format="BF16") for key, shape in shapes.items()}
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """A new tensor in any case."""
        shape = self.tensors[name].shape
        count = math.prod(shape)
        values = self._pool.repeat(-(-count // POOL))[:count].clone().reshape(shape)
        return values + 1 if "norm" in name and name.endswith("weight") else values


def load(case: Case, blocks: int, host: Host, swap: BlockSwapArgs | None = None) -> WanVideoModel:
    """The first `blocks` blocks of it. Raises ValueError for an option that cannot run here."""
    file = RandomFile(shapes_of(case, blocks), case.model)
    options = LoadOptions(
        base_dtype=DTYPE, quantization=case.quantization, attention_mode=case.attention, block_swap=swap
    )
    files = contents_of(checkpoint_of(file.path, (file,)), options, SYSTEMS)
    return build(options_applied(files, options, host), options, host)


def shapes_of(case: Case, blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a file with the first `blocks` blocks."""
    config = replace(case.config, num_layers=blocks)
    with torch.device("meta"):
        model = WanModel(config, _extensions(config) if case.speakers else ())
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _extensions(config: WanConfig) -> tuple[object, ...]:
    speech = MultiTalk(
        features=12 * 768, intermediate_dim=512, context_tokens=32, output_dim=768,
        voiced=tuple(range(config.num_layers)),
    )  # fmt: skip
    return ImageToVideo(), ClipImageExtension(clip_dim=CLIP_DIM), speech


def _places(case: Case, device: torch.device) -> Tensor | None:
    """Where the speakers are, side by side: [P, height, width], None for one."""
    if case.speakers == 1:
        return None
    width, height, _ = case.size
    owner = torch.arange(width, device=device) * case.speakers // width
    return (owner == torch.arange(case.speakers, device=device)[:, None]).float()[:, None].expand(-1, height, -1)


def inputs_of(case: Case, device: torch.device) -> ModelInputs:
    """Random latents, prompt, and for a talking model a picture and voices, each on a part of the width."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    size, channels = case.latent_size, case.config.out_dim
    payloads: tuple[Payload, ...] = ()
    if case.speakers:
        payloads = (
            ImageCondition(random(1, channels, *size), random(1, 4, *size)),
            ClipImage(random(1, CLIP_TOKENS, CLIP_DIM)),
            AudioWindow(
                random(1, case.speakers, case.size[2], 5, 12, 768), torch.ones((), device=device), _places(case, device)
            ),
        )
    return ModelInputs(
        latents=random(1, channels, *size, dtype=torch.float32),
        timestep=torch.tensor([500.0], device=device),
        text=(random(PROMPT_TOKENS, case.config.text_dim),),
        payloads=payloads,
    )
