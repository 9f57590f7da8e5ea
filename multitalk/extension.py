"""MultiTalk and InfiniteTalk as an extension of the Wan transformer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..kernels.fp8_rows import Fp8Rows
from ..wanvideo.conditioning import Payload
from ..wanvideo.config import WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import Residual, WanLayerNorm, gated_residual, normalize
from ..wanvideo.modules.model import WanModel
from ..wanvideo.modules.stretches import stretches
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import Grid, Heads, HeadsRead, ModelInputs, Tokens, video_tokens
from .folding import Folding, is_worth_it
from .multitalk import AUDIO_WINDOW, AudioProjModel, SingleStreamMultiAttention, latent_windows
from .speakers import speaker_map, token_masks

PROJECTION = "multitalk_audio_proj."
# Other systems have an audio_cross_attn too, within a part of their own.
OWN_KEYS = re.compile(rf"{re.escape(PROJECTION)}|blocks\.\d+\.(audio_cross_attn|norm_x)\.")
# Of a model whose audio attention has norms, LongCat's.
OTHER_ATTENTION = "blocks.0.audio_cross_attn.q_norm.weight"
# The name of the speech in guidance.
AUDIO = "audio"
NEEDS = (
    "Speech needs a model with multitalk_audio_proj.proj1.weight: connect MultiTalkModelLoader to the "
    "'multitalk_model' input of WanVideoModelLoader, or load a checkpoint that has the audio layers merged in."
)


@dataclass(frozen=True)
class AudioWindow(Payload):
    """The speech of one window.

    audio [B, P, pixel frames, 5, layers, channels]: Wav2Vec2 features of P speakers, each frame with its neighbors.
    scale: strength, 0-d. masks [P or P + 1, height, width]: where each speaker is, background last; None for one.
    """

    audio: Tensor
    scale: Tensor
    masks: Tensor | None = None
    needs: ClassVar[str] = NEEDS

    def without(self, names: frozenset[str]) -> Self:
        """Without audio: zero features of a single speaker, as the authors train the unconditional form."""
        return replace(self, audio=torch.zeros_like(self.audio[:, -1:]), masks=None) if AUDIO in names else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Moves and casts the features; the masks stay exact."""
        masks = None if self.masks is None else self.masks.to(device)
        return replace(self, audio=self.audio.to(device, dtype), scale=self.scale.to(device), masks=masks)

    def stack(self, others: Sequence[Self]) -> Self:
        """Joins batch rows of the same length, speakers and strength."""
        if all(other is self for other in others):
            return self
        return replace(self, audio=torch.cat([self.audio, *(other.audio for other in others)]))


class Speech(NamedTuple):
    """Audio tokens [B, F, P * T, C], strength, token grid; masks [P + 1, S] for several speakers, and how many.

    scores [B, L, P + 1]: how much each video token attends to each speaker, once self-attention measured it. parts: in
    how many pieces the frames are heard. shard: of the tokens.
    """

    tokens: Tensor
    scale: Tensor
    grid: Grid
    masks: Tensor | None
    speakers: int
    scores: Tensor | None = None
    parts: int = 1
    shard: Shard = WHOLE


