"""Ovi: an audio tower beside the video's transformer, each block of one reading the same block of the other.

The sound's tokens stand behind the video's. In each block both attend to themselves, then to their prompts and to each
other as both are at that moment.

Source: Ovi (Low et al. 2025; character-ai/Ovi, ovi/modules/fusion.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..attention import AttentionCall, attend
from ..kernels.rope import apply_rope
from ..quantized.linear import shared_input
from ..wanvideo.config import WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.modifier import Modifier
from ..wanvideo.modules.attention import WanT2VCrossAttention
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import WanLayerNorm, WanRMSNorm, normalize
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import WHOLE, Shard
from ..wanvideo.tokens import BlockInputs, ModelInputs, Text, TextSource, Tokens, video_tokens
from .run import SoundRun
from .stream import OviSound, SoundStream
from .tower import AudioTower, sound_rope

FIRST = "audio_model.patch_embedding.0.weight"
FUSION = "blocks.0.cross_attn.k_fusion.weight"


class FusedText(NamedTuple):
    """Text source: the prompt, and the other tower's tokens `target` [B, T, C].

    rope, target_rope: positions of queries and target. lengths: how many tokens of each row of the target count; empty
    means all. gather: of a shared sequence, its keys or values in all processes, of those here.
    """

    prompt: TextSource
    target: Tensor
    rope: Tensor
    target_rope: Tensor
    lengths: tuple[int, ...] = ()
    gather: Callable[[Tensor], Tensor] = WHOLE.frames
    tokenwise = False

    def attend(self, cross: WanT2VCrossAttention, q: Tensor) -> Tensor:
        """The sum of both attentions; only that to the other tower knows positions."""
        readers = (cross.k_fusion, cross.v_fusion)
        target = shared_input(normalize(cross.pre_attn_norm_fusion, self.target, readers), *readers)
        k = apply_rope(cross.split(cross.norm_k_fusion(cross.k_fusion(target))), self.target_rope)
        v = cross.split(cross.v_fusion(target))
        call = AttentionCall(apply_rope(q, self.rope), self.gather(k), self.gather(v), k_lens=self.lengths)
        return self.prompt.attend(cross, q) + attend(cross.attention, call)


class Sound(NamedTuple):
    """What blocks read for the sound: where its tokens start, how many of the video's it hears, its block inputs.

    shown, shard: the parts of the sequence that are the video's and the sound's.
    """

    start: int
    lengths: tuple[int, ...]
    mod: Tensor
    rope: Tensor
    text: TextSource
    shown: Shard = WHOLE
    shard: Shard = WHOLE


class OviState(NamedTuple):
    """Of one forward. embedding [B, 1, C] float32: the time's. missing: what the pass goes without."""

    sound: Sound
    embedding: Tensor
    stream: SoundStream
    missing: frozenset[str]


class FusedBlock(WanAttentionBlock):
    """A block of the video's transformer that runs the audio tower's block along with itself.

    partner: that block, in a tuple, because it belongs to the tower and is no child of this one.
    """

    partner: tuple[WanAttentionBlock, ...] = ()

    @classmethod
    def of(cls, block: WanAttentionBlock, partner: WanAttentionBlock, config: WanConfig) -> Self:
        """With the children of a plain block, those that other systems gave it included."""
        fused = cls(config, block.self_attn.attention)
        for name, child in block.named_children():
            fused.add_module(name, child)
        fused.partner = (partner,)
        return fused

    def forward(self, x: Tensor, inputs: BlockInputs, conds: tuple[NamedTuple | None, ...] = ()) -> Tensor:
        """x [B, L, C]: the video's tokens and the sound's behind them -> the same."""
        sound = next((cond for cond in conds if isinstance(cond, Sound)), None)
        if sound is None:
            return super().forward(x, inputs, conds)
        (partner,) = self.partner
        rows = None if inputs.rows is None else inputs.rows[: sound.start]
        shown = inputs._replace(rope=inputs.rope[: sound.start], rows=rows, shard=sound.shown)
        heard = BlockInputs(sound.mod, None, sound.rope, sound.text, inputs.grid, shard=sound.shard)
        video, audio = x[:, : sound.start], x[:, sound.start :]
        hooks = tuple((e, c) for e, c in zip(self.extensions, conds, strict=True) if c is not None and c is not sound)
        of_video, of_audio = self.modulated(shown), partner.modulated(heard)

        audio, _ = partner.attend(audio, heard, (), of_audio[:3])
        video, hooks = self.attend(video, shown, hooks, of_video[:3])
        everything = FusedText(heard.text, video, heard.rope, shown.rope, sound.lengths, shown.shard.frames)
        told = heard._replace(text=everything)
        text = FusedText(shown.text, audio, shown.rope, heard.rope, gather=heard.shard.appended)
        shown = shown._replace(text=text)
        audio = partner.read(audio, told, (), of_audio[3:])
        video = self.read(video, shown, hooks, of_video[3:])
        return torch.cat((video, audio), dim=1)


