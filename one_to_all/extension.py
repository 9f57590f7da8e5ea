"""One-to-All (Shi et al. 2025): a reference picture of any alignment moves by a video of drawn poses.

The reference stands as a frame in front of the video, and every block reads it by a second attention whose positions
are in height and width alone. Poses enter behind the second block, through control blocks of their own.
Source: ssj9596/One-to-All-Animation (transformer_wan_refextractor_2d_controlnet_last_prefix).

Shapes: B batch, z latent channels, P pixel frames, L tokens, S tokens of the reference, C channels, H heads, D head
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantized.linear import shared_input
from ..wanvideo.assign import layer_count
from ..wanvideo.conditioning import Payload, Row, Step, Window
from ..wanvideo.extension import Extension
from ..wanvideo.families import Kind
from ..wanvideo.guidance import NO_TEXT, at_step
from ..wanvideo.modules.block import WanAttentionBlock
from ..wanvideo.modules.layers import WanRMSNorm
from ..wanvideo.modules.model import WanModel
from ..wanvideo.shard import Shard
from ..wanvideo.tokens import BlockInputs, Heads, HeadsRead, ModelInputs, Projections, Tokens, video_tokens
from .control import DrawnPoses, Places, PoseControl, pose_tokens
from .encoders import pose_encoder, reference_encoder
from .refextractor import ReferenceExtractor, textless_block

MARK = "image_to_cond.conv_in.weight"
PATCHES, HINT = "refextractor.patch_embedding.weight", "input_hint_block.conv_out.conv.weight"
OWN = ("image_to_cond.", "input_hint_block.", "controlnet.", "controlnet_zero.", "refextractor.")
# The name of the poses in guidance.
POSE = "pose"


@dataclass(frozen=True, kw_only=True)
class Animation(Payload):
    """What the nodes of One-to-All emit: a reference, poses, or both.

    reference [1, 2z, 1, h, w]: encoded picture and mask; empty: the same of passes without the prompt. ref_strength:
    0-d. poses [1, 3, P, H, W] in -1..1: drawn, at the size of the video; prefix [1, 3, 1, H, W]: that of the reference.
    ref_start, ref_end, pose_start, pose_end: the parts of the steps (0..1) in which each acts. cfg: guidance by the
    poses, one number or one a step. leading: references in front of the video's latents, which poses leave alone.
    """

    reference: Tensor | None = None
    empty: Tensor | None = None
    ref_strength: Tensor | None = None
    ref_start: float = 0.0
    ref_end: float = 1.0
    poses: Tensor | None = None
    prefix: Tensor | None = None
    pose_strength: float = 1.0
    pose_start: float = 0.0
    pose_end: float = 1.0
    cfg: tuple[float, ...] = (1.0,)
    leading: int = 0
    needs: ClassVar[str] = (
        f"One-to-All needs a model with {MARK}: load its checkpoint in WanVideoModelLoader, or connect a module file "
        "to 'extra_model'."
    )

    def window(self, window: Window) -> Self:
        """The poses of the window's frames. Raises ValueError where there are too few."""
        if self.poses is None:
            return self
        count = self.poses.shape[2]
        places = window.pixels_in(count)
        needed = max(places) + 1
        if count < needed:
            raise ValueError(
                f"One-to-All's pose_images have {count} frames but the video needs {needed}: give one for each frame."
            )
        return replace(self, poses=self.poses[:, :, places], leading=window.leading)

    def guidance(self, scale: float, step: Step) -> tuple[Row, ...] | None:
        """Without text + cfg * (reference alone - without text) + scale * (all - reference alone)."""
        cfg = at_step(self.cfg, step)
        if self.poses is None or math.isclose(cfg, 1.0) or math.isclose(scale, 1.0):
            return None
        return Row(scale), Row(cfg - scale, NO_TEXT | {POSE}), Row(1.0 - cfg, NO_TEXT)

    def without(self, names: frozenset[str]) -> Self:
        """Without poses the reference stays; without the prompt alone an empty one is in its place."""
        if POSE in names:
            return replace(self, poses=None, prefix=None)
        return replace(self, reference=self.empty) if "text" in names else self

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Latents stay in float32 until the model's layers read them."""
        exact = {name: getattr(self, name) for name in ("reference", "empty")}
        exact = {name: None if t is None else t.to(device, torch.float32) for name, t in exact.items()}
        return replace(super().to(device, dtype), **exact)

    def stack(self, others: Sequence[Self]) -> Self:
        """All rows are of one video, whose poses are encoded once."""
        return replace(super().stack(others), poses=self.poses, prefix=self.prefix)

    def shows(self, step: Step) -> bool:
        """Whether the reference is there in this step."""
        return self.reference is not None and step.within(self.ref_start, self.ref_end)

    def steers(self, step: Step) -> bool:
        """Whether the poses act in this step."""
        acts = self.poses is not None and self.pose_strength != 0
        return acts and step.within(self.pose_start, self.pose_end)


