"""One run of the sampler node: from what it asks for to latents [C, F, H, W] float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .advice import warn_of_settings
from .conditioning import Payload, Window
from .denoise import Pace, denoise
from .finite import check_finite
from .frames import VAE_TIME_STRIDE
from .guidance import Conditions, Denoiser
from .latents import (
    CHANNELS_2_2,
    GivenLatents,
    Inpainting,
    add_noise,
    change_mask,
    given_samples,
    noise_shape,
    start_noise,
)
from .modifier import LatentHook, Modifier, Start
from .modules.model import WanModel
from .request import NO_PROMPT, Latent, SampleRequest
from .schedulers import Schedule
from .step_cache import StepMemories, memories
from .windows import WindowedDenoiser, free_noise

if TYPE_CHECKING:
    from ..host import Host, Progress

log = logging.getLogger("wanvideo")


@dataclass
class RunWatcher:
    """Watcher that asks the host about cancellation, shows progress and follows per-step LoRA strengths.

    done counts on over several runs (windows) with one progress bar; note says which one is on. pace: of the first of
    them, which kernels are made and tuned in; the log tells it.
    """

    host: Host
    progress: Progress
    set_step: Callable[[int], None]
    done: int = 0
    note: str = ""
    pace: Pace | None = None

    def begin(self, index: int) -> None:
        """Stops here if the user cancelled."""
        self.host.check_cancelled()
        self.set_step(index)

    def end(self, index: int, clean: Tensor) -> None:
        """One step further, with the estimate as preview."""
        self.done += 1
        self.progress.update(self.done, note=self.note, preview=clean)

    def finish(self, pace: Pace) -> None:
        """Tells what the first step cost, once a run."""
        if self.pace is not None:
            return
        self.pace = pace
        if pace.later is not None:
            log.info("The first step took %.1f s, the others %.1f s each.", *pace)


def sample(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
    """Run the sampler node: LATENT dicts of the result and of the last estimate of the clean latents.

    Raises ValueError where model, inputs and options do not fit, and the host's exception on cancellation.
    """
    if request.model.elsewhere is not None:
        return request.model.elsewhere.run(request, host)
    warn_of_settings(request)
    if request.cache is not None:
        log.info("Steps may be left out by %s.", request.cache.described(request.model))
    own = (modifier for extension in request.model.transformer.extensions for modifier in extension.modifiers())
    request = replace(
        request,
        schedule=request.schedule.for_width(request.model.config.dim),
        modifiers=(*request.modifiers, *request.image.modifiers, *own),
    )
    if request.image.loop is not None and any(type(m).begin is not Modifier.begin for m in request.modifiers):
        raise ValueError(
            "These image embeds make their video in a loop of windows, and something that changes what a run starts "
            "from is connected, too: disconnect one of them."
        )
    run = sample_once if request.image.loop is None else request.image.loop.run
    for modifier in reversed(request.modifiers):
        run = modifier.around_run(run)
    return run(request, host)


def sample_once(request: SampleRequest, host: Host) -> tuple[Latent, Latent]:
    """One pass over the schedule."""
    if request.schedule.for_loops:
        raise ValueError(
            f"The scheduler '{request.schedule.spec.name}' is only for videos that are made in a loop of windows: "
            "choose another."
        )
    _check_channels(request)
    check_conditions(request)
    schedule = request.schedule.fresh()
    generator = torch.Generator().manual_seed(request.seed)
    start = prepare_start(request, schedule, generator)
    frames, height, width = start.latents.shape[1:]
    log.info("Sampling %d latent frames of %dx%d in %d steps.", frames, width, height, len(schedule))
    seen = request.context.seen(frames - _references(request)) + _references(request) if request.context else frames
    size, passes = (seen, height, width), request.guidance.most_passes(len(schedule))
    request.model.try_attention(size, passes)
    try:
        with host.progress(len(schedule), "Sampling") as progress, active_model(request, size, passes) as transformer:
            result = denoise(
                _denoiser(request, transformer, frames),
                schedule,
                latents=start.latents,
                generator=generator,
                hooks=start.hooks,
                modifiers=request.modifiers,
                frame_times=start.frame_times,
                watcher=RunWatcher(host, progress, request.set_step),
            )
    finally:
        if request.force_offload:
            request.model.managed.release()
    flags = _flags(request, generator, start.original, frames - _references(request))
    return _latent(result.latents, flags), _latent(result.clean, flags)


def _check_channels(request: SampleRequest) -> None:
    expected, joins = request.model.config.condition_channels, request.model.transformer.joins
    if expected and not any(payload.fills_channels or joins(payload) for payload in request.all_payloads):
        raise ValueError(
            f"This model reads {expected} channels of encoded images besides the noise, but none are connected: use "
            "WanVideoImageToVideoEncode (for a control model or LoRA, WanVideoControlEmbeds), or load a text-to-video "
            "model."
        )


def check_conditions(request: SampleRequest) -> None:
    """Raises ValueError for prompts or latents that are missing or unfit, and for NaN or infinity anywhere."""
    text, samples = request.text, request.samples or {}
    if text is None or not text.positive:
        raise ValueError(NO_PROMPT)
    request.guidance.check_prompts(request.schedule.places(), negative=bool(text.negative))
    if samples.get("video") is not None:
        raise ValueError(
            "The samples are a video that a sampler made and decoded in windows; of its latents they hold the last "
            "window's alone: connect its frames from WanVideo Decode to WanVideo Encode, and that to samples."
        )
    reads = request.model.config.text_dim
    for prompt in (*text.positive, *text.negative):
        if reads and prompt.shape[-1] != reads:
            raise ValueError(
                f"The text embeds are {prompt.shape[-1]} channels wide, and this model reads {reads}: they are of "
                "another text encoder than umt5-xxl. Choose that one (in ComfyUI's Load CLIP also the type 'wan')."
            )
        check_finite("The text embeds hold", prompt)
    for name in ("samples", "noise_mask", "original_image"):
        if isinstance(samples.get(name), Tensor):
            check_finite(f"The samples of the sampler ({name}) hold", samples[name])
    for _, latents in request.image.given_latents:
        check_finite("The extra latents hold", latents)
    for payload in request.all_payloads:
        for part in fields(payload) if is_dataclass(payload) else ():
            for tensor in _tensors(getattr(payload, part.name)):
                check_finite(f"What is connected as {type(payload).__name__} ({part.name}) holds", tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    """All in it, in tuples and dataclasses of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


