"""Lynx (Sang et al. 2025): a face's identity as tokens for cross-attention, and its picture for self-attention.

The picture runs through the transformer beside the video, clean (time 0) and under a prompt of its own, as tokens which
see nothing of the video; in every block, video tokens attend to what its self-attention reads. Lite files have identity
adapters alone, in every other block. Source: bytedance/lynx (modules/full, modules/lite).

Shapes: B batch, L tokens, S reference tokens, N face tokens, C channels, H heads, D head size, T text tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import AttentionCall
from ..wanvideo.conditioning import Payload, Row, Step
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import NO_TEXT, at_step
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import CrossAttention, Heads, HeadsRead, ModelInputs, Projections, Text, TextSource, Tokens
from .adapters import IpAdapter, RefAdapter

IP_LAYER = re.compile(r"^blocks\.(\d+)\.cross_attn\.ip_adapter\.to_v_ip\.weight$")
REF_LAYER = re.compile(r"^blocks\.(\d+)\.self_attn\.ref_adapter\.to_k_ref\.weight$")
OWN_KEYS = re.compile(r"blocks\.\d+\.(cross_attn\.ip_adapter|self_attn\.ref_adapter)\.")
# The name of face and picture in guidance.
FACE = "face"


@dataclass(frozen=True, kw_only=True)
class LynxFace(Payload):
    """tokens [1, N, C] of the face and picture [1, C, 1, h, w], its latents: at least one of them; without_tokens and
    without_picture: of no face, and of an empty picture.

    prompt [1, T, text_dim]: what the picture is described by. ip_scale, ref_scale: strengths, 0-d. cfg: guidance by
    the face, one number or one a step. ref_blocks: blocks that read the picture, None for all. start, end: the part of
    the steps (0..1) in which all of it acts.
    """

    tokens: Tensor | None = None
    without_tokens: Tensor | None = None
    picture: Tensor | None = None
    without_picture: Tensor | None = None
    prompt: Tensor | None = None
    ip_scale: Tensor
    ref_scale: Tensor
    cfg: tuple[float, ...] = (1.0,)
    ref_blocks: tuple[int, ...] | None = None
    start: float = 0.0
    end: float = 1.0
    needs: ClassVar[str] = (
        "Lynx needs a model with blocks.0.cross_attn.ip_adapter.to_v_ip.weight or "
        "blocks.0.self_attn.ref_adapter.to_k_ref.weight: connect WanVideoExtraModelSelect to the 'extra_model' input "
        "of WanVideoModelLoader."
    )

    @property
    def _guides(self) -> bool:
        return any(not math.isclose(value, 1.0) for value in self.cfg)

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Nothing + cfg * (face - nothing) + scale * (all - face), where nothing and face lack the prompt."""
        if not self._guides or math.isclose(scale, 1.0) or not step.within(self.start, self.end):
            return None
        cfg = at_step(self.cfg, step)
        return Row(scale), Row(cfg - scale, NO_TEXT), Row(1.0 - cfg, NO_TEXT | {FACE})

    def without(self, names: frozenset[str]) -> Self:
        """No face and an empty picture; in passes without the prompt too, unless the face has guidance of its own."""
        if FACE in names or ("text" in names and not self._guides):
            return replace(self, tokens=self.without_tokens, picture=self.without_picture)
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The picture stays in float32 until the patch embedding reads it."""
        exact = {name: _moved(getattr(self, name), device) for name in ("picture", "without_picture")}
        return replace(super().to(device, dtype), **exact)


def _moved(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, torch.float32)


class PictureText(NamedTuple):
    """Text source: the picture's tokens (start to stop) attend to `own` [B, T, C], all others to `first`."""

    first: TextSource
    own: Tensor
    start: int
    stop: int
    tokenwise = False

    def attend(self, cross: CrossAttention, q: Tensor) -> Tensor:
        """Each part of the queries q [B, L, H, D] to its own text."""
        parts = [self.first.attend(cross, q[:, : self.start])]
        # A part of the sequence may have none of the picture.
        if self.start < self.stop:
            parts.append(Text(self.own).attend(cross, q[:, self.start : self.stop]))
        if self.stop < q.shape[1]:
            parts.append(self.first.attend(cross, q[:, self.stop :]))
        return torch.cat(parts, dim=1)

    def on(self, shard: Shard) -> PictureText:
        """The picture's tokens of this part."""
        return self._replace(
            first=self.first.on(shard), start=shard.count(self.start), stop=shard.count(self.stop)
        )


