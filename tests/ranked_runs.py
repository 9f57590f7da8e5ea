"""Whole runs of the sampler for the parity tests: what changes a run around the model, and what changes its weights.

Each is the same on every rank. 2x3 tokens a frame: four ranks have unequal shares.
"""

from dataclasses import replace

import ranked
import torch
from safetensors.torch import save_file
from swap_stand_in import DEVICE, CountedCopies
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.cache_methods.easycache import EasyCache
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.distributed.host import RankHost
from wanvideo_wrapper.distributed.ranks import ProcessRanks
from wanvideo_wrapper.freeinit.iterations import FreeInit
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.video_loop.shift import LatentShift
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

SHAPE, FRAMES, STEPS = (16, 3, 4, 6), 9, 3
HEADS = "4"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(folder):
    """Models that read 16 channels, 32 and 36, with a head for each of four ranks."""
    for channels in (16, 32, 36):
        model = replace(tiny.transformer(in_dim=channels), metadata={"wanvideo.num_heads": HEADS})
        model.save(folder / f"{channels}.safetensors", torch.float32)
    pairs = {}
    for index in range(3):
        for layer, (out, into) in {"self_attn.q": (128, 128), "ffn.0": (256, 128)}.items():
            name = f"diffusion_model.blocks.{index}.{layer}.lora"
            pairs[f"{name}_A.weight"] = rand(4, into, seed=index) * 0.2
            pairs[f"{name}_B.weight"] = rand(out, 4, seed=10 + index) * 0.2
    save_file(pairs, folder / "lora.safetensors")


def video(frames=SHAPE[1], **changes):
    shape = (SHAPE[0], frames, *SHAPE[2:])
    return ImageEmbeds(latent_shape=shape, num_frames=(frames - 1) * 4 + 1, **changes)


def picture():
    mask = torch.zeros(1, 4, *SHAPE[1:])
    mask[:, :, 0] = 1
    return video(payloads=(ImageCondition(rand(1, *SHAPE, seed=3), mask),))


def edited():
    return N["WanVideoAddLucyEditLatents"]().add(video(), {"samples": rand(1, *SHAPE, seed=4)})[0]


def tracked():
    tracks = {"track_path": rand(FRAMES, 2, 2, seed=5).abs() * 10, "track_visibility": torch.ones(FRAMES, 2).bool()}
    return N["WanVideoAddWanMoveTracks"]().add(picture(), tracks=tracks)[0]


def continued():
    anchor, before = ({"samples": rand(1, 16, count, *SHAPE[2:], seed=6 + count)} for count in (1, 3))
    return N["WanVideoSVIProEmbeds"]().add(anchor, FRAMES, before, 1)[0]


def led():
    mask = (rand(FRAMES, 32, 48, seed=8) > 0).float()
    return N["WanVideoAddTTMLatents"]().add(video(), {"samples": rand(1, *SHAPE, seed=7)}, mask, 0, 2)[0]


def noised():
    given = video(given_latents=((0, rand(1, 16, 1, *SHAPE[2:], seed=9)),))
    return N["WanVideoAddPusaNoise"]().add(given, [0.3], -1)[0]


def loras(folder, merge):
    return {"loras": (LoraFile(path=folder / "lora.safetensors", strength=1.0, merge=merge),)}


def swapped(folder):
    return {"block_swap": BlockSwapArgs(blocks_to_swap=3, prefetch_blocks=1)}


# Name -> channels, image embeds, fields of the request, options of the loader.
RUNS = {
    "lora_beside": (16, video, {}, lambda folder: loras(folder, False)),
    "lora_merged": (16, video, {}, lambda folder: loras(folder, True)),
    "block_swap": (16, video, {}, swapped),
    "windows": (16, lambda: video(6), {"context": ContextOptions(size=13, overlap=4, stride=4)}, None),
    # Where the number of passes changes, a rank has another part of the model's work, and a step cache starts anew.
    "step_cache": (16, video, {"cache": EasyCache(threshold=0.3, start_step=1), "cfg": 3.0}, None),
    "freeinit": (16, video, {"modifiers": (FreeInit(iterations=2),)}, None),
    "video_loop": (16, video, {"modifiers": (LatentShift(skip=1),)}, None),
    "pusa": (16, noised, {"schedule": "flowmatch_pusa"}, None),
    # The ranks draw the noise of its solver alike.
    "vibt": (16, video, {"schedule": "vibt_unipc", "samples": {"samples": rand(1, *SHAPE, seed=12)}}, None),
    "time_to_move": (16, led, {}, None),
    "lucy_edit": (32, edited, {}, None),
    "image_to_video": (36, picture, {}, None),
    "wanmove": (36, tracked, {}, None),
    "svi": (36, continued, {}, None),
}


def prepared(folder, name, host):
    """The request of a run."""
    channels, image, fields, options = RUNS[name]
    load = LoadOptions(base_dtype=torch.float32, **({} if options is None else options(folder)))
    model = load_wan_model(folder / f"{channels}.safetensors", load, host, SYSTEMS)
    schedule = ScheduleSpec(name=fields.get("schedule", "euler"), steps=STEPS, shift=3.0)
    return SampleRequest(
        model=model, text=TextEmbeds(positive=(rand(4, tiny.TEXT_DIM, seed=1),), negative=(rand(4, tiny.TEXT_DIM),)),
        image=image(), seed=11, **{"cfg": [3.0, 1.0, 1.0], **fields, "schedule": make_schedule(schedule)},
    )  # fmt: skip


def difference(folder, name):
    """Of a run's latents."""
    host = StandaloneHost(device=str(DEVICE))
    request, copies = prepared(folder, name, host), CountedCopies()
    model = request.model
    model.placement.copies_for = lambda device: copies

    def latents(ranks):
        with model.transformer.shared_by(ranks):
            return sample(request, host)[0]["samples"]

    alone, shared = model.transformer.ranks, latents(ProcessRanks(DEVICE))
    assert (name == "block_swap") == any(what == "wait" for what, _ in copies.log)
    return ranked.difference(shared, lambda: latents(alone))


class Bar:
    """A progress bar that keeps what it is told."""

    def __init__(self, shown):
        self.shown = shown

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, done, *, note="", preview=None):
        self.shown.append((done, note.rsplit(", ", 1)[0], preview))


def progress(folder):
    """What bars show on this rank, and what they show in one process: steps, their labels, previews."""
    # The host of a rank asks its base for a bar where it leads.
    seen, bar = [], StandaloneHost.progress
    for host in (RankHost(device="cpu"), StandaloneHost(device="cpu")):
        shown = []
        StandaloneHost.progress = lambda *_, shown=shown: Bar(shown)
        host.ranks = ProcessRanks(DEVICE)
        sample(prepared(folder, "lora_beside", host), host)
        seen.append(shown)
    StandaloneHost.progress = bar
    return seen
