"""Wan2.2-S2V (speech to video) as an extension of the Wan transformer.

Speech reaches the video tokens behind every third or fourth block; a reference picture and the frames before the video
are tokens behind it, at time 0; the latents of a pose video are added to the patches.

Source: Wan-Video/Wan2.2 (wan/modules/s2v/model_s2v).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.assign import layer_count
from ..wanvideo.conditioning import Payload, Window
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.tokens import BlockInputs, ModelInputs, Tokens, video_tokens
from .modules import CausalAudioEncoder, FramePacker, SpeechAttention, SpeechModulation, past_positions

INJECTOR = "audio_injector"
INJECTORS, MODULATIONS = f"{INJECTOR}.injector", f"{INJECTOR}.injector_adain_layers"
ENCODER, POSE, PACKER, MARKS = "casual_audio_encoder", "cond_encoder", "frame_packer", "trainable_cond_mask"
# The blocks of the 14B model that speech is added behind.
INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
# Rows of `trainable_cond_mask`.
VIDEO, REFERENCE, PAST = range(3)
# The reference's position in time, and how far it stays behind a video that is longer.
REFERENCE_TIME, REFERENCE_DISTANCE = 30, 9
# The packer's coarsest patches are of so many tokens.
LEAST_SIDE = 4


@dataclass(frozen=True, kw_only=True)
class SpeechToVideo(Payload):
    """What WanVideoAddS2VEmbeds emits.

    audio [1, layers, audio_dim, T]: encoder features, one column a video frame, or None. scale: strength, 0-d.
    reference [1, z, n, h, w]: an encoded picture. pose [1, z, F, h, w]: an encoded pose video, which acts from `start`
    to `end` (0..1 of the steps). past [1, z, n, h, w]: latents of the frames before the video. lead: video frames
    before the first column that the encoder hears, as that column; lead_latents: how many latent frames these are,
    which its tokens are cut by.
    """

    audio: Tensor | None
    scale: Tensor
    reference: Tensor | None = None
    pose: Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    past: Tensor | None = None
    lead: int = 1
    lead_latents: int = 0
    needs: ClassVar[str] = (
        f"S2V embeds need a model with {INJECTORS}.0.k.weight: load a Wan2.2-S2V checkpoint in WanVideoModelLoader."
    )

    def window(self, window: Window) -> Self:
        """The speech and poses of its frames; speech that ends early holds its last column.

        Raises ValueError for a pose video that is too short.
        """
        audio, pose = self.audio, self.pose
        if audio is not None:
            audio = audio[..., torch.tensor(window.sounding).clamp(max=audio.shape[-1] - 1)]
        if pose is not None:
            if max(window.latents) >= pose.shape[2]:
                raise ValueError(
                    f"pose_latent has {pose.shape[2]} latent frames but the video needs {max(window.latents) + 1}: "
                    "encode a pose video that is as long as the video."
                )
            pose = pose[:, :, list(window.latents)]
        return replace(self, audio=audio, pose=pose)

    def without(self, names: frozenset[str]) -> Self:
        """Passes without the prompt hear nothing, either, as the authors guide it."""
        if "text" not in names or self.audio is None:
            return self
        return replace(self, audio=torch.zeros_like(self.audio))


class Speech(NamedTuple):
    """Speech tokens [B * F, N, C] times their strength, and one vector a latent frame [B * F, C]."""

    tokens: Tensor
    overall: Tensor


def injected_blocks(layers: int) -> tuple[int, ...]:
    """The blocks of a transformer of so many that speech is added behind."""
    return tuple(index for index in INJECTED if index < layers)


@dataclass(frozen=True)
class SpeechInjection(Extension):
    """Sizes: layers and channels of the speech encoder's features, speech tokens a frame, channels of poses."""

    layers: int
    audio_dim: int
    tokens: int
    pose_dim: int
    payload: ClassVar[type] = SpeechToVideo

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Present where the file has the speech encoder. Raises ValueError for blocks that have no injector."""
        first = shapes.get(f"{ENCODER}.encoder.conv1_local.conv.weight")
        if first is None or f"{POSE}.weight" not in shapes:
            return None
        have, want = layer_count(shapes, f"{INJECTORS}."), len(injected_blocks(layer_count(shapes, "blocks.")))
        if have != want:
            raise ValueError(
                f"The file has {have} S2V audio injectors, but a transformer of its size has {want}: download it again."
            )
        quarter = shapes[f"{ENCODER}.encoder.conv2.conv.weight"][1]
        return cls(
            layers=shapes[f"{ENCODER}.weights"][1],
            audio_dim=first[1],
            tokens=first[0] // quarter,
            pose_dim=shapes[f"{POSE}.weight"][1],
        )

    def owns(self, key: str) -> bool:
        """The encoders, injectors, the packer and the marks of kinds of tokens."""
        return key.startswith(tuple(f"{part}." for part in (INJECTOR, ENCODER, POSE, PACKER, MARKS)))

    def build(self, model: WanModel) -> None:
        """Adds the modules of `owns`."""
        config = model.config
        blocks = injected_blocks(config.num_layers)
        model.casual_audio_encoder = CausalAudioEncoder(self.layers, self.audio_dim, config.dim, self.tokens)
        model.audio_injector = nn.Module()
        model.audio_injector.injector = nn.ModuleList(SpeechAttention(config) for _ in blocks)
        model.audio_injector.injector_adain_layers = nn.ModuleList(SpeechModulation(config.dim) for _ in blocks)
        size = config.patch_size
        model.cond_encoder = nn.Conv3d(self.pose_dim, config.dim, kernel_size=size, stride=size)
        model.frame_packer = FramePacker(config.out_dim, config.dim)
        model.trainable_cond_mask = nn.Embedding(3, config.dim)

    def stacks(self, model: WanModel) -> Mapping[str, nn.ModuleList]:
        """The injectors, and the layers that modulate their norms."""
        return {INJECTORS: model.audio_injector.injector, MODULATIONS: model.audio_injector.injector_adain_layers}

    def prepare(
        self, model: WanModel, payload: SpeechToVideo, inputs: ModelInputs, tokens: Tokens
    ) -> tuple[Tokens, Speech | None]:
        """Poses on the video's tokens, reference and past behind them; idle from here on where there is no speech."""
        marks = model.trainable_cond_mask.weight.to(tokens.x.dtype)
        pose = payload.pose if inputs.step.within(payload.start, payload.end) else None
        count = video_tokens(tokens.grid)
        video = tokens.x[:, :count] + _pose_tokens(model, pose, tokens) + marks[VIDEO]
        grid, device, x = tokens.grid, tokens.x.device, torch.cat((video, tokens.x[:, count:]), dim=1)
        tokens = tokens._replace(x=x)
        if payload.reference is not None:
            # Condition channels that another system fills are empty in the reference.
            reference = _patches(model.patch_embedding, payload.reference, tokens, "ref_latent", model.config.out_dim)
            start = (max(REFERENCE_TIME, grid[0] + REFERENCE_DISTANCE), 0, 0)
            rope = model.rope((payload.reference.shape[2], *grid[1:]), start=start, device=device)
            tokens = tokens.appended(reference + marks[REFERENCE], rope, model.clean_modulation())
        if payload.past is not None:
            if min(grid[1:]) < LEAST_SIDE:
                raise ValueError("The loop of S2V needs a width and height of at least 64 pixels.")
            rope = past_positions(model.config.head_dim, *grid[1:], device)
            packed = model.frame_packer(payload.past).to(tokens.x.dtype)
            tokens = tokens.appended(packed + marks[PAST], rope, model.clean_modulation())
        return tokens, None if payload.audio is None else self._speech(model, payload, tokens)

    def _speech(self, model: WanModel, payload: SpeechToVideo, tokens: Tokens) -> Speech:
        audio, batch = payload.audio, tokens.x.shape[0]
        if tuple(audio.shape[1:3]) != (self.layers, self.audio_dim):
            raise ValueError(
                f"The S2V model hears {self.layers} layers of {self.audio_dim} features but the audio encoder gives "
                f"{audio.shape[1]} of {audio.shape[2]}: load wav2vec2-large-xlsr-53-english in AudioEncoderLoader."
            )
        heard = torch.cat((audio[..., :1].expand(-1, -1, -1, payload.lead), audio), dim=-1)
        parts = (part[:, payload.lead_latents :] for part in model.casual_audio_encoder(heard))
        speech, overall = (part.to(tokens.x.dtype).expand(batch, *part.shape[1:]).flatten(0, 1) for part in parts)
        if len(speech) != batch * tokens.grid[0]:
            raise ValueError(
                f"The speech covers {len(speech) // batch} latent frames but the video has {tokens.grid[0]}."
            )
        return Speech(speech * payload.scale.to(speech.dtype), overall)

    def after_block(self, model: WanModel, index: int, x: Tensor, inputs: BlockInputs, state: Speech) -> Tensor:
        """Adds what the video tokens hear, behind the blocks that have an injector."""
        blocks = injected_blocks(len(model.blocks))
        if index not in blocks:
            return x
        place, count = blocks.index(index), video_tokens(inputs.grid)
        injector, modulation = model.audio_injector.injector[place], model.audio_injector.injector_adain_layers[place]
        with model.visit(modulation):
            shift, scale = modulation(state.overall)
        video, others = x[:, :count], x[:, count:]
        with model.visit(injector):
            heard = injector(video.reshape(len(state.tokens), -1, x.shape[-1]), shift, scale, state.tokens)
        video = video + heard.reshape(video.shape)
        return torch.cat((video, others), dim=1) if others.shape[1] else video