class Seen(NamedTuple):
    """What blocks read: face tokens [B, N, C]; which of the tokens here are the picture (start to stop; the same
    without any); strengths, 0-d. whole: which of the whole sequence, of which `shard` is the picture's part. reads:
    whether video tokens read the picture in this block. heads [B, L, H, D]: what they read."""

    tokens: Tensor | None
    start: int
    stop: int
    ip_scale: Tensor
    ref_scale: Tensor
    whole: tuple[int, int] = (0, 0)
    shard: Shard = WHOLE
    reads: bool = False
    heads: Tensor | None = None


class State(NamedTuple):
    """seen, and the blocks whose video tokens read the picture; None for all."""

    seen: Seen
    ref_blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class Lynx(Extension):
    """ip_blocks, ref_blocks: that have adapters; context_dim, registers, bias: of the identity adapters."""

    ip_blocks: tuple[int, ...] = ()
    context_dim: int = 0
    registers: int = 0
    bias: bool = True
    ref_blocks: tuple[int, ...] = ()
    payload: ClassVar[type] = LynxFace
    file: ClassVar[Kind] = Kind(
        "Lynx module", "WanVideo Extra Model Select", (f"{IP_LAYER.pattern}|{REF_LAYER.pattern}",)
    )

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has adapters of either kind."""
        ip, ref = (
            tuple(sorted(int(match[1]) for key in shapes if (match := layer.match(key))))
            for layer in (IP_LAYER, REF_LAYER)
        )
        if not ip:
            return cls(ref_blocks=ref) if ref else None
        name = f"blocks.{ip[0]}.cross_attn.ip_adapter"
        return cls(
            ip_blocks=ip,
            context_dim=shapes[f"{name}.to_v_ip.weight"][1],
            registers=shapes.get(f"{name}.registers", (1, 0))[1],
            bias=f"{name}.to_v_ip.bias" in shapes,
            ref_blocks=ref,
        )

    def owns(self, key: str) -> bool:
        """The adapters."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds ip_adapter to cross-attentions and ref_adapter to self-attentions."""
        dim = model.config.dim
        for index in self.ip_blocks:
            adapter = IpAdapter(dim, self.context_dim, self.registers, self.bias)
            model.blocks[index].cross_attn.ip_adapter = adapter
        for index in self.ref_blocks:
            model.blocks[index].self_attn.ref_adapter = RefAdapter(dim)

    def prepare(
        self, model: WanModel, payload: LynxFace, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, State | None]:
        """Appends the picture's tokens; idle outside its steps. Raises ValueError where adapters or sizes differ."""
        self._check(payload, model)
        if not inputs.step.within(payload.start, payload.end):
            return tokens, None
        face, batch, start = payload.tokens, tokens.x.shape[0], tokens.x.shape[1]
        if face is not None:
            face = face.to(tokens.x.dtype).expand(batch, -1, -1)
        if payload.picture is not None:
            tokens = _with_picture(model, payload, tokens)
        stop = tokens.x.shape[1]
        seen = Seen(face, start, stop, payload.ip_scale, payload.ref_scale, whole=(start, stop))
        return tokens, State(seen, payload.ref_blocks)

    def _check(self, payload: LynxFace, model: WanModel) -> None:
        if payload.tokens is not None:
            if not self.ip_blocks:
                raise ValueError(
                    "Lynx's face embeds need its ip layers, but the model has its ref layers alone: chain a second "
                    "WanVideoExtraModelSelect, or disconnect lynx_ip_embeds."
                )
            if payload.tokens.shape[2] != self.context_dim:
                raise ValueError(
                    f"Lynx's face embeds have {payload.tokens.shape[2]} channels but the model's ip layers read "
                    f"{self.context_dim}: load the resampler of the same kind (lite or full)."
                )
        if payload.picture is not None:
            if not self.ref_blocks:
                raise ValueError(
                    "Lynx's ref_image needs its ref layers, but the model has its ip layers alone: chain a second "
                    "WanVideoExtraModelSelect, or disconnect ref_image."
                )
            channels, wanted = payload.picture.shape[1], model.config.out_dim
            if channels != wanted:
                raise ValueError(
                    f"Lynx's ref_image is encoded in {channels} channels but the video has {wanted}: connect the "
                    "model's own VAE."
                )

    def on(self, state: State, shard: Shard) -> State:
        """Face tokens are the same for all. Raises ValueError for a picture behind other references."""
        start, stop = state.seen.whole
        own = shard.rest(start) if start < stop else WHOLE
        seen = state.seen._replace(start=shard.count(start), stop=shard.count(stop), shard=own)
        return state._replace(seen=seen)

    def block_cond(self, state: State, index: int) -> Seen:
        """With the face where the block has an identity adapter, reading the picture where it has the other one."""
        seen, chosen = state
        reads = seen.whole[0] < seen.whole[1] and index in self.ref_blocks and (chosen is None or index in chosen)
        return seen._replace(tokens=seen.tokens if index in self.ip_blocks else None, reads=reads)

    def reads_heads(self, cond: Seen) -> HeadsRead | None:
        """The result alone, where there is something to add to it."""
        return HeadsRead(queries=0, keys=0) if cond.reads else None

    def projected(self, block: WanAttentionBlock, value: Projections, cond: Seen) -> tuple[Projections, Seen]:
        """What video tokens read of the picture's input to this self-attention."""
        if not cond.reads:
            return value, cond
        attention, reference = block.self_attn, cond.shard.appended(value.x[:, cond.start : cond.stop])
        return value, cond._replace(heads=attention.ref_adapter(attention, value.q[:, : cond.start], reference))

    def attend(self, block: WanAttentionBlock, call: AttentionCall, cond: Seen) -> tuple[AttentionCall, Seen]:
        """The picture to itself alone, and nothing else to it."""
        count, (start, stop) = call.q.shape[1], cond.whole
        if start == stop:
            return call, cond
        spans = call.spans or (((0, count), (0, count)),)
        others = [((first, min(last, start)), _before(keys, start, stop)) for (first, last), keys in spans]
        others = [span for span in others if span[0][0] < span[0][1]]
        return call._replace(spans=(*others, ((start, stop), (start, stop)))), cond

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: Seen) -> tuple[Heads, Seen]:
        """Adds what video tokens read of the picture."""
        seen = cond.heads * cond.ref_scale.to(heads.out.dtype)
        rest = heads.out[:, cond.start :]
        return heads._replace(out=torch.cat((heads.out[:, : cond.start] + seen, rest), dim=1)), cond

    def cross_attn(self, block: WanAttentionBlock, heads: Heads, cond: Seen) -> tuple[Heads, Seen]:
        """Adds attention to the face, but for the picture's tokens."""
        if cond.tokens is None:
            return heads, cond
        cross = block.cross_attn
        seen = cross.ip_adapter(cross, heads.q[:, : cond.start], cond.tokens) * cond.ip_scale.to(heads.out.dtype)
        out = heads.out[:, : cond.start] + seen
        return heads._replace(out=torch.cat((out, heads.out[:, cond.start :]), dim=1)), cond


def _before(keys: tuple[int, int], start: int, stop: int) -> tuple[int, int]:
    """Keys without the picture's, which end the sequence. Raises ValueError where others follow."""
    if keys[1] > stop:
        raise ValueError("Lynx's picture must be the last of the reference tokens: leave the other references out.")
    return keys[0], min(keys[1], start)


def _with_picture(model: WanModel, payload: LynxFace, tokens: Tokens) -> Tokens:
    """The sequence with the picture's tokens at time 0, at positions of their own, under their own prompt."""
    config, embedding, batch = model.config, model.patch_embedding, tokens.x.shape[0]
    latents = F.pad(payload.picture, (0, 0, 0, 0, 0, 0, 0, config.in_dim - payload.picture.shape[1]))
    patches = embedding(latents.to(embedding.weight.dtype))
    x = patches.flatten(2).transpose(1, 2)
    rope = model.rope(tuple(patches.shape[2:]), device=x.device)
    start = tokens.x.shape[1]
    own = model.embed_text(list(payload.prompt), tokens.x.dtype).expand(batch, -1, -1)
    tokens = tokens.appended(x, rope, model.clean_modulation())
    return tokens._replace(text=PictureText(tokens.text, own, start, start + x.shape[1]))


EXTENSION = Lynx
