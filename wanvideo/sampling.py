"""One run of the sampler node: what it asks for, and how that becomes latents [C, F, H, W] float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .denoise import LatentHook, denoise
from .extension import Payload, RunCache
from .extensions.clip_image import ClipImage
from .extensions.prompt_segments import PromptSegments
from .guidance import Conditioning, Conditions, Denoiser, Guidance, KeptConditioning, per_step
from .latents import (
    CHANNELS_2_2,
    GivenLatents,
    Inpainting,
    add_noise,
    change_mask,
    condition_channels,
    given_samples,
    noise_shape,
    start_noise,
)
from .payloads import VAE_TIME_STRIDE, ImageEmbeds, TextEmbeds
from .schedulers import Schedule
from .step_cache import StepCache, StepMemories, memories
from .windows import ContextOptions, WindowedDenoiser, free_noise

if TYPE_CHECKING:
    from ..host import Host, Progress
    from ..multitalk.audio import MultiTalkEmbeds
    from ..multitalk.extension import AudioWindow
    from .loading import WanVideoModel
    from .modules.model import WanModel

log = logging.getLogger("wanvideo")


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One run of the sampler node.

    text: several positive prompts share out the frames, or the windows. cfg: one text scale, or one a step. samples: a
    LATENT to start or go on from. seed: of the starting noise and of all noise that solvers draw. feta: payload of
    Enhance-A-Video. context: windows for a video longer than the model's. cache: leaves out steps.
    """

    model: WanVideoModel
    text: TextEmbeds | None
    image: ImageEmbeds
    schedule: Schedule
    cfg: float | Sequence[float]
    seed: int
    samples: dict[str, object] | None = None
    add_noise_to_samples: bool = False
    batched_cfg: bool = False
    riflex_index: int = 0
    multitalk: MultiTalkEmbeds | None = None
    feta: Payload | None = None
    context: ContextOptions | None = None
    cache: StepCache | None = None
    force_offload: bool = True

    @property
    def noises_samples(self) -> bool:
        """Whether `samples` are clean video to be noised, rather than latents to go on from."""
        return self.add_noise_to_samples or self.schedule.spec.denoise_strength < 1

    @property
    def guidance(self) -> Guidance:
        """The scales of every step."""
        audio = (1.0,) if self.multitalk is None else per_step(self.multitalk.cfg_scale)
        return Guidance(cfg=per_step(self.cfg), audio_cfg=audio, batched=self.batched_cfg)


class Start(NamedTuple):
    """latents to begin with, the hooks that go with them, frames at timestep 0, and the original under a mask."""

    latents: Tensor
    hooks: tuple[LatentHook, ...]
    clean_frames: tuple[int, ...] = ()
    original: Tensor | None = None


@dataclass
class RunWatcher:
    """Watcher that asks the host about cancellation, shows progress and follows per-step LoRA strengths.

    done counts on over several runs (windows) with one progress bar; note says which one is on.
    """

    host: Host
    progress: Progress
    set_step: Callable[[int], None]
    done: int = 0
    note: str = ""

    def begin(self, index: int) -> None:
        """Stops here if the user cancelled."""
        self.host.check_cancelled()
        self.set_step(index)

    def end(self, index: int, clean: Tensor) -> None:
        """One step further, with the estimate as preview."""
        self.done += 1
        self.progress.update(self.done, note=self.note, preview=clean)


def sample(request: SampleRequest, host: Host) -> tuple[dict[str, object], dict[str, object]]:
    """Run the sampler node: LATENT dicts of the result and of the last estimate of the clean latents.

    Raises ValueError where model, inputs and options do not fit, and the host's exception on cancellation.
    """
    if request.cache is not None:
        log.info("Steps may be left out by %s.", request.cache.described(request.model))
    if request.image.loop is not None:
        from ..multitalk.loop import run_loop

        return run_loop(request, host)
    if request.schedule.spec.name == "multitalk":
        raise ValueError(
            "The scheduler 'multitalk' is only for long talking video (WanVideoImageToVideoMultiTalk); choose another."
        )
    schedule = request.schedule.fresh()
    generator = torch.Generator().manual_seed(request.seed)
    start = prepare_start(request, schedule, generator)
    frames, height, width = start.latents.shape[1:]
    log.info("Sampling %d latent frames of %dx%d in %d steps.", frames, width, height, len(schedule))
    windowed = request.context is not None and request.context.apply_to(frames)
    tried = (request.context.latent_size if windowed else frames, height, width)
    request.model.try_attention(tried, request.guidance.batch)
    try:
        with host.progress(len(schedule), "Sampling") as progress, request.model.active() as transformer:
            denoiser = _denoiser(request, transformer, host, frames)
            result = denoise(
                denoiser,
                schedule,
                latents=start.latents,
                generator=generator,
                hooks=start.hooks,
                clean_frames=start.clean_frames,
                watcher=RunWatcher(host, progress, request.model.set_step),
            )
    finally:
        if request.force_offload:
            request.model.managed.release()
    flags = _flags(request, generator, start.original)
    return _latent(result.latents, flags), _latent(result.clean, flags)