@dataclass(frozen=True)
class MultiTalk(Extension):
    """Sizes of the audio layers: features = encoder layers times channels; voiced: blocks that have audio layers."""

    features: int
    intermediate_dim: int
    context_tokens: int
    output_dim: int
    voiced: tuple[int, ...]
    payload: ClassVar[type] = AudioWindow
    takes_sums: ClassVar[tuple[str, ...]] = ("after_cross_attn",)
    file: ClassVar[Kind] = Kind(
        "MultiTalk or InfiniteTalk module",
        "Multi/InfiniteTalk Model Loader",
        (r"^(multitalk_)?audio_proj\.proj1\.weight$", r"^blocks\.\d+\.audio_cross_attn\."),
    )
    high_precision: ClassVar[tuple[str, ...]] = (PROJECTION.rstrip("."),)
    aliases: ClassVar[Mapping[str, str]] = {
        f"audio_proj.{name}": f"{PROJECTION}{name}" for name in ("proj1.", "proj1_vf.", "proj2.", "proj3.", "norm.")
    }

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the audio projection and audio attention in its blocks."""
        sizes = audio_sizes(shapes)
        return None if sizes is None or OTHER_ATTENTION in shapes else cls(**sizes)

    def owns(self, key: str) -> bool:
        """The projection, and the audio attention and its norm in every block."""
        return OWN_KEYS.match(key) is not None

    def build(self, model: WanModel) -> None:
        """Adds multitalk_audio_proj and, in every voiced block, norm_x and audio_cross_attn."""
        config = model.config
        model.multitalk_audio_proj = AudioProjModel(
            self.features, self.intermediate_dim, self.context_tokens, self.output_dim
        )
        for index in self.voiced:
            block = model.blocks[index]
            block.norm_x = WanLayerNorm(config.dim, config.eps, elementwise_affine=True)
            block.audio_cross_attn = self.attention(config)

    def attention(self, config: WanConfig) -> SingleStreamMultiAttention:
        """The audio attention of a block."""
        return SingleStreamMultiAttention(config.dim, self.output_dim, config.num_heads)

    def prepare(
        self, model: WanModel, payload: AudioWindow, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Speech]:
        """Audio tokens of every latent frame."""
        audio = payload.audio
        speakers = int(audio.shape[1])
        if audio.shape[4] * audio.shape[5] != self.features:
            raise ValueError(
                f"The audio layers read {self.features} features a frame but the audio encoder gives "
                f"{audio.shape[4] * audio.shape[5]}: load the speech encoder that this checkpoint was trained with."
            )
        projected = model.multitalk_audio_proj(*latent_windows(audio.flatten(0, 1))).to(tokens.x.dtype)
        projected = projected.unflatten(0, (-1, speakers)).transpose(1, 2).flatten(2, 3)
        if projected.shape[1] > tokens.grid[0]:
            raise ValueError(
                f"The speech covers {projected.shape[1]} latent frames but the video has {tokens.grid[0]}."
            )
        batch = tokens.x.shape[0]
        masks, parts = None, model.parts(tokens.x.shape)
        if speakers > 1:
            # Who speaks where is measured over all tokens.
            masks, parts = token_masks(payload.masks, speakers, tokens.grid, tokens.x.device), 1
        audio = projected.expand(batch, -1, -1, -1)
        return tokens, Speech(audio, payload.scale, tokens.grid, masks, speakers, parts=parts)

    def on(self, state: Speech, shard: Shard) -> Speech:
        """Every frame's speech for this part of its places; speakers are told apart by all of the first frame."""
        return state._replace(grid=shard.grid(state.grid), shard=shard)

    def block_cond(self, state: Speech, index: int) -> Speech | None:
        """The same in every block that has audio layers."""
        return state if index in self.voiced else None

    def reads_heads(self, cond: Speech) -> HeadsRead | None:
        """Several speakers are told apart by the video's queries of the first frame's keys; one needs no map."""
        if cond.masks is None:
            return None
        return HeadsRead(video_tokens(cond.grid), cond.grid[1] * cond.grid[2], result=False)

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: Speech) -> tuple[Heads, Speech]:
        """Measures which speaker each video token belongs to."""
        count, first_frame = video_tokens(cond.grid), cond.grid[1] * cond.grid[2]
        keys = cond.shard.frames(heads.k[:, :first_frame])
        return heads, cond._replace(scores=speaker_map(heads.q[:, :count], keys, cond.masks))

    def after_cross_attn(
        self, block: WanAttentionBlock, x: Tensor | Residual, cond: Speech
    ) -> tuple[Tensor | Residual, Speech]:
        """Adds audio attention to the residual stream."""
        folding = _folding(block, x, cond)
        if folding is not None:
            return _folded(block, x, cond, folding), cond
        if isinstance(x, Residual):
            x, normed = x.normalized(block.norm_x, (block.audio_cross_attn.q_linear,))
            return Residual(x, _spoken(block, normed, cond), cond.scale), cond
        if cond.parts == 1:
            return _heard(block, x, cond), cond
        out = torch.empty_like(x)
        voiced = cond.tokens.shape[1] * cond.grid[1] * cond.grid[2]
        out[:, voiced:] = x[:, voiced:]
        for tokens, audio in _pieces(cond):
            out[:, tokens] = _heard(block, x[:, tokens], cond._replace(tokens=audio))
        return out, cond