class Seen(NamedTuple):
    """How blocks read the reference.

    feature [B, S, C]: of this block; places [S, D/2, 2]: its positions; turns [stop, D/2, 2]: those of the tokens that
    read it, of which the first `video` are the video's and those from `start` its own. strength: 0-d. heads
    [B, stop, H, D]: what they read.
    """

    feature: Tensor
    places: Tensor
    turns: Tensor
    strength: Tensor
    video: int
    start: int
    heads: Tensor | None = None


@dataclass
class State:
    """features [B, S, C]: those that the main blocks share among them; seen: of the first; control: of the poses."""

    features: Sequence[Tensor] = ()
    seen: Seen | None = None
    control: PoseControl | None = None


@dataclass(frozen=True)
class OneToAll(Extension):
    """control_layers, reference_layers: counts of blocks; channels: of a reference; pose_dim: of pose tokens."""

    control_layers: int
    reference_layers: int
    channels: int
    pose_dim: int
    payload: ClassVar[type] = Animation
    file: ClassVar[Kind] = Kind("One-to-All module", "WanVideo Extra Model Select", (r"^image_to_cond\.conv_in\.",))

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the encoder of references."""
        if MARK not in shapes:
            return None
        layers = (layer_count(shapes, f"{owner}.blocks.") for owner in ("controlnet", "refextractor"))
        return cls(*layers, shapes.get(PATCHES, shapes[MARK])[1], shapes.get(HINT, (0,))[0])

    def owns(self, key: str) -> bool:
        """Both encoders, control blocks, the reference extractor and its readers in the blocks."""
        return key.startswith(OWN) or ".ref_attn_" in key

    def build(self, model: WanModel) -> None:
        """Adds them to the model."""
        config = model.config
        dim = config.dim
        model.image_to_cond = reference_encoder(self.channels, config.out_dim)
        model.input_hint_block = pose_encoder(self.pose_dim)
        model.controlnet = nn.Module()
        model.controlnet.blocks = nn.ModuleList(textless_block(config) for _ in range(self.control_layers))
        model.controlnet_zero = nn.ModuleList(nn.Linear(dim, dim) for _ in range(self.control_layers))
        model.refextractor = ReferenceExtractor(config, self.reference_layers, self.channels)
        for block in model.blocks:
            block.ref_attn_k_img, block.ref_attn_v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            block.ref_attn_norm_k_img = WanRMSNorm(dim, config.eps)

    def stacks(self, model: WanModel) -> Mapping[str, nn.ModuleList]:
        """The blocks of the poses and of the reference."""
        return {"controlnet.blocks": model.controlnet.blocks, "refextractor.blocks": model.refextractor.blocks}

    def prepare(
        self, model: WanModel, payload: Animation, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, State | None]:
        """The reference as a frame and as features, poses as tokens. Raises ValueError where either has another size.

        The reference's tokens come last, but its frame first, and the video's later.
        """
        state, count, start = State(), video_tokens(tokens.grid), tokens.x.shape[1]
        if payload.shows(inputs.step):
            self._check(payload.reference, tokens)
            tokens = _with_frame(model, payload.reference, inputs, tokens)
            state.features, state.seen = _read(model, payload, inputs, tokens, start)
        if payload.steers(inputs.step):
            places = Places(count, start, tokens.x.shape[1])
            drawn = DrawnPoses(payload.poses, None if state.seen is None else payload.prefix, payload.leading)
            poses = pose_tokens(model.input_hint_block, drawn, tokens)
            state.control = PoseControl(poses, payload.pose_strength, places)
        return tokens, state if state.seen is not None or state.control is not None else None

    def _check(self, reference: Tensor, tokens: Tokens) -> None:
        if reference.shape[1] != self.channels or reference.shape[3:] != tokens.latents.shape[3:]:
            raise ValueError(
                f"One-to-All's reference has latents {tuple(reference.shape[1:])} but the model reads "
                f"{(self.channels, 1, *tokens.latents.shape[3:])} (channels, frames, height, width): encode ref_image "
                "at the width and height of the video, with the VAE of this model."
            )

    def on(self, state: State, shard: Shard) -> State:
        """Features are the same for all; tokens that read them, and those of the poses, are this part's."""
        seen, control = state.seen, state.control
        if seen is not None:
            seen = seen._replace(
                turns=shard.take(seen.turns, dim=0), video=shard.count(seen.video), start=shard.count(seen.start)
            )
        return State(state.features, seen, None if control is None else control.on(shard))

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: State) -> Tensor:
        """Adds what the poses' control blocks give."""
        return x if state.control is None else state.control.behind(model, index, x, inputs)

    def block_cond(self, state: State, index: int) -> Seen | None:
        """With the features of this block: a run of main blocks shares those of one block of the extractor."""
        return None if state.seen is None else state.seen._replace(feature=state.features[index])

    def reads_heads(self, cond: Seen) -> HeadsRead:
        """The result alone, which it adds to."""
        return HeadsRead(queries=0, keys=0)

    def projected(self, block: WanAttentionBlock, value: Projections, cond: Seen) -> tuple[Projections, Seen]:
        """What tokens read of the reference, with the queries of self-attention."""
        attention = block.self_attn
        feature = shared_input(cond.feature, block.ref_attn_k_img, block.ref_attn_v_img)
        q = value.q[:, : cond.turns.shape[0]]
        q = attention.norm_q.placed(q, cond.turns, attention.heads)
        k = block.ref_attn_norm_k_img.placed(block.ref_attn_k_img(feature), cond.places, attention.heads)
        seen = block.cross_attn.attention(q, k, attention.split(block.ref_attn_v_img(feature)))
        return value, cond._replace(heads=seen)

    def self_attn(self, block: WanAttentionBlock, heads: Heads, cond: Seen) -> tuple[Heads, Seen]:
        """Adds it to the video's tokens and the reference's own."""
        seen, stop = cond.heads * cond.strength.to(heads.out.dtype), cond.turns.shape[0]
        others = torch.zeros_like(seen[:, cond.video : cond.start])
        seen = torch.cat((seen[:, : cond.video], others, seen[:, cond.start :]), dim=1)
        out = torch.cat((heads.out[:, :stop] + seen, heads.out[:, stop:]), dim=1)
        return heads._replace(out=out), cond


