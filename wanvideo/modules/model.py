"""The Wan transformer: patches of a noisy latent video in, velocity out.

Source: Wan-Video/Wan2.1 and Wan2.2. Module names are the published checkpoint keys. Other systems join through
`wanvideo/extension.py`; nothing here names one of them.

Shapes: B batch, L tokens, C channels, H heads, D head size, T text tokens, R rows of modulation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import Attention, attend, sdpa
from ...kernels.fp8_rows import Fp8Rows
from ...quantized.linear import all_take_rows, shared_input
from ...tensor_layout import dense
from ..config import WanConfig
from ..extension import (
    AttentionCall,
    BlockInputs,
    Extension,
    Heads,
    Hooks,
    KeysValues,
    Payload,
    RunCache,
    Step,
    Tokens,
    heads_are_used,
    hooked,
    run_hooks,
)
from ..rope import rope_table
from ..step_cache import Moment, StepMemory
from .layers import (
    FeedForward,
    Head,
    WanLayerNorm,
    WanRMSNorm,
    gated_residual,
    modulate,
    normalise,
    per_token,
    placed_heads,
    sinusoidal_embedding,
)

if TYPE_CHECKING:
    from ..attention_plan import AttentionPlan


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
        """The linear layers that read the normalised video tokens."""
        return self.q, self.k, self.v

    def forward(
        self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: WanAttentionBlock
    ) -> tuple[Tensor, Hooks]:
        """x [B, L, C] modulated -> [B, L, C], before gate and residual."""
        attention = inputs.attention or self.attention
        x = shared_input(x, *self.readers())
        q, k, v = self.q(x), self.k(x), self.split(self.v(x))
        read = any(extension.reads_heads(cond) for extension, cond in hooks)
        fused = None if read or hooked("attend", hooks) else self._fused(attention, hooks)
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

    def _fused(self, attention: Attention, hooks: Hooks) -> Callable[..., Tensor | Fp8Rows] | None:
        """The backend's form that takes projections as they are, if it has one: in rows where `o` alone reads them."""
        if all_take_rows((self.o,)) and not heads_are_used(hooks) and hasattr(attention, "fused_rows"):
            return attention.fused_rows
        return getattr(attention, "fused", None)