@contextmanager
def active_model(request: SampleRequest, size: Sequence[int], passes: int) -> Iterator[WanModel]:
    """The transformer on the compute device, and beside it whatever modules the payloads bring.

    size: of the latents of a forward (frames, height, width); passes: how many share it.
    """
    with ExitStack() as stack:
        for payload in request.all_payloads:
            stack.enter_context(payload.active(swapped=request.model.swapped))
        yield stack.enter_context(request.model.active(request.model.work(size, passes)))


def prepare_start(request: SampleRequest, schedule: Schedule, generator: torch.Generator) -> Start:
    """What the run starts from. The seed's noise is always drawn first; samples may then restore a generator state."""
    shape = noise_shape(request.image, request.model.config)
    noise = start_noise(shape, generator)
    if request.noise is not None:
        noise = request.noise
    elif request.context is not None and request.context.freenoise:
        first, last = request.image.leading_latents, shape[1] - request.image.trailing_latents
        noise[:, first:last] = free_noise(noise[:, first:last], request.context, generator)
    latents = schedule.from_noise(noise)
    samples = request.samples or {}
    if samples.get("generator_state") is not None:
        generator.set_state(samples["generator_state"])
    given = given_samples(samples, shape, request.image.ends)
    hooks: list[LatentHook] = []
    original = None
    if given is not None:
        latents = add_noise(given, noise, schedule.level(0)) if request.noises_samples else given
        if samples.get("noise_mask") is not None:
            original = samples.get("original_image")
            original = given if original is None else original
            change = change_mask(samples["noise_mask"], shape, request.image.ends)
            hooks.append(Inpainting(original, noise, change, schedule))
    frame_times: dict[int, float] = {}
    if request.image.given_latents:
        held = GivenLatents.placed(request.image.given_latents, shape)
        if schedule.first_index == 0:
            latents = held.before(latents, 0)
        if request.model.config.out_dim == CHANNELS_2_2 or schedule.times_frames:
            frame_times = dict.fromkeys(held.frames, 0.0)
        if frame_times or any(payload.holds_given for payload in request.all_payloads):
            hooks.append(held)
    start = Start(latents, noise, tuple(hooks), frame_times, original)
    for modifier in reversed(request.modifiers):
        start = modifier.begin(start, schedule, generator)
    return start


