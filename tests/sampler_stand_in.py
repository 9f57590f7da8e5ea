"""The sampler's surroundings without weights: a model whose velocity is known in closed form, and a host that notes."""

import contextlib
import math
from pathlib import Path

import torch
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.memory import Work
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.shard import ALONE

SHAPE = (16, 3, 4, 6)
MEAN, SPREAD = 0.8, 0.5


class CancelledError(Exception):
    """What the host raises."""


class FakeProgress:
    def __init__(self, log):
        self.log = log

    def __enter__(self):
        self.log.append("open")
        return self

    def __exit__(self, *failure):
        self.log.append("close")

    def update(self, done, *, note="", preview=None):
        self.log.append((done, preview.clone()))


class FakeHost:
    def __init__(self, cancel_at=None, device="cpu"):
        self.log, self.asked, self.cancel_at, self.where = [], 0, cancel_at, device

    def device(self):
        return torch.device(self.where)

    def results_device(self):
        return torch.device("cpu")

    def progress(self, total, label=""):
        self.log.append(total)
        return FakeProgress(self.log)

    def check_cancelled(self):
        self.asked += 1
        if self.asked == self.cancel_at:
            raise CancelledError


class GaussianTransformer:
    """Exact velocity of the flow to N(MEAN, SPREAD**2), whatever the prompt."""

    ranks = ALONE

    def __init__(self, config, extensions=()):
        self.config, self.extensions, self.blocks = config, extensions, ()
        self.calls = []
        self.bad_at = None

    reads, joins, _takers = WanModel.reads, WanModel.joins, WanModel._takers
    ranks = ALONE
    shared_by = WanModel.shared_by

    def named_modules(self):
        return ()

    def __call__(self, inputs, memory=None):
        self.calls.append(inputs)
        x = inputs.latents[:, : self.config.out_dim]
        sigma = inputs.timestep.reshape(inputs.timestep.shape[0], 1, -1, 1, 1) / 1000
        s2 = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        velocity = -MEAN + (sigma - (1 - sigma) * SPREAD**2) / s2 * (x - (1 - sigma) * MEAN)
        return velocity * float("nan") if len(self.calls) - 1 == self.bad_at else velocity


class FakeModel:
    payloads = ()
    elsewhere = None
    swapped = False
    device = torch.device("cpu")

    def __init__(self, transformer=None, loras=()):
        self.transformer = transformer or GaussianTransformer(config())
        self.config, self.base_dtype, self.loras = self.transformer.config, torch.float32, loras
        self.managed, self.events = self, []
        self.path, self.options = Path("wan2.1_t2v.safetensors"), LoadOptions(base_dtype=torch.float32)

    def try_attention(self, latent_size, batch):
        self.tried = (*latent_size, batch)

    def set_step(self, index, *, filled=True):
        self.events.append(index)

    def release(self):
        self.events.append("release")

    def work(self, latent_size, batch):
        self.planned = (*latent_size, batch)
        return Work(math.prod(latent_size) // 4, batch)

    @contextlib.contextmanager
    def active(self, work):
        self.events.append("enter")
        try:
            yield self.transformer
        finally:
            self.events.append("leave")


def config(**changes):
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 8, "text_len": 6}
    return WanConfig(**{**sizes, **changes})


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Steps of distilled models that have no others.
STEPS = {"flowmatch_causvid": 4, "flowmatch_distill": 4, "rcm": 4}


def schedule(name="euler", steps=6, **options):
    steps = STEPS.get(name, steps)
    return make_schedule(ScheduleSpec(**{"name": name, "steps": steps, "shift": 3.0, **options}))


def request(model=None, **changes):
    fields = {
        "model": model or FakeModel(),
        "text": TextEmbeds(positive=(rand(5, 8, seed=1),), negative=(rand(3, 8, seed=2),)),
        "image": ImageEmbeds(latent_shape=SHAPE, num_frames=9),
        "schedule": schedule(),
        "cfg": 1.0,
        "seed": 42,
    }
    return SampleRequest(**{**fields, **changes})


def latents_of(result):
    return result[0]["samples"][0]
