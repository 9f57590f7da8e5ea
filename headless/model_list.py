"""Which model files a workflow names, where each belongs, whether it is there, and where it is published.

The logic of `wanvideo models WORKFLOW.json`. Nothing is downloaded; sizes are those of the published files, rounded.
Where a file is not known here, the links in the workflow's notes tell: people who share graphs write them down there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from .graph import Prompt
from .published_files import Published, likely_place, published

if TYPE_CHECKING:
    from ..host import Host

ENDINGS = (".safetensors", ".sft", ".gguf", ".onnx")
# Start of the class names of nodes that fetch their files into folders of their own.
FETCHING = "DownloadAndLoad"
# The folder that a loader reads, by the start of its class name; the first that fits.
FOLDERS = (
    ("WanVideoVAELoader", "vae"),
    ("WanVideoFlashVSRDecoderLoader", "vae"),
    ("LoadWanVideoT5TextEncoder", "text_encoders"),
    ("WanVideoTextEncodeCached", "text_encoders"),
    ("CLIPLoader", "text_encoders"),
    ("LoadWanVideoClipTextEncoder", "clip_vision"),
    ("CLIPVisionLoader", "clip_vision"),
    ("Wav2VecModelLoader", "wav2vec2"),
    ("WanVideoLora", "loras"),
    ("WanVideoTinyVAELoader", "vae_approx"),
    ("WanVideoControlnetLoader", "controlnet"),
    ("WanVideoUni3C_ControlnetLoader", "controlnet"),
    ("WhisperModelLoader", "audio_encoders"),
    ("AudioEncoderLoader", "audio_encoders"),
    ("OviMMAudioVAELoader", "vae"),
    ("LoadVQVAE", "vae"),
    ("VAELoader", "vae"),
    ("QwenLoader", "text_encoders"),
    ("WanVideoPromptExtenderSelect", "text_encoders"),
    ("LoadNLFModel", "nlf"),
    ("LoraLoader", "loras"),
    ("OnnxDetectionModelLoader", "detection"),
)
DEFAULT_FOLDER = "diffusion_models"
HUGGING_FACE = re.compile(r"https://huggingface\.co/[\w./-]*[\w/-]")


@dataclass(frozen=True)
class NeededModel:
    """A model file that a workflow names.

    name: as the workflow has it, with '/' between folders. folder: below the models folder. elsewhere: where the same
    file name lies in other subfolders. noted: the link to it in the workflow's notes, "" if they have none.
    """

    name: str
    folder: str
    nodes: tuple[str, ...]
    present: bool
    elsewhere: tuple[str, ...]
    published: Published | None
    noted: str = ""

    def line(self) -> str:
        """What the command prints."""
        target = f"models/{self.folder}/{self.name}"
        if self.present:
            return f"there     {target}"
        if self.elsewhere:
            places = " and ".join(f"models/{self.folder}/{place}" for place in self.elsewhere)
            taken = "which is taken" if len(self.elsewhere) == 1 else "choose one of them"
            return f"moved     {target}: it lies at {places}, {taken}"
        if self.published is None and self.noted:
            return f"MISSING   {target}: {self.noted} (a note of the workflow)"
        if self.published is None:
            return f"MISSING   {target}: for {', '.join(self.nodes)}; {likely_place(self.name)}"
        url = self.published.url(PurePosixPath(self.name).name)
        return f"MISSING   {target}: {self.published.gigabytes:g} GB, {url}"


def needed_models(prompt: Prompt, host: Host) -> list[NeededModel]:
    """The model files that the nodes of a workflow name, in order of nodes, each once."""
    users: dict[tuple[str, str], list[str]] = {}
    for node_type, label, name in _named_files(prompt):
        users.setdefault((_folder(node_type), name), []).append(label)
    links = {PurePosixPath(link).name: link for link in noted_links(prompt)}
    return [_needed(folder, name, tuple(nodes), host, links) for (folder, name), nodes in users.items()]


def noted_links(prompt: Prompt) -> list[str]:
    """The links to Hugging Face in the notes of a workflow, each once."""
    return list(dict.fromkeys(HUGGING_FACE.findall(json.dumps(prompt.workflow))))


def report(prompt: Prompt, needed: list[NeededModel]) -> Iterator[str]:
    """The lines of `wanvideo models`: a file each, and the folders that the notes link to where some are not known."""
    yield from (entry.line() for entry in needed)
    unknown = [entry for entry in needed if not (entry.present or entry.elsewhere or entry.published or entry.noted)]
    folders = [link for link in noted_links(prompt) if not link.lower().endswith(ENDINGS)]
    if unknown and folders:
        yield "The workflow's notes name these places for what is not known here:"
        yield from (f"          {link}" for link in folders)
    if not needed:
        yield "The workflow names no model files."


def _named_files(prompt: Prompt) -> Iterator[tuple[str, str, str]]:
    for node in prompt.nodes.values():
        if node.type.startswith(FETCHING):
            continue
        for value in node.inputs.values():
            if isinstance(value, str) and value.lower().endswith(ENDINGS):
                yield node.type, node.label, value.replace("\\", "/")


def _folder(node_type: str) -> str:
    return next((folder for start, folder in FOLDERS if node_type.startswith(start)), DEFAULT_FOLDER)


def _needed(
    folder: str, name: str, nodes: tuple[str, ...], host: Host, links: Mapping[str, str]
) -> NeededModel:
    gguf = folder == DEFAULT_FOLDER and name.lower().endswith(".gguf")
    names = {entry.replace("\\", "/") for entry in host.list_files("unet_gguf" if gguf else folder)}
    base = PurePosixPath(name).name
    others = sorted(entry for entry in names - {name} if PurePosixPath(entry).name == base)
    return NeededModel(
        name=name,
        folder=folder,
        nodes=nodes,
        present=name in names,
        elsewhere=tuple(others),
        published=published(name),
        noted=links.get(base, ""),
    )
