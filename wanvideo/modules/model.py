"""The Wan transformer: patches of a noisy latent video in, velocity out.

Source: Wan-Video/Wan2.1 and Wan2.2. Module names are the published checkpoint keys. Other systems join through
`wanvideo/extension.py`; nothing here names one of them.

Shapes: B batch, L tokens, C channels, H heads, D head size, T text tokens, R rows of modulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import Attention, sdpa
from ..attention_plan import AttentionPlan
from ..conditioning import Payload, Step
from ..config import WanConfig
from ..extension import TRACED, Extension, overrides
from ..rope import UNSCALED, rope_table
from ..shard import ALONE, Ranks, Shard
from ..step_cache import Moment, StepMemory
from ..tokens import BlockInputs, Grid, ModelInputs, Text, Tokens, video_tokens
from .block import WanAttentionBlock
from .layers import Head, TimeProjection, sinusoidal_embedding
from .stretches import parts_of, stretches

Visit = Callable[[nn.Module], AbstractContextManager[None]]


class Active(NamedTuple):
    """An extension that runs in this forward, its place in the registry order, and its state."""

    place: int
    extension: Extension
    state: object


@contextmanager
def _having(model: object, name: str, value: object) -> Iterator[None]:
    before = getattr(model, name)
    setattr(model, name, value)
    try:
        yield
    finally:
        setattr(model, name, before)


class WanModel(nn.Module):
    """Wan transformer of any published size. Build it on the meta device; parameters come from a checkpoint."""

    def __init__(
        self, config: WanConfig, extensions: Sequence[Extension] = (), attention: Attention | None = None
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.extensions = tuple(extensions)
        self.visit: Visit = nullcontext
        self.ranks: Ranks = ALONE
        self.attention_plan: AttentionPlan | None = None
        self.tokens_at_once = 0
        self.rope_scales = UNSCALED
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size)
        if config.text_dim:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = TimeProjection(dim)
        self.blocks = nn.ModuleList(WanAttentionBlock(config, attention or sdpa()) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim * math.prod(config.patch_size), config.eps)
        for extension in self.extensions:
            extension.build(self)
        for block in self.blocks:
            block.extensions = self.extensions

    def stacks(self) -> dict[str, nn.ModuleList]:
        """All block lists by name, the transformer's own first."""
        others = (item for extension in self.extensions for item in extension.stacks(self).items())
        return {"blocks": self.blocks, **dict(others)}

    def reads(self, payload: Payload) -> bool:
        """Whether one of its systems takes this payload, or what its windows become."""
        return bool(self._takers(payload))

    def joins(self, payload: Payload) -> bool:
        """Whether the encoded pictures of a payload become channels; those that are tokens do not.

        Of what no system here takes nothing is known, and they may.
        """
        takers = self._takers(payload)
        return payload.encoded and (not takers or any(overrides(taker, "latents") for taker in takers))

    def _takers(self, payload: Payload) -> list[Extension]:
        kind = payload.part or type(payload)
        return [extension for extension in self.extensions if issubclass(kind, extension.payload)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of an embedding, which is never quantized."""
        return (self.text_embedding if self.config.text_dim else self.time_embedding)[0].weight.dtype

    def forward(self, inputs: ModelInputs, memory: StepMemory | None = None) -> Tensor:
        """Velocity [B, out_dim, F, H, W] float32. memory: of a step cache, which may leave blocks out.

        Raises ValueError if the channels or sizes of the latents do not fit, or a payload has no weights here.
        """
        if memory is None:
            return self._velocity(inputs, None)
        latents = inputs.latents[:, : self.config.out_dim]
        return memory.whole(latents, inputs.step, lambda: self._velocity(inputs, memory))

    def _velocity(self, inputs: ModelInputs, memory: StepMemory | None) -> Tensor:
        readers = self._readers(inputs.payloads)
        latents = inputs.latents
        for _, extension, payload in readers:
            latents = extension.latents(self, payload, latents, inputs)
        tokens, active = self._prepared(readers, inputs, self._embed(latents, inputs))

        grid, attention = tokens.grid, self._attention(inputs.step, tokens.grid)
        shard = self.ranks.shard(grid, tokens.x.shape[1])
        tokens = tokens.on(shard)
        active = [entry._replace(state=entry.extension.on(entry.state, shard)) for entry in active]
        # Nobody else holds the sequence while the blocks run, so that each block's result takes its place.
        sequence, tokens = [tokens.x], tokens._replace(x=tokens.x[:0].clone())
        if memory is None:
            x = self._run_blocks(sequence.pop(), tokens, active, attention, shard)
        else:
            moment = Moment(tokens.embedding, tokens.mod, sequence.pop())
            run = partial(self._run_blocks, moment.tokens, tokens, active, attention, shard)
            x = memory.blocks(moment, inputs.step, run)
        for entry in active:
            entry.extension.after_blocks(self, x, entry.state)
        count = video_tokens(tokens.grid)
        rows = None if tokens.rows is None else tokens.rows[:count]
        patches = self.head(x[:, :count], tokens.embedding, rows, self.parts(x.shape))
        return self._unpatchify(shard.frames(patches), grid)

    def _prepared(
        self, readers: Sequence[tuple[int, Extension, Payload]], inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, list[Active]]:
        """The sequence that the blocks read, and the extensions that have something to do with it.

        Apart from the forward, whose frame would hold the states as they are here, when blocks have changed them.
        """
        active = []
        for place, extension, payload in readers:
            tokens, state = extension.prepare(self, payload, inputs, tokens)
            if state is not None:
                active.append(Active(place, extension, state))
        return tokens, active

    def _run_blocks(
        self, x: Tensor, tokens: Tokens, active: Sequence[Active], attention: Sequence[Attention | None], shard: Shard
    ) -> Tensor:
        """The tokens x [B, L, C] behind the last block; `tokens` has all else. attention: of each block."""
        parts = self.parts(x.shape)
        for index, backend in enumerate(attention):
            if any(entry.extension.skips(entry.state, index) for entry in active):
                continue
            read = (tokens.mod, tokens.rows, tokens.rope, tokens.text, tokens.grid)
            inputs = BlockInputs(*read, backend, parts=parts, shard=shard)
            conds = self._conds(index, active)
            with ExitStack() as stack:
                for module in (self.blocks[index], *self._companions(index, active)):
                    stack.enter_context(self.visit(module))
                x = self.blocks[index](x, inputs, conds)
                for entry in active:
                    x = entry.extension.beside_block(self, index, x, inputs, entry.state)
            shared = (c if e.weightless else None for e, c in zip(self.extensions, conds, strict=True))
            inputs = inputs._replace(conds=tuple(shared))
            for entry in active:
                x = entry.extension.after_block(self, index, x, inputs, entry.state)
        return x

    def _companions(self, index: int, active: Sequence[Active]) -> list[nn.Module]:
        """What must be on the device while block `index` runs, besides it."""
        return [module for entry in active for module in entry.extension.companions(self, index)]

    def _embed(self, latents: Tensor, inputs: ModelInputs) -> Tokens:
        config = self.config
        if latents.shape[1] != config.in_dim:
            raise ValueError(
                f"The model reads {config.in_dim} latent channels but noise and connected images give "
                f"{latents.shape[1]}: an image-to-video model needs WanVideoImageToVideoEncode, a text-to-video model "
                "WanVideoEmptyEmbeds."
            )
        sizes = latents.shape[2:]
        if any(size % patch for size, patch in zip(sizes, config.patch_size, strict=True)):
            raise ValueError(f"Latent sizes {tuple(sizes)} are not multiples of the patch {config.patch_size}.")
        x, grid = self._patches(latents)
        embedding = self._time(inputs.timestep if inputs.timestep.dim() == 2 else inputs.timestep[:, None])
        rows = None
        if embedding.shape[1] > 1:
            rows = torch.arange(grid[0], device=x.device).repeat_interleave(grid[1] * grid[2])
        return Tokens(
            x=x,
            mod=self.modulation(embedding),
            rows=rows,
            rope=self.rope(grid, riflex_index=inputs.riflex_index, device=x.device),
            grid=grid,
            text=Text(self.embed_text(inputs.text, x.dtype)),
            embedding=embedding.float(),
            latents=latents,
        )

    def _time(self, timestep: Tensor) -> Tensor:
        """Time embedding [B, R, C] of timesteps [B, R]."""
        sinusoids = sinusoidal_embedding(timestep, self.config.freq_dim)
        return self.time_embedding(sinusoids.to(self.time_embedding[0].weight.dtype))

    def _patches(self, latents: Tensor) -> tuple[Tensor, Grid]:
        """Tokens [B, L, C] of latents, and their grid. The convolution is in float32, in pieces of some frames."""
        frames, height, width = grid = tuple(
            int(size) // patch for size, patch in zip(latents.shape[2:], self.config.patch_size, strict=True)
        )
        x = torch.empty(
            latents.shape[0], math.prod(grid), self.config.dim, dtype=self.compute_dtype, device=latents.device
        )
        places, time = height * width, self.config.patch_size[0]
        for part in stretches(frames, min(self.parts(x.shape), frames)):
            piece = latents[:, :, part.start * time : part.stop * time].to(self.patch_embedding.weight.dtype)
            x[:, part.start * places : part.stop * places] = self.patch_embedding(piece).flatten(2).transpose(1, 2)
        return x, grid

    def parts(self, shape: Sequence[int]) -> int:
        """In how many pieces the layers that compute every token alone run for tokens of this shape [B, L, ...]."""
        return parts_of(shape[0] * shape[1], self.tokens_at_once)

    def modulation(self, embedding: Tensor) -> Tensor:
        """Time embedding [B, R, C] -> rows of modulation [B, R, 6, C] float32."""
        embedding = embedding.to(self.time_embedding[0].weight.dtype)
        return self.time_projection(embedding).float()

    def clean_modulation(self) -> Tensor:
        """Modulation [1, 1, 6, C] float32 of time 0: of tokens that hold no noise."""
        return self.modulation(self._time(torch.zeros(1, 1, device=self.time_embedding[0].weight.device)))

    def rope(
        self,
        grid: Grid,
        *,
        start: Grid = (0, 0, 0),
        riflex_index: int = 0,
        riflex_frames: int | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Rotations [tokens, D/2, 2] of a grid whose first token is at position `start`; RIFLEx as in `rope_table`."""
        return rope_table(
            grid,
            self.config.head_dim,
            start=start,
            base_scales=self.rope_scales,
            riflex_index=riflex_index,
            riflex_frames=riflex_frames,
            device=device,
        )

    def embed_text(self, text: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Prompts [tokens, text_dim] each -> [B, T, C] in `dtype`, padded to the model's text length.

        T is 0 where the model reads no text.
        """
        if not self.config.text_dim:
            return self.time_embedding[0].weight.new_zeros(len(text), 0, self.config.dim, dtype=dtype)
        length = max(self.config.text_len, *(t.shape[0] for t in text))
        padded = torch.stack([F.pad(t, (0, 0, 0, length - t.shape[0])) for t in text])
        return self.text_embedding(padded.to(self.compute_dtype)).to(dtype)

    def _attention(self, step: Step, grid: Grid) -> tuple[Attention | None, ...]:
        """The backend of each block's self-attention in this step."""
        count = len(self.blocks)
        return (None,) * count if self.attention_plan is None else self.attention_plan.at(step, grid, count)

    def attending(self, plan: AttentionPlan) -> AbstractContextManager[None]:
        """Inside, self-attention runs by this plan."""
        return _having(self, "attention_plan", plan)

    def shared_by(self, ranks: Ranks) -> AbstractContextManager[None]:
        """Inside, these processes share the forwards."""
        return _having(self, "ranks", ranks)

    def sparing(self, tokens_at_once: int) -> AbstractContextManager[None]:
        """Inside, layers that compute every token alone take so many tokens at once; 0 stands for all.

        Equal to the bit where a product's kernel does not depend on how many rows it has, which cuBLAS never promised.
        """
        return _having(self, "tokens_at_once", tokens_at_once)

    def turning(self, base_scales: tuple[float, float, float]) -> AbstractContextManager[None]:
        """Inside, positions turn by bases scaled as in `rope_table`."""
        return _having(self, "rope_scales", base_scales)

    def _readers(self, payloads: Sequence[Payload]) -> list[tuple[int, Extension, Payload]]:
        """(place, extension, payload) of every extension that has a payload, in registry order."""
        readers = []
        unread = list(payloads)
        for place, extension in enumerate(self.extensions):
            mine = [payload for payload in unread if isinstance(payload, extension.payload)]
            if len(mine) > 1:
                raise ValueError(f"The model was given {extension.payload.__name__} twice; connect only one.")
            for payload in mine:
                unread.remove(payload)
                readers.append((place, extension, payload))
        if unread:
            raise ValueError(unread[0].needs)
        return readers

    def _conds(self, index: int, active: Sequence[Active]) -> tuple[NamedTuple | None, ...]:
        conds: list[NamedTuple | None] = [None] * len(self.extensions)
        for entry in active:
            if any(overrides(entry.extension, name) for name in (*TRACED, "block_cond")):
                conds[entry.place] = entry.extension.block_cond(entry.state, index)
        return tuple(conds)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (frames, height, width), (pt, ph, pw) = grid, self.config.patch_size
        cells = patches.float().reshape(patches.shape[0], frames, height, width, pt, ph, pw, self.config.out_dim)
        video = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.reshape(video.shape[0], self.config.out_dim, frames * pt, height * ph, width * pw)
