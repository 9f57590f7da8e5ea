"""What a workflow takes of a GPU, said before it runs: `wanvideo plan WORKFLOW.json [--vram 12]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..node_tools import DTYPES
from ..registry import SYSTEMS
from ..wanvideo.file_memory import beside, config_and_footprint
from ..wanvideo.frames import latent_frames
from ..wanvideo.load_plan import LoadOptions, ModuleFile, contents
from ..wanvideo.memory import NOTHING_BESIDE, Beside, Footprint, Work, gigabytes
from .graph import Link, Node, Prompt
from .model_list import ENDINGS, needed_models
from .planned_sizes import widget_of_size
from .published_headers import is_known, open_or_make
from .widgets import CASTS, checked, inputs_of

if TYPE_CHECKING:
    from ..host import Host

LOADER = "WanVideoModelLoader"
IMAGE_EMBEDS = "WANVIDIMAGE_EMBEDS"
# What a process of CUDA takes before the first tensor, and what a desktop shows.
CONTEXT = 0.6 * 2**30
# Sockets whose nodes only find a file that belongs to the transformer.
MODULES = ("VACEPATH", "FANTASYTALKINGMODEL", "MULTITALKMODEL", "FANTASYPORTRAITMODEL")
# What nodes hand on that load a model of a system's own, which runs beside the transformer.
OWN_MODEL = "WANVIDEOCONTROLNET"
PLAIN = {*CASTS, "*"}
FRAMES = ("num_frames", "frame_window_size", "length")


@dataclass(frozen=True, kw_only=True)
class Video:
    """Pixel sizes of what a forward sees, and where that is known from. frames: at most those of a context window."""

    width: int
    height: int
    frames: int
    source: str

    def work(self, side: int, batch: int) -> Work:
        """A forward of it with tokens of so many pixels a side."""
        return Work(latent_frames(self.frames) * (self.height // side) * (self.width // side), batch)

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height} ({self.source})"


UNKNOWN = Video(width=1280, height=720, frames=81, source="assumed: the workflow's size comes from its inputs")


class Reader:
    """Values of a prompt that can be told without running it: widgets, and what arithmetic nodes make of them."""

    def __init__(self, prompt: Prompt, classes: Mapping[str, type]) -> None:
        self.prompt = prompt
        self.classes = classes

    def value(self, node: Node, name: str) -> object | None:
        """The value of an input; None where it is not known before the run, or not connected.

        Raises ValueError for a number, text or switch that is none.
        """
        declared = {entry.name: entry for entry in inputs_of(self.classes[node.type], node.inputs)}
        value = node.inputs.get(name)
        if isinstance(value, Link):
            return self._made(value)
        if value is None and name in declared and declared[name].is_widget:
            return declared[name].default
        entry = declared.get(name)
        plain = value is not None and entry is not None and entry.kind in ("INT", "FLOAT", "BOOLEAN")
        return checked(entry, value, node.label, limits=False) if plain else value

    def known(self, node: Node, name: str) -> object:
        """The value of an input that a plan needs. Raises ValueError where it is not known before the run."""
        value = self.value(node, name)
        if value is None:
            raise ValueError(
                f"{node.label}: '{name}' comes from another node, which tells it only as it runs: choose it in this "
                "node for the plan."
            )
        return value

    def choice(self, node: Node, name: str) -> str:
        """The option of a list, by the name that it has today. Raises ValueError for one that is none, or not known."""
        (entry,) = (entry for entry in inputs_of(self.classes[node.type]) if entry.name == name)
        return str(checked(entry, self.known(node, name), node.label))

    def maker(self, node: Node, name: str) -> Node | None:
        """The node behind a socket, if this pack knows it."""
        link = node.inputs.get(name)
        maker = self.prompt.nodes.get(link.node) if isinstance(link, Link) else None
        return maker if maker is not None and maker.type in self.classes else None

    def takers(self, maker: Node) -> Iterator[Node]:
        """The nodes of this pack that take something of a node's."""
        for node in self.prompt.nodes.values():
            links = (value for value in node.inputs.values() if isinstance(value, Link))
            if node.type in self.classes and any(link.node == maker.id for link in links):
                yield node

    def _made(self, link: Link) -> object | None:
        node = self.prompt.nodes.get(link.node)
        cls = None if node is None else self.classes.get(node.type)
        entries = [] if cls is None else inputs_of(cls, node.inputs)
        if cls is None or getattr(cls, "OUTPUT_NODE", False):
            return None
        if sized := widget_of_size(node, link.slot, self.maker):
            # 0 keeps the proportions of a picture that is not known.
            return self.value(*sized) or None
        # Only what numbers and texts go in and come out of: nothing is loaded, read or written.
        if not {cls.RETURN_TYPES[link.slot]} <= PLAIN:
            return None
        if not all(isinstance(entry.kind, str) and set(entry.kind.split(",")) <= PLAIN for entry in entries):
            return None
        arguments = {entry.name: self.value(node, entry.name) for entry in entries}
        if any(value is None for value in arguments.values()):
            return None
        return getattr(cls(), cls.FUNCTION)(**arguments)[link.slot]