def prepare_start(request: SampleRequest, schedule: Schedule, generator: torch.Generator) -> Start:
    """What the run starts from. The seed's noise is always drawn first; samples may then restore a generator state."""
    shape = noise_shape(request.image, request.model.config)
    noise = start_noise(shape, generator)
    if request.context is not None and request.context.freenoise and request.context.apply_to(shape[1]):
        noise = free_noise(noise, request.context, generator)
    latents = noise
    samples = request.samples or {}
    if samples.get("generator_state") is not None:
        generator.set_state(samples["generator_state"])
    given = given_samples(samples, shape)
    hooks: list[LatentHook] = []
    original = None
    if given is not None:
        latents = add_noise(given, noise, schedule.sigmas[0]) if request.noises_samples else given
        if samples.get("noise_mask") is not None:
            original = samples.get("original_image")
            original = given if original is None else original
            hooks.append(Inpainting(original, noise, change_mask(samples["noise_mask"], shape), schedule))
    clean_frames: tuple[int, ...] = ()
    if request.image.given_latents:
        held = GivenLatents.placed(request.image.given_latents, shape)
        if schedule.first_index == 0:
            latents = held.before(latents, 0)
        if request.model.config.out_dim == CHANNELS_2_2:
            clean_frames = held.frames
        if clean_frames or request.multitalk is not None:
            hooks.append(held)
    return Start(latents, tuple(hooks), clean_frames, original)


def make_denoiser(
    request: SampleRequest,
    transformer: WanModel,
    *,
    host: Host,
    conditions: Conditions,
    texts: RunCache | None = None,
    kept: StepMemories | None = None,
) -> Denoiser:
    """The guided model of one run or window, under the scales that the request asks for.

    texts: as Denoiser's. kept: what the step cache remembers; None begins anew.
    """
    return Denoiser(
        transformer,
        conditions,
        guidance=request.guidance,
        device=host.device(),
        dtype=request.model.base_dtype,
        riflex_index=request.riflex_index,
        keeps=not any(isinstance(file.strength, tuple) for file in request.model.loras),
        texts=texts,
        memories=new_memories(request, host) if kept is None else kept,
    )


def new_memories(request: SampleRequest, host: Host) -> StepMemories | None:
    """Empty memories of the request's step cache, if it has one."""
    return None if request.cache is None else memories(request.cache, request.model, host.device())


def conditionings(
    request: SampleRequest, transformer: WanModel, audio: AudioWindow | None = None
) -> tuple[Conditioning, ...]:
    """Everything that conditions the model besides text and channels: CLIP, speech, Enhance-A-Video, other payloads.

    CLIP features for a model without image cross-attention (Wan 2.2) are left out, with a warning.
    """
    found = []
    clip = request.image.clip
    if clip is not None and any(extension.payload is ClipImage for extension in transformer.extensions):
        negative = None if clip.negative is None else ClipImage(clip.negative)
        found.append(Conditioning(ClipImage(clip.positive), no_text=negative))
    elif clip is not None:
        log.warning("This model has no image cross-attention, so clip_embeds have no effect.")
    if audio is not None:
        found.append(Conditioning(audio, no_audio=audio.silent()))
    if request.feta is not None and request.image.latent_shape[1] > 1:
        found.append(Conditioning(request.feta))
    return *found, *(Conditioning(payload) for payload in request.image.payloads)


def _denoiser(request: SampleRequest, transformer: WanModel, host: Host, frames: int) -> Denoiser | WindowedDenoiser:
    """Of the whole video, or of context windows where it is longer than one."""
    conditions = _conditions(request, transformer, _speech(request, frames))
    context = request.context
    if context is None or not context.apply_to(frames):
        if context is not None:
            log.info("The video is not longer than context_frames, so context_options have no effect.")
        return make_denoiser(request, transformer, host=host, conditions=conditions)
    # Prompts, and what else is the same in every window, are moved once, so that windows share what is kept of them.
    device, dtype = host.device(), request.model.base_dtype
    shared = tuple(KeptConditioning(c, device, dtype) if c.window((0,)) is c else c for c in conditions.conditionings)
    negative = None if conditions.negative is None else conditions.negative.to(device, dtype)
    texts = RunCache()
    return WindowedDenoiser(
        replace(conditions, negative=negative, conditionings=shared),
        options=context,
        texts=[prompt.to(device, dtype) for prompt in request.text.positive],
        device=device,
        make=lambda window, kept: make_denoiser(
            request, transformer, host=host, conditions=window, texts=texts, kept=kept
        ),
        memories=lambda: new_memories(request, host),
        model=transformer,
    )


def _conditions(request: SampleRequest, transformer: WanModel, audio: AudioWindow | None) -> Conditions:
    image = request.image
    if request.text is None or not request.text.positive:
        raise ValueError("There is no prompt: connect text_embeds (WanVideoTextEncode) to the sampler.")
    first, *others = request.text.positive
    # Context windows pick one prompt each.
    shared = bool(others) and (request.context is None or not request.context.apply_to(image.latent_shape[1]))
    segments = (Conditioning(PromptSegments(tuple(others)), no_text=PromptSegments()),) if shared else ()
    return Conditions(
        positive=first,
        negative=request.text.negative[0] if request.text.negative else None,
        channels=condition_channels(image.cond, image.mask, transformer.config),
        conditionings=conditionings(request, transformer, audio) + segments,
    )


def _speech(request: SampleRequest, frames: int) -> AudioWindow | None:
    if request.multitalk is None:
        return None
    return request.multitalk.window(range((frames - 1) * VAE_TIME_STRIDE + 1))


def _flags(request: SampleRequest, generator: torch.Generator, original: Tensor | None) -> dict[str, object]:
    flags: dict[str, object] = {
        "generator_state": generator.get_state(),
        "extra_end_frame": request.image.extra_end_frame,
        "has_ref": request.image.leading_latents,
    }
    if original is not None:
        flags["original_image"] = original
    return flags


def _latent(latents: Tensor, flags: dict[str, object]) -> dict[str, object]:
    return {"samples": latents[None].float().cpu(), **flags}