@dataclass(frozen=True)
class Ovi(Extension):
    """channels: of the sound's latents; hidden, kernel: of their embedding. 0 where only the video's half is there."""

    channels: int = 0
    hidden: int = 0
    kernel: int = 0
    payload: ClassVar[type] = OviSound
    file: ClassVar[Kind] = Kind("Ovi audio module", "WanVideo Extra Model Select", (rf"^{FIRST}$".replace(".", r"\."),))

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """By the tower's embedding, or by what the video's half reads of it."""
        if FIRST in shapes:
            _, channels, kernel = shapes[FIRST]
            return cls(channels, shapes["audio_model.patch_embedding.2.w1.weight"][0], kernel)
        return cls() if FUSION in shapes else None

    @classmethod
    def published(cls, key: str) -> str:
        """The authors' file holds both halves under names of their own, which may have a prefix of other programs."""
        halves = re.sub(r"^.*?(?:video_model\.|(?=audio_model\.))", "", key)
        return halves.replace(".modulation.modulation", ".modulation")

    def owns(self, key: str) -> bool:
        """The tower, and what blocks read of each other."""
        return key.startswith("audio_model.") or "_fusion." in key

    def build(self, model: WanModel) -> None:
        """The tower, and blocks that run in pairs. Raises ValueError where the tower's weights are not there."""
        if not self.channels:
            raise ValueError(
                "This is the video's half of Ovi: connect the audio half by WanVideoExtraModelSelect to extra_model of "
                "WanVideoModelLoader."
            )
        config = model.config
        model.audio_model = AudioTower(config, channels=self.channels, hidden=self.hidden, kernel=self.kernel)
        pairs = zip(model.blocks, model.audio_model.blocks, strict=True)
        model.blocks = nn.ModuleList(FusedBlock.of(block, partner, config) for block, partner in pairs)
        for block in (*model.blocks, *model.audio_model.blocks):
            cross = block.cross_attn
            cross.k_fusion, cross.v_fusion = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
            cross.pre_attn_norm_fusion = WanLayerNorm(config.dim, elementwise_affine=True)
            cross.norm_k_fusion = WanRMSNorm(config.dim, config.eps)

    def modifiers(self) -> tuple[Modifier, ...]:
        """Every run of such a model makes sound."""
        return (SoundRun(self.channels),)

    def stacks(self, model: WanModel) -> Mapping[str, nn.ModuleList]:
        """The tower's blocks."""
        return {"audio_model.blocks": model.audio_model.blocks}

    def companions(self, model: WanModel, index: int) -> tuple[nn.Module, ...]:
        """The tower's block of the same number."""
        return (model.audio_model.blocks[index],)

    def prepare(
        self, model: WanModel, payload: OviSound, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, OviState]:
        """The sound's tokens behind the others, under its own prompt and at the time of the noisy frames."""
        tower, x = model.audio_model, tokens.x
        batch, start = x.shape[:2]
        audio = tower.embed(payload.stream.audio.to(x.device)).to(x.dtype).expand(batch, -1, -1)
        # Frames that are given stand at time 0, where the sound is not.
        time = inputs.timestep if inputs.timestep.dim() == 1 else inputs.timestep.amax(dim=1)
        embedding, mod = tower.embed_time(time)
        text = inputs.text
        if "text" in payload.missing and payload.negative is not None:
            text = payload.negative[:1] * batch
        rope = sound_rope(audio.shape[1], model.config.head_dim, x.device)
        lengths = (video_tokens(tokens.grid),) * batch
        sound = Sound(start, lengths, mod, rope, Text(tower.embed_text(text).to(x.dtype)))
        return tokens.appended(audio, rope), OviState(sound, embedding, payload.stream, payload.missing)

    def on(self, state: OviState, shard: Shard) -> OviState:
        """Both towers share their tokens out. Raises ValueError where others append tokens before the sound's."""
        sound = state.sound
        own = shard.rest(sound.start)
        sound = sound._replace(
            start=shard.count(sound.start), rope=own.take(sound.rope, dim=0), shown=shard.first(sound.start), shard=own
        )
        return state._replace(sound=sound)

    def block_cond(self, state: OviState, index: int) -> Sound:
        """The same for all blocks."""
        return state.sound

    def after_blocks(self, model: WanModel, x: Tensor, state: OviState) -> None:
        """Hands the sound's prediction to its stream."""
        audio = state.sound.shard.appended(x[:, state.sound.start :])
        state.stream.velocities[state.missing] = model.audio_model.head(audio, state.embedding, None).float()


EXTENSION = Ovi