def video_of(reader: Reader) -> Video:
    """The largest video that the nodes of a workflow make embeds for."""
    videos = [video for node in reader.prompt.nodes.values() if (video := _video(reader, node)) is not None]
    if not videos:
        return UNKNOWN
    largest = max(videos, key=lambda video: video.width * video.height * video.frames)
    windows = (node for node in reader.prompt.nodes.values() if node.type == "WanVideoContextOptions")
    limits = [int(limit) for node in windows if (limit := reader.value(node, "context_frames"))]
    frames = min([largest.frames, *limits])
    return Video(width=largest.width, height=largest.height, frames=frames, source=largest.source)


def _video(reader: Reader, node: Node) -> Video | None:
    cls = reader.classes.get(node.type)
    if cls is None or IMAGE_EMBEDS not in cls.RETURN_TYPES:
        return None
    names = {entry.name for entry in inputs_of(cls)}
    frames = next((name for name in FRAMES if name in names), None)
    if frames is None or not {"width", "height"} <= names:
        return None
    width, height, count = (reader.value(node, name) for name in ("width", "height", frames))
    if not width or not height or not count:
        return None
    return Video(width=int(width), height=int(height), frames=int(count), source=node.label)


def head_counts(
    nodes: list[Node], prompt: Prompt, classes: Mapping[str, type], host: Host
) -> Iterator[tuple[str, int]]:
    """The file of each transformer that these nodes load, and its attention heads. Raises ValueError for others."""
    reader = Reader(prompt, classes)
    for node in nodes:
        if node.type == LOADER and (name := reader.value(node, "model")) is not None:
            config = contents(_path(host, str(name)), LoadOptions(base_dtype=torch.float32), SYSTEMS).config
            yield str(name), config.num_heads


def plan(prompt: Prompt, classes: Mapping[str, type], host: Host, *, vram: float | None = None) -> list[str]:
    """Lines that say what each transformer of the workflow takes, and with `vram` (GiB) what to swap.

    Published files need not be there, under a `PlanningHost`. Raises FileNotFoundError, naming all of them, where files
    that are not there leave no transformer to plan, ValueError for files that do not fit together, options that are
    none or not known before the run, or a workflow without a transformer.
    """
    reader = Reader(prompt, classes)
    loaders = [node for node in prompt.nodes.values() if node.type == LOADER]
    if not loaders:
        raise ValueError(f"The workflow has no {LOADER}, so that there is nothing to plan.")
    video, others = video_of(reader), dict(_models_beside(reader, host))
    taken = reduce(Beside.plus, (found for found in others.values() if found is not None), NOTHING_BESIDE)
    lines, planned = [f"Video      {video}"], 0
    for node in loaders:
        path, modules = _path(host, str(reader.known(node, "model"))), tuple(_module_paths(reader, node, host))
        unknown = [file for file in (path, *modules) if not is_known(file)]
        files = path, _options(reader, node, modules)
        lines += [_unplanned(path, unknown)] if unknown else _lines(reader, node, files, video, taken, vram)
        planned += not unknown
    if not planned:
        raise FileNotFoundError(_all_missing(prompt, host))
    lines += [_beside_line(name, found) for name, found in others.items()]
    return [*lines, *_others(prompt, host, frozenset(others)), *_missing(prompt, host)]


def _models_beside(reader: Reader, host: Host) -> Iterator[tuple[str, Beside | None]]:
    """Files of the models beside the transformer, and what these take; None where that is not known.

    The node that takes one says by `offload` whether it waits; otherwise it waits where blocks of the transformer do.
    """
    for node in reader.prompt.nodes.values():
        cls = reader.classes.get(node.type)
        if cls is None or OWN_MODEL not in cls.RETURN_TYPES:
            continue
        name = str(reader.known(node, "model")).replace("\\", "/")
        path = host.find_file("controlnet", name)
        values = [value for taker in reader.takers(node) if (value := reader.value(taker, "offload")) is not None]
        found = beside(path, _own_options(reader, node), SYSTEMS) if path.is_file() else None
        if found is not None and values:
            there = found.swapped if all(values) else found.resident
            found = Beside(there, there)
        yield name, found


def _own_options(reader: Reader, node: Node) -> LoadOptions:
    quantization = reader.choice(node, "quantization").removesuffix("_no_ffn")
    return LoadOptions(base_dtype=DTYPES[reader.choice(node, "base_precision")], quantization=quantization)


def _beside_line(name: str, found: Beside | None) -> str:
    if found is None:
        return f"Beside     {name}: not counted, as its sizes are not known before the file is there"
    one, other = gigabytes(found.resident), gigabytes(found.swapped)
    where = f"{one} of it on the GPU" if one == other else f"{one} on the GPU, {other} where blocks are swapped"
    return f"Beside     {name}: {where}, counted above"


def _unplanned(path: Path, unknown: list[Path]) -> str:
    names = " and ".join(file.name for file in unknown if file != path)
    what = f"the sizes of {names} are" if names else "its sizes are"
    return f"Model      {path.name}: not planned, as {what} not known before the file is there"