def make_denoiser(
    request: SampleRequest,
    transformer: WanModel,
    *,
    conditions: Conditions,
    remembered: StepMemories | None = None,
) -> Denoiser:
    """The guided model of one run or window, under the scales that the request asks for.

    remembered: what the step cache remembers; None begins anew.
    """
    return Denoiser(
        transformer,
        conditions,
        guidance=request.guidance,
        device=request.model.device,
        dtype=request.model.base_dtype,
        riflex_index=request.riflex_index,
        memories=new_memories(request) if remembered is None else remembered,
    )


def new_memories(request: SampleRequest) -> StepMemories | None:
    """Empty memories of the request's step cache, if it has one."""
    return None if request.cache is None else memories(request.cache, request.model, request.model.device)


def readable_payloads(request: SampleRequest, transformer: WanModel) -> tuple[Payload, ...]:
    """The payloads of a run, without optional ones that the model has no weights for; those are warned about.

    Raises ValueError for others that it has no weights for.
    """
    readable = []
    for payload in request.all_payloads:
        if transformer.reads(payload):
            readable.append(payload)
        elif payload.optional:
            log.warning("%s", payload.needs)
        else:
            raise ValueError(payload.needs)
    return tuple(readable)


def _denoiser(request: SampleRequest, transformer: WanModel, frames: int) -> Denoiser | WindowedDenoiser:
    """Of the whole video, or of context windows where it is longer than one."""
    text = request.text
    conditions = Conditions(
        positive=text.positive[0],
        negative=text.negative[0] if text.negative else None,
        payloads=readable_payloads(request, transformer),
    )
    context, references = request.context, (request.image.leading_latents, request.image.trailing_latents)
    if context is None or not context.apply_to(frames - _references(request)):
        if context is not None:
            log.info("The video is not longer than context_frames, so context_options have no effect.")
        whole = whole_window(frames, *references)
        parts = tuple(part for p in conditions.payloads if (part := p.window(whole)) is not None)
        return make_denoiser(request, transformer, conditions=replace(conditions, payloads=parts))
    context.check_reference(noise_shape(request.image, request.model.config))
    denoiser = WindowedDenoiser(
        conditions,
        options=context,
        texts=text.positive,
        references=references,
        device=request.model.device,
        make=lambda window, remembered: make_denoiser(
            request, transformer, conditions=window, remembered=remembered
        ),
        memories=lambda: new_memories(request),
        model=transformer,
    )
    denoiser.check(frames)
    return denoiser


def whole_window(frames: int, leading: int = 0, trailing: int = 0) -> Window:
    """All of a video of so many latent frames, references included."""
    pixels = (frames - leading - trailing - 1) * VAE_TIME_STRIDE + 1
    return Window(tuple(range(frames)), tuple(range(pixels)), leading, trailing, whole=True, total=frames)


def _references(request: SampleRequest) -> int:
    return request.image.leading_latents + request.image.trailing_latents


def _flags(request: SampleRequest, generator: torch.Generator, original: Tensor | None, frames: int) -> Latent:
    flags: Latent = {
        "generator_state": generator.get_state(),
        "extra_end_frame": request.image.extra_end_frame,
        "has_ref": request.image.leading_latents,
        "trailing_latents": request.image.trailing_latents,
        "looped": request.context is not None and request.context.looped and request.context.apply_to(frames),
    }
    if original is not None:
        flags["original_image"] = original
    return flags


def _latent(latents: Tensor, flags: Latent) -> Latent:
    return {"samples": latents[None].float().cpu(), **flags}