def _with_frame(model: WanModel, reference: Tensor, inputs: ModelInputs, tokens: Tokens) -> Tokens:
    """The sequence with the reference as a frame in front, as noisy as the video's last one."""
    frame = model.image_to_cond(reference[:, :, 0])
    frame = F.pad(frame, (0, 0, 0, 0, 0, model.config.in_dim - frame.shape[1]))[:, :, None]
    patches = model.patch_embedding(frame.to(model.patch_embedding.weight.dtype))
    x = patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)
    _, height, width = tokens.grid
    later = model.rope(tokens.grid, start=(1, 0, 0), riflex_index=inputs.riflex_index, device=tokens.x.device)
    first = model.rope((1, height, width), device=tokens.x.device)
    moved = tokens._replace(rope=torch.cat((later, tokens.rope[video_tokens(tokens.grid) :])))
    return moved.appended(x.expand(tokens.x.shape[0], -1, -1), first, tokens.last_frame_mod)


def _read(
    model: WanModel, payload: Animation, inputs: ModelInputs, tokens: Tokens, start: int
) -> tuple[list[Tensor], Seen]:
    """Features for each main block, and how the tokens, of which those from `start` are the reference's, read them."""
    reference, batch = payload.reference, tokens.x.shape[0]
    frames, height, width = tokens.grid
    count = video_tokens(tokens.grid)
    time = inputs.timestep if inputs.timestep.dim() == 1 else inputs.timestep[:, -1]
    # At time 0 of its table a rotation leaves the part of a head alone that turns with time.
    places = model.rope((1, height, width), device=tokens.x.device)
    made = model.refextractor.features(model, reference, time[: reference.shape[0]], places)
    run = math.ceil(len(model.blocks) / len(made))
    made = [feature.expand(batch, -1, -1).contiguous() for feature in made]
    turns = torch.cat((places.repeat(frames, 1, 1), tokens.rope[count:start], places))
    seen = Seen(made[0], places, turns, payload.ref_strength, count, start)
    return [made[index // run] for index in range(len(model.blocks))], seen


EXTENSION = OneToAll