class WanT2VCrossAttention(WanSelfAttention):
    """Attention of video tokens to the text."""

    def readers(self) -> tuple[nn.Module, ...]:
        """Only the queries are of the video tokens."""
        return (self.q,)

    def keys_values(self, text: Tensor) -> KeysValues:
        """Embedded text [B, T, C] -> k, v [B, T, H, D]. They are the same in every step."""
        shared = shared_input(text, self.k, self.v)
        return KeysValues(self.split(self.norm_k(self.k(shared))), self.split(self.v(shared)))

    def forward(
        self, x: Tensor | Fp8Rows, inputs: BlockInputs, hooks: Hooks, block: WanAttentionBlock
    ) -> tuple[Tensor, Hooks]:
        """x [B, L, C], inputs.text of this module -> [B, L, C]."""
        q = self.split(self.norm_q(self.q(x)))
        out = self.attention(q, inputs.text.k, inputs.text.v)
        heads, hooks = run_hooks("cross_attn", block, Heads(q, None, out), hooks)
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

        # A hook that reads the input of self-attention reads it in base precision.
        readers = () if hooked("self_attn_input", hooks) else self.self_attn.readers()
        h = modulate(self.norm1, x, shift, scale, readers)
        h, hooks = run_hooks("self_attn_input", self, h, hooks)
        y, hooks = self.self_attn(h, inputs, hooks, self)
        y, hooks = run_hooks("self_attn_output", self, y, hooks)
        x = gated_residual(x, y, gate)

        y, hooks = self.cross_attn(normalise(self.norm3, x, self.cross_attn.readers()), inputs, hooks, self)
        x, _ = run_hooks("after_cross_attn", self, x + y, hooks)

        y = self.ffn(modulate(self.norm2, x, ffn_shift, ffn_scale, (self.ffn[0],)))
        return gated_residual(x, y, ffn_gate)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One forward pass.

    latents [B, in_dim, F, H, W]: noise, joined with the condition channels where the model has them.
    timestep [B], or [B, F] for one per latent frame, 0..1000. text: B tensors [tokens, text_dim] without padding.
    payloads: what the extensions read. caches: where extensions keep, over the steps of a run, what blocks make of each
    payload, in the same order; empty computes it anew. texts: the same for the prompts, or None.
    """

    latents: Tensor
    timestep: Tensor
    text: tuple[Tensor, ...]
    payloads: tuple[Payload, ...] = ()
    step: Step = Step()
    riflex_index: int = 0
    caches: tuple[RunCache, ...] = ()
    texts: RunCache | None = None
    memory: StepMemory | None = None


class Active(NamedTuple):
    """An extension that runs in this forward, its place in the registry order, its payload, state and cache."""

    place: int
    extension: Extension
    payload: Payload
    state: object
    cache: RunCache | None


class WanModel(nn.Module):
    """Wan transformer of any published size. Build it on the meta device; parameters come from a checkpoint."""

    def __init__(
        self, config: WanConfig, extensions: Sequence[Extension] = (), attention: Attention | None = None
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.extensions = tuple(extensions)
        self.around_block: Callable[[int], AbstractContextManager[None]] = lambda index: contextlib.nullcontext()
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

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Velocity [B, out_dim, F, H, W] float32.

        Raises ValueError if the channels or sizes of the latents do not fit, or a payload has no weights here.
        """
        if inputs.memory is None:
            return self._velocity(inputs)
        latents = inputs.latents[:, : self.config.out_dim]
        return inputs.memory.whole(latents, inputs.step, lambda: self._velocity(inputs))

    def _velocity(self, inputs: ModelInputs) -> Tensor:
        tokens, embedding = self._embed(inputs)
        active, tokens = self._prepare(inputs, tokens)

        def run() -> Tensor:
            return self._blocks(inputs, tokens, active)

        if inputs.memory is None:
            x = run()
        else:
            x = inputs.memory.blocks(Moment(embedding, tokens.mod, tokens.x), inputs.step, run)
        count = tokens.grid[0] * tokens.grid[1] * tokens.grid[2]
        rows = None if tokens.rows is None else tokens.rows[:count]
        return self._unpatchify(self.head(x[:, :count], embedding, rows), tokens.grid)

    def _blocks(self, inputs: ModelInputs, tokens: Tokens, active: Sequence[Active]) -> Tensor:
        """The tokens [B, L, C] behind the last block."""
        text_of = self._text(inputs, tokens.x.dtype)
        attention_of = self._attention(inputs.step, tokens.grid)
        x = tokens.x
        for index, block in enumerate(self.blocks):
            with self.around_block(index):
                block_inputs = BlockInputs(
                    tokens.mod, tokens.rows, tokens.rope, text_of(index), tokens.grid, attention_of[index]
                )
                x = block(x, block_inputs, self._conds(index, active))
                for entry in active:
                    x = entry.extension.after_block(self, index, x, block_inputs, entry.state)
        return x

    def _embed(self, inputs: ModelInputs) -> tuple[Tokens, Tensor]:
        latents, config = inputs.latents, self.config
        if latents.shape[1] != config.in_dim:
            raise ValueError(f"The model reads {config.in_dim} latent channels but got {latents.shape[1]}.")
        sizes = latents.shape[2:]
        if any(size % patch for size, patch in zip(sizes, config.patch_size, strict=True)):
            raise ValueError(f"Latent sizes {tuple(sizes)} are not multiples of the patch {config.patch_size}.")
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        grid = (int(patches.shape[2]), int(patches.shape[3]), int(patches.shape[4]))
        x = patches.flatten(2).transpose(1, 2).contiguous().to(self.compute_dtype)

        weight = self.time_embedding[0].weight
        timestep = inputs.timestep if inputs.timestep.dim() == 2 else inputs.timestep[:, None]
        embedding = self.time_embedding(sinusoidal_embedding(timestep, config.freq_dim).to(weight.dtype))
        mod = self.time_projection(embedding).float().unflatten(-1, (6, config.dim))
        rows = None
        if mod.shape[1] > 1:
            frame = torch.arange(grid[0], device=x.device)
            rows = frame.repeat_interleave(grid[1] * grid[2])
        rope = rope_table(grid, config.head_dim, riflex_index=inputs.riflex_index, device=x.device)
        return Tokens(x, mod, rows, rope, grid), embedding.float()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of the text embedding, which is never quantised."""
        return self.text_embedding[0].weight.dtype

    def embed_text(self, text: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Prompts [tokens, text_dim] each -> [B, T, C] in `dtype`, padded to the model's text length."""
        length = max(self.config.text_len, *(t.shape[0] for t in text))
        padded = torch.stack([F.pad(t, (0, 0, 0, length - t.shape[0])) for t in text])
        return self.text_embedding(padded.to(self.compute_dtype)).to(dtype)

    def _text(self, inputs: ModelInputs, dtype: torch.dtype) -> Callable[[int], KeysValues]:
        """Keys and values of the prompts, by block; asked for while the block is resident."""

        @functools.cache
        def embedded() -> Tensor:
            return self.embed_text(inputs.text, dtype)

        def of(index: int) -> KeysValues:
            def make() -> KeysValues:
                return self.blocks[index].cross_attn.keys_values(embedded())

            return make() if inputs.texts is None else inputs.texts.get(tuple(inputs.text), index, make)

        return of

    def _attention(self, step: Step, grid: tuple[int, int, int]) -> tuple[Attention | None, ...]:
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

    def _prepare(self, inputs: ModelInputs, tokens: Tokens) -> tuple[tuple[Active, ...], Tokens]:
        active = []
        unread = list(zip(inputs.payloads, inputs.caches or (None,) * len(inputs.payloads), strict=True))
        for place, extension in enumerate(self.extensions):
            mine = [given for given in unread if isinstance(given[0], extension.payload)]
            if len(mine) > 1:
                raise ValueError(f"The model was given {type(mine[0][0]).__name__} twice; connect only one.")
            for payload, cache in mine:
                unread.remove((payload, cache))
                tokens, state = extension.prepare(self, payload, inputs.step, tokens)
                if state is not None:
                    active.append(Active(place, extension, payload, state, cache))
        if unread:
            raise ValueError(unread[0][0].needs)
        return tuple(active), tokens

    def _conds(self, index: int, active: Sequence[Active]) -> tuple[NamedTuple | None, ...]:
        block = self.blocks[index]
        conds: list[NamedTuple | None] = [None] * len(self.extensions)
        for entry in active:
            if index not in entry.extension.blocks(self):
                continue

            def make(entry: Active = entry) -> object | None:
                return entry.extension.once(block, entry.state, index)

            kept = make() if entry.cache is None else entry.cache.get((entry.payload,), index, make)
            conds[entry.place] = entry.extension.block_cond(entry.state, index, kept)
        return tuple(conds)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (frames, height, width), (pt, ph, pw) = grid, self.config.patch_size
        cells = patches.float().reshape(patches.shape[0], frames, height, width, pt, ph, pw, self.config.out_dim)
        video = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.reshape(video.shape[0], self.config.out_dim, frames * pt, height * ph, width * pw)
