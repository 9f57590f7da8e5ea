"""The Wan transformer: patches of a noisy latent video in, velocity out.

Source: Wan-Video/Wan2.1 and Wan2.2. Module names are the published checkpoint keys. Other systems join through
`wanvideo/extension.py`; nothing here names one of them.

Shapes: B batch, L tokens, C channels, H heads, D head size, T text tokens, R rows of modulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import Attention, AttentionCall, FusedAttention, attend, sdpa
from ...kernels.fp8_rows import Fp8Rows
from ...quantized.linear import all_take_rows, shared_input
from ...tensor_layout import dense
from ..attention_plan import AttentionPlan
from ..conditioning import Payload, Step
from ..config import WanConfig
from ..extension import TRACED, Extension, Hooks, hooked, overrides, run_hooks
from ..rope import rope_table
from ..step_cache import Moment, StepMemory
from ..tokens import BlockInputs, Grid, Heads, KeysValues, ModelInputs, Text, Tokens, video_tokens
from .layers import (
    FeedForward,
    Head,
    WanLayerNorm,
    WanRMSNorm,
    gated_residual,
    modulate,
    normalize,
    per_token,
    placed_heads,
    sinusoidal_embedding,
)

Visit = Callable[[nn.Module], AbstractContextManager[None]]


class WanSelfAttention(nn.Module):
    """Attention of all video tokens to each other."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__()
        dim = config.dim
        self.heads = (config.num_heads, config.head_dim)
        self.attention = attention
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, config.eps)
        self.norm_k = WanRMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, H, D]."""
        return dense(x).unflatten(-1, self.heads)

    def project(self, out: Tensor | Fp8Rows) -> Tensor:
        """Heads [B, L, H, D], or rows [B, L, C], through the output projection: [B, L, C]."""
        return self.o(out if isinstance(out, Fp8Rows) else out.flatten(2).contiguous())

    def readers(self) -> tuple[nn.Module, ...]:
        """The linear layers that read the normalized video tokens."""
        return self.q, self.k, self.v

    def forward(
        self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: WanAttentionBlock
    ) -> tuple[Tensor, Hooks]:
        """x [B, L, C] modulated -> [B, L, C], before gate and residual."""
        attention = inputs.attention or self.attention
        x = shared_input(x, *self.readers())
        q, k, v = self.q(x), self.k(x), self.split(self.v(x))
        read = hooked("self_attn", hooks)
        fused = None if read or hooked("attend", hooks) else self._fused(attention)
        if fused is not None:
            heads = Heads(None, None, fused(q, k, v, self.norm_q, self.norm_k, inputs.rope))
        else:
            q = placed_heads(self.norm_q, q, inputs.rope, self.heads)
            k = placed_heads(self.norm_k, k, inputs.rope, self.heads)
            call, hooks = run_hooks("attend", block, AttentionCall(q, k, v), hooks)
            out = attend(attention, call)
            heads = Heads(call.q if read else None, call.k if read else None, out)
        heads, hooks = run_hooks("self_attn", block, heads, hooks)
        return self.project(heads.out), hooks

    def _fused(self, attention: Attention) -> Callable[..., Tensor | Fp8Rows] | None:
        """The backend's form that takes projections as they are, if it has one: in rows where `o` reads rows."""
        if not isinstance(attention, FusedAttention):
            return None
        return attention.fused_rows if all_take_rows((self.o,)) else attention.fused


class WanT2VCrossAttention(WanSelfAttention):
    """Attention of video tokens to the text."""

    def readers(self) -> tuple[nn.Module, ...]:
        """Only the queries are of the video tokens."""
        return (self.q,)

    def keys_values(self, text: Tensor) -> KeysValues:
        """Embedded text [B, T, C] -> k, v [B, T, H, D]."""
        shared = shared_input(text, self.k, self.v)
        return KeysValues(self.split(self.norm_k(self.k(shared))), self.split(self.v(shared)))

    def forward(
        self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: WanAttentionBlock
    ) -> tuple[Tensor, Hooks]:
        """x [B, L, C] -> [B, L, C], before the residual."""
        q = self.split(self.norm_q(self.q(x)))
        heads, hooks = run_hooks("cross_attn", block, Heads(q, None, inputs.text.attend(self, q)), hooks)
        return self.project(heads.out), hooks


