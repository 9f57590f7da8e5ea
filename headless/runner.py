"""Runs a prompt: only what its outputs need, everything once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..host import CancelledError
from .check import check, is_output
from .frame_folder import FrameFolder, folder_of, is_stand_in
from .graph import Link, Node, Prompt, as_api
from .rescue import has_work, rescue
from .widgets import inputs_of, takes_any_name

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

Outputs = tuple[object, ...]

# What loaders give, which later runs of the same process can take as it is.
LOADED = {
    "CLIP_VISION", "MULTITALKMODEL", "QWENMODEL", "WANTEXTENCODER", "WANVAE", "WANVIDEOCONTROLNET", "WANVIDEOMODEL",
    "WAV2VECMODEL", "WHISPERMODEL",
}  # fmt: skip


class Runner:
    """Executes nodes of `classes` (name -> node class, ComfyUI's V1 form) and keeps their outputs for the run.

    loaded: models of an earlier run (see the property); those that this one does not need are dropped before it starts.
    """

    def __init__(
        self, prompt: Prompt, classes: Mapping[str, type], host: Host, loaded: dict[str, Outputs] | None = None
    ) -> None:
        self._prompt = prompt
        self._classes = classes
        self._host = host
        self._loaded = {} if loaded is None else loaded
        self._signatures: dict[str, str] = {}
        self._results: dict[str, Outputs] = {}
        self._shown: list[dict[str, object]] = []
        self._sampled: set[str] = set()
        self._folders: dict[str, Path] = {}
        self._unsaved: dict[str, object] = {}

    def check(self) -> None:
        """Raise GraphError with all that is wrong with the workflow; nothing runs."""
        check(self._prompt, self._classes, self._host)

    def run(self) -> list[dict[str, object]]:
        """Execute all output nodes; returns what they show (`ui`), in order.

        Everything is checked before the first node runs. Raises GraphError for all that is wrong, and whatever a node
        raises.
        """
        nodes = self._needed(check(self._prompt, self._classes, self._host))
        for node in nodes:
            self._signatures[node.id] = self._signature(node)
        for signature in set(self._loaded) - set(self._signatures.values()):
            del self._loaded[signature]
        self._results.update(self._loaded)
        try:
            for node in nodes:
                self._execute(node)
        except CancelledError as error:
            # Stopped while it decoded or saved: what a sampler finished is hours of work.
            note = rescue(self._unsaved, self._host.output_dir()) if self._unsaved else ""
            if note:
                error.add_note(note)
            raise
        for folder in sorted(set(self._folders.values())):
            log.info("The frames are in %s.", folder)
        return self._shown

    def _needed(self, nodes: list[Node]) -> list[Node]:
        """Those to execute, of all that the outputs need."""
        return nodes

    def _execute(self, node: Node) -> None:
        self._host.check_cancelled()
        signature = self._signatures[node.id]
        if signature in self._results and not is_output(node, self._classes):
            return
        log.info("Running %s.", node.label)
        cls = self._classes[node.type]
        arguments = {name: self._argument(value) for name, value in node.inputs.items()}
        chosen = self._accepted(cls, node, self._with_frames(cls, node, arguments))
        try:
            returned = getattr(cls(), cls.FUNCTION)(**chosen)
        except CancelledError:
            raise
        except Exception as error:
            if is_output(node, self._classes) or self._was_sampled(node):
                note = rescue(chosen, self._host.output_dir())
                if note:
                    error.add_note(note)
            raise
        if isinstance(returned, dict):
            self._shown.append(returned.get("ui", {}))
            returned = returned.get("result", ())
        self._results[signature] = tuple(returned or ())
        # A type may be a list of choices.
        if cls.RETURN_TYPES and all(isinstance(kind, str) and kind in LOADED for kind in cls.RETURN_TYPES):
            self._loaded[signature] = self._results[signature]
        self._note_folder(node)
        self._note_unsaved(node)

    def _note_unsaved(self, node: Node) -> None:
        """Remember the last that came of a sampler, until a node has saved what came of it."""
        cls = self._classes[node.type]
        names = map(str, getattr(cls, "RETURN_NAMES", None) or cls.RETURN_TYPES)
        outputs = dict(zip(names, self._results[self._signatures[node.id]], strict=False))
        if node.id in self._sampled and has_work(outputs):
            self._unsaved = outputs
        elif is_output(node, self._classes) and self._shown and self._is_saved(self._shown[-1]):
            self._unsaved = {}

    def _is_saved(self, shown: Mapping[str, object]) -> bool:
        """Whether a node shows pictures or videos that it wrote, and not to the temporary folder alone."""
        names = (name for kind in ("images", "videos") for name in shown.get(kind, ()))
        return any(not Path(name).is_relative_to(self._host.temp_dir()) for name in names)

    def _was_sampled(self, node: Node) -> bool:
        """Whether a sampler worked for what this node takes: what loaders give can be had again."""
        return any(
            isinstance(value, Link) and self._prompt.nodes[value.node].id in self._sampled
            for value in node.inputs.values()
        )

    def _note_folder(self, node: Node) -> None:
        """Remember where the frames are that this node's black frame stands for."""
        cls = self._classes[node.type]
        if self._was_sampled(node) or samples(cls):
            self._sampled.add(node.id)
        makers = [value.node for value in node.inputs.values() if isinstance(value, Link)]
        outputs = self._results[self._signatures[node.id]]
        found = [folder for folder in map(folder_of, outputs) if folder]
        if not found and any(is_stand_in(value) for value in outputs):
            found = [self._folders[maker] for maker in makers if maker in self._folders]
        if found:
            self._folders[node.id] = found[0]

    def _with_frames(self, cls: type, node: Node, arguments: dict[str, object]) -> dict[str, object]:
        """The frames of a folder in the place of the black one, for nodes that write them as they come."""
        for name, value in node.inputs.items():
            if not isinstance(value, Link) or value.node not in self._folders or not is_stand_in(arguments[name]):
                continue
            folder = self._folders[value.node]
            if name in getattr(cls, "TAKES_FOLDERS", ()):
                arguments = {**arguments, name: FrameFolder(folder)}
            else:
                log.warning("%s gets one black frame as '%s': the frames are in %s.", node.label, name, folder)
        return arguments

    def _argument(self, value: object) -> object:
        if not isinstance(value, Link):
            return value
        return self._results[self._signatures[value.node]][value.slot]

    def _accepted(self, cls: type, node: Node, arguments: dict[str, object]) -> dict[str, object]:
        declared = {entry.name for entry in inputs_of(cls)}
        takes_all = getattr(cls, "ACCEPTS_ALL", False)
        if takes_any_name(cls):
            # As ComfyUI does: a socket may have had another name when the graph was saved.
            declared |= {name for name, value in node.inputs.items() if isinstance(value, Link)}
        # A saved input named "self" would take the method's own.
        chosen = {n: v for n, v in arguments.items() if n in declared or (takes_all and n != "self")}
        hidden = {
            "UNIQUE_ID": lambda: node.id,
            "PROMPT": lambda: as_api(self._prompt),
            "EXTRA_PNGINFO": lambda: {"workflow": self._prompt.workflow} if self._prompt.workflow else {},
        }
        for name, kind in cls.INPUT_TYPES().get("hidden", {}).items():
            if kind in hidden:
                chosen[name] = hidden[kind]()
        return chosen

    def _signature(self, node: Node) -> str:
        """Equal for two nodes that must give the same result."""
        inputs = {
            name: ["link", self._signatures[value.node], value.slot] if isinstance(value, Link) else ["value", value]
            for name, value in sorted(node.inputs.items())
        }
        text = json.dumps([node.type, inputs], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


def samples(cls: type) -> bool:
    """Whether the node class makes latents with a transformer."""
    kinds = {entry.kind for entry in inputs_of(cls) if isinstance(entry.kind, str)}
    return "LATENT" in cls.RETURN_TYPES and "WANVIDEOMODEL" in kinds


def decodes_tiles(cls: type, inputs: Mapping[str, object]) -> bool:
    """Whether the node decodes by tiles, or may, if another node says so: ranks share them."""
    kinds = {entry.kind for entry in inputs_of(cls) if isinstance(entry.kind, str)}
    return "IMAGE" in cls.RETURN_TYPES and "WANVAE" in kinds and bool(inputs.get("enable_vae_tiling"))
