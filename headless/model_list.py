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
class Published:
    """A file, or a series of files, on Hugging Face.

    pattern: matches the whole file name, in any case. path: inside the repository; "{}" is the name. gigabytes: of one
    file, 10^9 bytes.
    """

    pattern: str
    repository: str
    path: str
    gigabytes: float

    def url(self, name: str) -> str:
        """Where the file of this name can be looked at."""
        return f"https://huggingface.co/{self.repository}/blob/main/{self.path.format(name)}"


KIJAI, SCALED, GGUF = "Kijai/WanVideo_comfy", "Kijai/WanVideo_comfy_fp8_scaled", "Kijai/WanVideo_comfy_GGUF"
WAN21, WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
PUBLISHED = (
    Published(r"wan2\.1_t2v_1\.3B_(fp16|bf16)\.safetensors", WAN21, "split_files/diffusion_models/{}", 2.8),
    Published(r"wan2\.2_ti2v_5B_fp16\.safetensors", WAN22, "split_files/diffusion_models/{}", 10.0),
    Published(r"Wan2_1-T2V-14B_fp8_e4m3fn\.safetensors", KIJAI, "{}", 14.9),
    Published(r"Wan2_1-T2V-14B_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "T2V/{}", 14.9),
    Published(r"Wan2_1-I2V-14B-(480P|720P)_fp8_e4m3fn\.safetensors", KIJAI, "{}", 17.0),
    Published(r"Wan2_1-I2V-14B-(480p|720p)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "I2V/{}", 17.0),
    Published(r"Wan2_2-I2V-A14B-(HIGH|LOW)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "I2V/{}", 15.0),
    Published(r"wan2\.1-i2v-14b-480p-Q8_0\.gguf", "city96/Wan2.1-I2V-14B-480P-gguf", "{}", 18.0),
    Published(r"Wan2_1-InfiniteTalk_(Single|Multi)_Q8\.gguf", GGUF, "InfiniteTalk/{}", 2.7),
    Published(
        r"Wan2_1-InfiniteTalk-(Single|Multi)_fp8_(e4m3fn|e5m2)_scaled_KJ\.safetensors", SCALED, "InfiniteTalk/{}", 2.8
    ),
    Published(r"Wan2_1-VACE_module_14B_fp8_e4m3fn\.safetensors", KIJAI, "{}", 3.1),
    Published(r"Wan21-SkyReelsV3-A2V_fp8_scaled_mixed\.safetensors", SCALED, "SkyReelsV3/{}", 19.0),
    Published(r"Wan2_1_VAE_bf16\.safetensors", KIJAI, "{}", 0.25),
    Published(r"Wan2_2_VAE_bf16\.safetensors", KIJAI, "{}", 1.4),
    Published(r"umt5-xxl-enc-bf16\.safetensors", KIJAI, "{}", 11.4),
    Published(r"umt5-xxl-enc-fp8_e4m3fn\.safetensors", KIJAI, "{}", 6.7),
    Published(r"umt5_xxl_fp16\.safetensors", WAN21, "split_files/text_encoders/{}", 11.4),
    Published(r"umt5_xxl_fp8_e4m3fn_scaled\.safetensors", WAN21, "split_files/text_encoders/{}", 6.7),
    Published(r"clip_vision_h\.safetensors", WAN21, "split_files/clip_vision/{}", 1.3),
    Published(r"open-clip-xlm-roberta-large-vit-huge-14_visual_fp16\.safetensors", KIJAI, "{}", 1.3),
    Published(r"wav2vec2-chinese-base_fp16\.safetensors", "Kijai/wav2vec2_safetensors", "{}", 0.19),
    Published(r"lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16\.safetensors", KIJAI, "Lightx2v/{}", 0.74),
    # Saved graphs write the name with a last '_' that the published file does not have.
    Published(
        r"lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16_?\.safetensors",
        KIJAI,
        "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors",
        0.63,
    ),
    Published(r"MelBandRoformer_fp16\.safetensors", "Kijai/MelBandRoFormer_comfy", "{}", 0.46),
    # The size of the float32 checkpoint that both were made of (KimberleyJSN/melbandroformer, 913 MB).
    Published(r"MelBandRoformer_fp32\.safetensors", "Kijai/MelBandRoFormer_comfy", "{}", 0.91),
)

# Where files with such names, in any case, are published, for those that PUBLISHED does not have.
PLACES = (
    (r"longcat.*\.safetensors", "Kijai/LongCat-Video_comfy"),
    (r"wan2[_.]?[12].*fp8.*scaled.*\.safetensors", SCALED),
    (r"(wan2_?[12][_-]|wananimate|lightx2v_|lynx_|mmaudio_|mtv_crafter_).*\.safetensors", KIJAI),
)


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
            return f"MISSING   {target}: for {', '.join(self.nodes)}; {_likely_place(self.name)}"
        url = self.published.url(PurePosixPath(self.name).name)
        return f"MISSING   {target}: {self.published.gigabytes:g} GB, {url}"


def published(name: str) -> Published | None:
    """What is known of a file by its name, in whatever subfolder; None if nothing."""
    base = PurePosixPath(name.replace("\\", "/")).name
    return next((row for row in PUBLISHED if re.fullmatch(row.pattern, base, re.IGNORECASE)), None)


def _likely_place(name: str) -> str:
    """What can be said of a file whose own link is not known."""
    base = PurePosixPath(name).name
    repository = next((place for pattern, place in PLACES if re.fullmatch(pattern, base, re.IGNORECASE)), None)
    if repository is None:
        return "where it is published is not known here"
    return f"its link is not known here; files with such names are in https://huggingface.co/{repository}/tree/main"


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
