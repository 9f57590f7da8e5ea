"""Saved graphs of systems, with tiny models and fixed detectors: what a run of each needs, and the videos it makes.

A system joins with `tests/<folder>/graphs.py`, whose CASES are name -> GraphCase. The graphs themselves are not part of
the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import av
from PIL import Image
from saved_models import GRAPHS
from wanvideo_wrapper.demo import INPUT, tiny

TESTS = Path(__file__).resolve().parent


class Files:
    """The folders models/ and input/ below `root`. clip: (file, width) of a CLIP vision encoder that exists."""

    def __init__(self, root, clip=None):
        self.models, self.inputs, self._clip = root / "models", root / "input", clip
        self.diffusion = self.models / "diffusion_models/WanVideo"
        self.clip_dim = clip[1] if clip else tiny.CLIP_DIM
        self.inputs.mkdir(parents=True, exist_ok=True)

    def encoders(self, *, vae_dim=8, text="umt5-xxl-enc-bf16", clip=False):
        """The VAE and the text encoder that nearly all graphs name, and the CLIP vision encoder."""
        tiny.vae(base_dim=vae_dim).save(self.models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
        tiny.text_encoder().save(self.models / f"text_encoders/{text}.safetensors")
        place = self.models / "clip_vision/clip_vision_h.safetensors"
        if clip and self._clip:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(self._clip[0])
        elif clip:
            tiny.clip_vision().save(place)

    def pictures(self, *names):
        """The demo's portrait, under these names."""
        with Image.open(INPUT / "portrait.png") as portrait:
            for name in names:
                (self.inputs / name).parent.mkdir(parents=True, exist_ok=True)
                portrait.convert("RGB").save(self.inputs / name)


@dataclass(frozen=True, kw_only=True)
class GraphCase:
    """A saved graph at a small size.

    fill: saves what the graph names. edits, bypassed, muted: as on the command line. nodes: node classes of other
    packs, and those that stand in for detectors, by class name. modules: stand-ins for packages, by name. videos: the
    frames of each video that it makes, in ascending order; sound: seconds of sound in the one that has any.
    """

    graph: str
    fill: Callable[[Files], None]
    videos: tuple[int, ...]
    edits: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    muted: tuple[str, ...] = ()
    nodes: dict[str, type] = field(default_factory=dict)
    modules: dict[str, Callable[[], ModuleType]] = field(default_factory=dict)
    sound: float = 0.0

    @property
    def path(self):
        return GRAPHS / self.graph


def beside(path, name):
    """A module of a test folder, which is no package."""
    file = Path(path).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_cases():
    files = sorted(TESTS.glob("*/graphs.py"))
    return {name: case for file in files for name, case in beside(file, "graphs").CASES.items()}


def fixed_name(case, node):
    """The class name in a server of the node that a case brings: cases bring others under the same name."""
    return f"{node} of {case}"


def frames_of(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(container.streams.video[0]))


def seconds_of_sound(path):
    """0 for a video without."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return 0.0
        stream = container.streams.audio[0]
        return sum(frame.samples for frame in container.decode(stream)) / stream.rate


def assert_made(case, videos):
    """The videos are those that the case names."""
    frames, sound = tuple(sorted(map(frames_of, videos))), max(map(seconds_of_sound, videos))
    assert frames == case.videos, frames
    assert abs(sound - case.sound) < 0.15, sound