def _patches(embedding: nn.Conv3d, latents: Tensor, tokens: Tokens, name: str, channels: int) -> Tensor:
    """Latents [1 or B, z, n, h, w] as tokens [1 or B, n * S, C]. Raises ValueError where they do not fit the video."""
    if latents.shape[1] != channels:
        raise ValueError(
            f"{name} has {latents.shape[1]} channels but the model reads {channels}: encode it with the Wan 2.1 VAE."
        )
    latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, embedding.in_channels - channels))
    patches = embedding(latents.to(embedding.weight.dtype))
    if tuple(patches.shape[3:]) != tokens.grid[1:]:
        raise ValueError(
            f"{name} has frames of {tuple(patches.shape[3:])} tokens but the video has {tokens.grid[1:]}: encode it at "
            "the width and height of the video."
        )
    return patches.flatten(2).transpose(1, 2).to(tokens.x.dtype)


def _pose_tokens(model: WanModel, pose: Tensor | None, tokens: Tokens) -> Tensor:
    """What poses add to the video's tokens. Without any the encoder sees zeros, as in training: its bias is left."""
    if pose is None:
        return model.cond_encoder.bias.to(tokens.x.dtype)
    if pose.shape[2] != tokens.grid[0]:
        raise ValueError(f"pose_latent has {pose.shape[2]} latent frames but the video has {tokens.grid[0]}.")
    return _patches(model.cond_encoder, pose, tokens, "pose_latent", model.cond_encoder.in_channels)


EXTENSION = SpeechInjection
