"""What one run of the sampler node is asked for: embeds that other nodes made, and the sampler's own settings.

Image and video tensors of nodes are [frames, height, width, channels] in 0..1 (ComfyUI's IMAGE). Latents are
[channels, frames, height, width]; a ComfyUI LATENT is a dict whose `samples` is [1, channels, frames, height, width].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .conditioning import Payload, Step
from .guidance import Guidance, per_step
from .loading import WanVideoModel
from .modifier import Modifier
from .opaque import Opaque
from .schedulers import Schedule
from .step_cache import StepCache
from .windows import ContextOptions

if TYPE_CHECKING:
    from ..host import Host

Latent = dict[str, object]

NO_PROMPT = "There is no prompt: connect text_embeds (WanVideoTextEncode) to the sampler."


@dataclass(frozen=True, kw_only=True)
class TextEmbeds(Opaque):
    """Encoded prompts (socket WANVIDEOTEXTEMBEDS).

    positive: one tensor [tokens, text_dim] per prompt, without padding; windows share several out among themselves.
    negative: the same for the negative prompt, or empty where there is none. payloads: what belongs to the text.
    """

    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...] = ()
    payloads: tuple[Payload, ...] = ()


class Loop(Protocol):
    """A way of its own to make the whole video, in the place of one pass over the schedule."""

    def run(self, request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
        """As the sampler: LATENT dicts of the result and of the last estimate of the clean latents."""


@dataclass(frozen=True, kw_only=True)
class ImageEmbeds(Opaque):
    """What the video is conditioned on besides text (socket WANVIDIMAGE_EMBEDS).

    latent_shape: (channels, frames, height, width) of the noise; num_frames: pixel frames of the result.
    payloads: what conditions the model, encoded pictures included. leading_latents, trailing_latents: how many latent
    frames at either end are references, which windows keep and decoding drops. extra_end_frame: the last latent frame
    is an end image encoded on its own; decoding drops its pixel frame. given_latents: (latent frame, [channels, frames,
    height, width]) pairs that are known before sampling; a negative frame counts from the end. modifiers: change how
    this video is sampled, the outermost first. loop: makes the video in a way of its own.
    """

    latent_shape: tuple[int, int, int, int]
    num_frames: int
    payloads: tuple[Payload, ...] = ()
    leading_latents: int = 0
    trailing_latents: int = 0
    extra_end_frame: bool = False
    given_latents: tuple[tuple[int, Tensor], ...] = ()
    modifiers: tuple[Modifier, ...] = ()
    loop: Loop | None = None

    @property
    def ends(self) -> tuple[int, int]:
        """How many latents in front of the video and behind it are no part of it: references, and an end image."""
        return self.leading_latents, self.trailing_latents + self.extra_end_frame


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One run of the sampler node.

    text: several positive prompts share out the frames, or the windows. cfg: one text scale, or one a step. samples: a
    LATENT to start or go on from. seed: of the starting noise and of all noise that solvers draw. noise: starting noise
    [C, F, H, W] in the place of the seed's. payloads: what conditions the model besides those of text and image.
    modifiers: what changes how the run is sampled, the outermost first. context: windows for a video longer than the
    model's. cache: leaves out steps.
    """

    model: WanVideoModel
    text: TextEmbeds | None
    image: ImageEmbeds
    schedule: Schedule
    cfg: float | Sequence[float]
    seed: int
    samples: Latent | None = None
    noise: Tensor | None = None
    add_noise_to_samples: bool = False
    batched_cfg: bool = False
    riflex_index: int = 0
    payloads: tuple[Payload, ...] = ()
    modifiers: tuple[Modifier, ...] = ()
    context: ContextOptions | None = None
    cache: StepCache | None = None
    force_offload: bool = True

    @property
    def noises_samples(self) -> bool:
        """Whether `samples` are clean video to be noised, rather than latents to go on from."""
        return self.add_noise_to_samples or self.schedule.spec.denoise_strength < 1

    @property
    def all_payloads(self) -> tuple[Payload, ...]:
        """Everything that conditions the model besides the prompts themselves, in the form for its sizes."""
        text = () if self.text is None else self.text.payloads
        payloads = (*self.image.payloads, *text, *self.payloads, *self.model.payloads)
        fitted = joined = tuple(payload.fitted(self.model.config) for payload in payloads)
        for payload in fitted:
            joined = payload.joined(joined)
        return joined

    def set_step(self, index: int) -> None:
        """Tell the model's LoRAs which step of this run comes."""
        step = Step(index=self.schedule.first_index + index, total=self.schedule.total, in_run=index)
        self.model.set_step(index, filled=all(payload.fills(step) for payload in self.all_payloads))

    @property
    def guidance(self) -> Guidance:
        """The rule of the run."""
        return Guidance(
            cfg=per_step(self.cfg), payloads=self.all_payloads, modifiers=self.modifiers, batched=self.batched_cfg
        )

    def find(self, kind: type[Payload]) -> Payload | None:
        """The payload of this kind, or None."""
        return next((payload for payload in self.all_payloads if isinstance(payload, kind)), None)


def payloads_of(*values: Payload | ImageEmbeds | None) -> tuple[Payload, ...]:
    """The payloads of what is connected to a node: embeds bring theirs, None brings nothing.

    Raises ValueError for embeds with more than that, which the node's own would go without.
    """
    for value in values:
        if isinstance(value, ImageEmbeds) and (value.modifiers or value.given_latents or value.loop is not None):
            raise ValueError(
                "Embeds that also change how a video begins or is made are connected to a node that takes only their "
                "conditions: connect the nodes that add the rest behind this one."
            )
    parts = ((v.payloads if isinstance(v, ImageEmbeds) else (v,)) for v in values if v is not None)
    return tuple(payload for part in parts for payload in part)


def contributions(sockets: Iterable[tuple[str, object]]) -> tuple[tuple[Payload, ...], tuple[Modifier, ...]]:
    """The payloads and the modifiers among the values of a sampler's optional sockets; a tuple holds several.

    Raises ValueError, naming the socket, for a value that is neither.
    """
    payloads: list[Payload] = []
    modifiers: list[Modifier] = []
    for name, value in sockets:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Payload):
                payloads.append(part)
            elif isinstance(part, Modifier):
                modifiers.append(part)
            elif part is not None:
                raise ValueError(
                    f"The input '{name}' of the sampler got a {type(part).__name__}, which this version cannot use: "
                    "disconnect it."
                )
    return tuple(payloads), tuple(modifiers)