def _missing(prompt: Prompt, host: Host) -> Iterator[str]:
    missing = [entry for entry in needed_models(prompt, host) if not (entry.present or entry.elsewhere)]
    if missing:
        yield f"Missing    {len(missing)} files in all: `wanvideo models` lists them with their links"


def _all_missing(prompt: Prompt, host: Host) -> str:
    lines = [entry.line() for entry in needed_models(prompt, host) if not (entry.present or entry.elsewhere)]
    return "\n".join((
        "The sizes of the transformer are not known before its files are there. All that is missing:",
        *(f"- {line.removeprefix('MISSING').strip()}" for line in lines),
    ))  # fmt: skip


def _lines(
    reader: Reader, node: Node, files: tuple[Path, LoadOptions], video: Video, taken: Beside, vram: float | None
) -> Iterator[str]:
    """taken: by models that run beside this one."""
    path, options = files
    batched = any(reader.value(n, "batched_cfg") for n in reader.prompt.nodes.values() if "batched_cfg" in n.inputs)
    config, _ = config_and_footprint(path, options, SYSTEMS, Work(1), reader=open_or_make)
    work = video.work(config.token_side, 2 if batched else 1)
    _, footprint = config_and_footprint(path, options, SYSTEMS, work, reader=open_or_make)
    footprint = replace(footprint, beside=taken)
    count = len(footprint.blocks)
    total = footprint.outside + sum(footprint.blocks)
    yield f"Model      {path.name}: {gigabytes(total)} of weights, {gigabytes(sum(footprint.blocks))} in {count} blocks"
    absent = [file.name for file in (path, *(module.path for module in options.modules)) if not file.is_file()]
    if absent:
        yield f"           (not there yet, from the published sizes: {', '.join(absent)})"
    yield (
        f"           activations of {work.tokens * work.batch} tokens: {gigabytes(footprint.all_at_once)}, in pieces "
        f"{gigabytes(footprint.in_pieces)}"
    )
    yield f"           peak: {gigabytes(footprint.peak(0))}; all blocks swapped {gigabytes(footprint.peak(count))}"
    swap = reader.maker(node, "block_swap_args")
    waiting = None if swap is None else reader.value(swap, "blocks_to_swap")
    if isinstance(waiting, int) and waiting > 0:
        waiting = min(waiting, count)
        yield f"           as saved, {waiting} blocks swapped: {gigabytes(footprint.peak(waiting))}"
    if vram is not None:
        yield f"           {advice(footprint, vram)}"


def advice(footprint: Footprint, vram: float) -> str:
    """What to swap on a GPU of so many GiB."""
    room = int(vram * 2**30 - CONTEXT)
    least = footprint.least_waiting(room)
    if least is None:
        most = gigabytes(footprint.peak(len(footprint.blocks)) + CONTEXT)
        return f"{vram:g} GiB are not enough: all blocks swapped, it takes {most}; make the video smaller or shorter"
    if least == 0:
        return f"{vram:g} GiB are enough without block swap"
    peak = gigabytes(footprint.peak(least))
    return f"with {vram:g} GiB: WanVideoBlockSwap, blocks_to_swap {least} (or -1), peak {peak}"


def _options(reader: Reader, node: Node, modules: Sequence[Path]) -> LoadOptions:
    return LoadOptions(
        base_dtype=DTYPES[reader.choice(node, "base_precision")],
        quantization=reader.choice(node, "quantization"),
        attention_mode=reader.choice(node, "attention_mode"),
        modules=tuple(map(ModuleFile, modules)),
    )


def _module_paths(reader: Reader, node: Node, host: Host) -> Iterator[Path]:
    """The files that the nodes at its sockets name, and those behind them. The nodes do not run: some read the file."""
    for socket in node.inputs:
        maker = reader.maker(node, socket)
        if maker is None or not reader.classes[maker.type].RETURN_TYPES[node.inputs[socket].slot].endswith(MODULES):
            continue
        for name in (reader.value(maker, entry) for entry in maker.inputs):
            if isinstance(name, str) and name.lower().endswith(ENDINGS):
                yield _path(host, name)
        yield from _module_paths(reader, maker, host)


def _path(host: Host, name: str) -> Path:
    kind = "unet_gguf" if name.lower().endswith(".gguf") else "diffusion_models"
    return host.find_file(kind, name)


def _others(prompt: Prompt, host: Host, counted: frozenset[str]) -> Iterator[str]:
    """Encoders and VAE, which are on the GPU before or after the transformer."""
    for needed in needed_models(prompt, host):
        if needed.folder in ("diffusion_models", "loras") or needed.name in counted:
            continue
        if needed.present:
            size = host.find_file(needed.folder, needed.name).stat().st_size
            yield f"Also       {needed.name}: {gigabytes(size)} (its file), not at the same time"
        elif needed.published is not None and not needed.elsewhere:
            size = gigabytes(needed.published.gigabytes * 1e9)
            yield f"Also       {needed.name}: {size} (published, not there yet), not at the same time"