def _heard(block: WanAttentionBlock, x: Tensor, cond: Speech) -> Tensor:
    """x [B, L, C] with audio attention to the sound of its frames."""
    normed = normalize(block.norm_x, x, (block.audio_cross_attn.q_linear,))
    return gated_residual(x, _spoken(block, normed, cond), cond.scale)


def _spoken(block: WanAttentionBlock, normed: Tensor | Fp8Rows, cond: Speech) -> Tensor:
    """Audio attention of the normed stream [B, L, C]."""
    scores = cond.scores, cond.speakers, cond.shard
    return block.audio_cross_attn(normed, cond.tokens.flatten(0, 1), cond.grid, *scores)


def _pieces(cond: Speech) -> Iterator[tuple[slice, Tensor]]:
    """Video tokens and the audio tokens of their frames, which do not hear each other's sound."""
    frames, places = cond.tokens.shape[1], cond.grid[1] * cond.grid[2]
    for part in stretches(frames, min(cond.parts, frames)):
        yield slice(part.start * places, part.stop * places), cond.tokens[:, part]


def _folding(block: WanAttentionBlock, x: Tensor | Residual, cond: Speech) -> Folding | None:
    """The products of the block's audio attention, where folding them gives the same for less."""
    attention, (_, height, width) = block.audio_cross_attn, cond.grid
    if cond.speakers > 1 or not is_worth_it(cond.tokens.shape[2], attention.heads[1], height * width):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, cond.tokens, *block.parameters())):
        return None
    return Folding.of(attention.q_linear, attention.proj, attention.heads, cond.tokens.dtype)


def _folded(block: WanAttentionBlock, x: Tensor | Residual, cond: Speech, folding: Folding) -> Tensor:
    """As `_heard`, with folded products."""
    out, normed = _stream(block, x)
    for tokens, audio in _pieces(cond):
        read = normed(tokens)
        k, v = (t.unflatten(0, audio.shape[:2]) for t in block.audio_cross_attn.keys_values(audio.flatten(0, 1)))
        for row in range(out.shape[0]):
            folding.add(out[row, tokens], read[row], k[row], v[row], cond.scale)
    return out


def _stream(block: WanAttentionBlock, x: Tensor | Residual) -> tuple[Tensor, Callable[[slice], Tensor]]:
    """The stream [B, L, C], which may be changed where it lies, and its norm at some tokens."""
    if isinstance(x, Residual):
        x, normed = x.normalized(block.norm_x)
        return x, lambda tokens: normed[:, tokens]
    # The sum with what was read of the text is new and the block's alone, so that it can be added to where it lies.
    # Without text the stream may be what a hook before keeps; a compiler decides by itself.
    own = block.reads_text and x.is_contiguous() and not torch.compiler.is_compiling()
    out = x if own else x.clone(memory_format=torch.contiguous_format)
    return out, lambda tokens: block.norm_x(x[:, tokens])


def audio_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """The fields of `MultiTalk`, from tensor shapes; None where there is no speech in them."""
    first, last = shapes.get(f"{PROJECTION}proj1.weight"), shapes.get(f"{PROJECTION}proj3.weight")
    marks = (key.split(".") for key in shapes if key.endswith(".audio_cross_attn.q_linear.weight"))
    voiced = tuple(sorted(int(parts[1]) for parts in marks))
    if first is None or last is None or not voiced:
        return None
    output_dim = shapes[f"{PROJECTION}norm.weight"][0]
    return {
        "features": first[1] // AUDIO_WINDOW,
        "intermediate_dim": first[0],
        "context_tokens": last[0] // output_dim,
        "output_dim": output_dim,
        "voiced": voiced,
    }


EXTENSION = MultiTalk