class WanI2VCrossAttention(WanT2VCrossAttention):
    """Text cross-attention whose module also holds the keys and values of CLIP image tokens."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.k_img = nn.Linear(config.dim, config.dim)
        self.v_img = nn.Linear(config.dim, config.dim)
        self.norm_k_img = WanRMSNorm(config.dim, config.eps)

    def image_keys_values(self, tokens: Tensor) -> KeysValues:
        """Image tokens [B, N, C] -> k, v [B, N, H, D]."""
        shared = shared_input(tokens, self.k_img, self.v_img)
        return KeysValues(self.split(self.norm_k_img(self.k_img(shared))), self.split(self.v_img(shared)))


class WanAttentionBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward, each behind a norm, with the extensions' hooks between."""

    def __init__(self, config: WanConfig, attention: Attention) -> None:
        super().__init__()
        self.extensions: tuple[Extension, ...] = ()
        self.norm1 = WanLayerNorm(config.dim, config.eps)
        self.self_attn = WanSelfAttention(config, attention)
        self.norm3 = WanLayerNorm(config.dim, config.eps, elementwise_affine=True)
        self.cross_attn = WanT2VCrossAttention(config, sdpa())
        self.norm2 = WanLayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, inputs: BlockInputs, conds: tuple[NamedTuple | None, ...] = ()) -> Tensor:
        """x [B, L, C] -> [B, L, C]; conds: one entry per extension of the model, None where it is idle."""
        hooks = tuple((e, c) for e, c in zip(self.extensions, conds, strict=True) if c is not None)
        rows = (self.modulation.to(inputs.mod.dtype).unsqueeze(1) + inputs.mod).unbind(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (per_token(row, inputs.rows) for row in rows)

        y = modulate(self.norm1, x, shift, scale, self.self_attn.readers())
        y, hooks = self.self_attn(y, inputs, hooks, self)
        y, hooks = run_hooks("self_attn_output", self, y, hooks)
        x = gated_residual(x, y, gate)

        y, hooks = self.cross_attn(normalize(self.norm3, x, self.cross_attn.readers()), inputs, hooks, self)
        x, _ = run_hooks("after_cross_attn", self, x + y, hooks)

        y = self.ffn(modulate(self.norm2, x, ffn_shift, ffn_scale, (self.ffn[0],)))
        return gated_residual(x, y, ffn_gate)


class Active(NamedTuple):
    """An extension that runs in this forward, its place in the registry order, and its state."""

    place: int
    extension: Extension
    state: object


class WanModel(nn.Module):
    """Wan transformer of any published size. Build it on the meta device; parameters come from a checkpoint."""

    def __init__(
        self, config: WanConfig, extensions: Sequence[Extension] = (), attention: Attention | None = None
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.extensions = tuple(extensions)
        self.visit: Visit = contextlib.nullcontext
        self.attention_plan: AttentionPlan | None = None
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(config, attention or sdpa()) for _ in range(config.num_layers))
        patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = Head(dim, config.out_dim * patch_volume, config.eps)
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
        kind = payload.part or type(payload)
        return any(issubclass(kind, extension.payload) for extension in self.extensions)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of the text embedding, which is never quantized."""
        return self.text_embedding[0].weight.dtype

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
        tokens = self._embed(latents, inputs)
        active = []
        for place, extension, payload in readers:
            tokens, state = extension.prepare(self, payload, inputs, tokens)
            if state is not None:
                active.append(Active(place, extension, state))

        run = partial(self._run_blocks, tokens, active, inputs.step)
        moment = Moment(tokens.embedding, tokens.mod, tokens.x)
        x = run() if memory is None else memory.blocks(moment, inputs.step, run)
        count = video_tokens(tokens.grid)
        rows = None if tokens.rows is None else tokens.rows[:count]
        return self._unpatchify(self.head(x[:, :count], tokens.embedding, rows), tokens.grid)

    def _run_blocks(self, tokens: Tokens, active: Sequence[Active], step: Step) -> Tensor:
        """The tokens [B, L, C] behind the last block."""
        x = tokens.x
        for index, backend in enumerate(self._attention(step, tokens.grid)):
            if any(entry.extension.skips(entry.state, index) for entry in active):
                continue
            inputs = BlockInputs(tokens.mod, tokens.rows, tokens.rope, tokens.text, tokens.grid, backend)
            conds = self._conds(index, active)
            with self.visit(self.blocks[index]):
                x = self.blocks[index](x, inputs, conds)
            shared = (c if e.weightless else None for e, c in zip(self.extensions, conds, strict=True))
            inputs = inputs._replace(conds=tuple(shared))
            for entry in active:
                x = entry.extension.after_block(self, index, x, inputs, entry.state)
        return x

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
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        grid = (int(patches.shape[2]), int(patches.shape[3]), int(patches.shape[4]))
        x = patches.flatten(2).transpose(1, 2).contiguous().to(self.compute_dtype)

        weight = self.time_embedding[0].weight
        timestep = inputs.timestep if inputs.timestep.dim() == 2 else inputs.timestep[:, None]
        embedding = self.time_embedding(sinusoidal_embedding(timestep, config.freq_dim).to(weight.dtype))
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

    def modulation(self, embedding: Tensor) -> Tensor:
        """Time embedding [B, R, C] -> rows of modulation [B, R, 6, C] float32."""
        embedding = embedding.to(self.time_embedding[0].weight.dtype)
        return self.time_projection(embedding).float().unflatten(-1, (6, -1))

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
            riflex_index=riflex_index,
            riflex_frames=riflex_frames,
            device=device,
        )

    def embed_text(self, text: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Prompts [tokens, text_dim] each -> [B, T, C] in `dtype`, padded to the model's text length."""
        length = max(self.config.text_len, *(t.shape[0] for t in text))
        padded = torch.stack([F.pad(t, (0, 0, 0, length - t.shape[0])) for t in text])
        return self.text_embedding(padded.to(self.compute_dtype)).to(dtype)

    def _attention(self, step: Step, grid: Grid) -> tuple[Attention | None, ...]:
        """The backend of each block's self-attention in this step."""
        count = len(self.blocks)
        return (None,) * count if self.attention_plan is None else self.attention_plan.at(step, grid, count)

    @contextlib.contextmanager
    def attending(self, plan: AttentionPlan) -> Iterator[None]:
        """Inside, self-attention runs by this plan."""
        before, self.attention_plan = self.attention_plan, plan
        try:
            yield
        finally:
            self.attention_plan = before

    def _readers(self, payloads: Sequence[Payload]) -> list[tuple[int, Extension, Payload]]:
        """(place, extension, payload) of every extension that has a payload, in registry order."""
        readers = []
        unread = list(payloads)
        for place, extension in enumerate(self.extensions):
            mine = [payload for payload in unread if isinstance(payload, extension.payload)]
            if len(mine) > 1:
                raise ValueError(f"The model was given {type(mine[0]).__name__} twice; connect only one.")
            for payload in mine:
                unread.remove(payload)
                readers.append((place, extension, payload))
        if unread:
            raise ValueError(unread[0].needs)
        return readers

    def _conds(self, index: int, active: Sequence[Active]) -> tuple[NamedTuple | None, ...]:
        conds: list[NamedTuple | None] = [None] * len(self.extensions)
        for entry in active:
            if any(overrides(entry.extension, name) for name in TRACED):
                conds[entry.place] = entry.extension.block_cond(entry.state, index)
        return tuple(conds)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (frames, height, width), (pt, ph, pw) = grid, self.config.patch_size
        cells = patches.float().reshape(patches.shape[0], frames, height, width, pt, ph, pw, self.config.out_dim)
        video = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.reshape(video.shape[0], self.config.out_dim, frames * pt, height * ph, width * pw)
