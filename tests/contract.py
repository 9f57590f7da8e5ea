"""What the contract tests run every system on: cases that the systems' own test folders bring, and a tiny model.

A system joins with `tests/<folder>/cases.py`, whose CASES are name -> Case.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from wanvideo_wrapper import registry
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.loading import FULL_PRECISION
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

TESTS = Path(__file__).resolve().parent
SIZES = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=3, text_dim=8, text_len=4)
FRAMES, HEIGHT, WIDTH = 3, 4, 4


@dataclass(frozen=True)
class Case:
    """One extension at work on latents [B, 16, 3, 4, 4].

    payload: for those latents. absent: a payload of strength 0, bit-identical to none; None where there is no such.
    changed: the payload of step i, where its strength can change; joins: channels that the payload joins; sizes: of the
    model, where they differ from SIZES. video: the payload of a whole video, of which `payload` is a window. leading:
    how many of the latents are references in front.
    """

    extension: object
    payload: object
    absent: object | None = None
    changed: Callable[[int], object] | None = None
    joins: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    video: object | None = None
    leading: int = 0

    def at_step(self, step):
        return self.payload if self.changed is None else self.changed(step)

    @property
    def config(self):
        return WanConfig(**{**SIZES, "in_dim": 16 + self.joins, **dict(self.sizes)})


def cases_of(folder):
    path = TESTS / folder / "cases.py"
    spec = importlib.util.spec_from_file_location(f"cases_of_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def with_extension():
    """Folders of the registry that have an extension."""
    return [folder for folder in registry.FOLDERS if (TESTS.parent / folder / "extension.py").is_file()]


ALL_CASES = {name: case for folder in with_extension() for name, case in cases_of(folder).items()}


def randomize(model, seed=11):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval().requires_grad_(False)


def build(*extensions, config=None):
    """A plain model, and one with the extensions that has the plain one's weights where it has them."""
    config = config or WanConfig(**SIZES)
    base, model = randomize(WanModel(config)), randomize(WanModel(config, extensions), seed=12)
    own = {k: v.shape for k, v in model.state_dict().items()}
    fits = {k: v for k, v in base.state_dict().items() if own.get(k) == v.shape}
    model.load_state_dict(fits, strict=False)
    return base, model


def in_bfloat16(model):
    for name, parameter in model.named_parameters():
        if not any(part in name for part in FULL_PRECISION):
            parameter.data = parameter.data.bfloat16()
    return model


def inputs(*payloads, step=0, seed=5, channels=16, batch=1, **more):
    generator = torch.Generator().manual_seed(seed)
    text = tuple(torch.randn(4, 8, generator=generator) for _ in range(batch))
    return ModelInputs(
        latents=torch.randn(batch, channels, FRAMES, HEIGHT, WIDTH, generator=generator),
        timestep=torch.tensor([500.0 - step] * batch), text=text, payloads=payloads, step=Step(index=step, total=8),
        **more,
    )  # fmt: skip


def placed(given, device):
    """The inputs on a device; payloads stay as they are."""
    device = torch.device(device)
    text = tuple(prompt.to(device) for prompt in given.text)
    return replace(given, latents=given.latents.to(device), timestep=given.timestep.to(device), text=text)
