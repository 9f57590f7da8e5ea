"""What a failed node was to work on, saved to a folder, and what to do with it."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
import wave
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ..wanvideo.footage import write_frame
from ..wanvideo.safetensors_file import write_tensors
from .frame_folder import FrameFolder, folder_of
from .video_file import Video, to_pixels

FRAMES_A_SECOND = 25.0


def rescue(arguments: Mapping[str, object], output: Path) -> str:
    """Save frames, sound and latents among a node's arguments below `output`; returns what to tell the user.

    Another folder is taken where nothing can be written to that one. "" if there is nothing to save.
    """
    for value in list(arguments.values()):
        if isinstance(value, Video):
            arguments = {**arguments, "images": value.images, "fps": value.fps, "audio": value.audio}
    folders = [value.folder for value in arguments.values() if isinstance(value, FrameFolder)]
    folders += [folder_of(value) for value in arguments.values() if folder_of(value)]
    if folders:
        return f"The frames are safe in {folders[0]}. {_way_on(folders[0], arguments, None)}"
    if not has_work(arguments):
        return ""
    reasons = []
    for base in (output, Path(tempfile.gettempdir()), Path.home()):
        try:
            return _saved(_new_folder(base), arguments)
        except OSError as error:
            reasons.append(f"{base}: {error.strerror or error}")
    return f"The frames before it could not be saved either ({'; '.join(reasons)})."


def has_work(values: Mapping[str, object]) -> bool:
    """Whether frames or latents are among the values."""
    return any(_is_frames(value) or _is_latent(value) or isinstance(value, Video) for value in values.values())


def _new_folder(base: Path) -> Path:
    stamp = time.strftime("%Y%m%d_%H%M%S")
    base.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = base / (f"rescued_{stamp}" if number == 1 else f"rescued_{stamp}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _saved(folder: Path, arguments: Mapping[str, object]) -> str:
    """Everything into the folder, which vanishes again if there is no room for all of it."""
    texts, sound, frames = [], None, False
    try:
        for name, value in arguments.items():
            if (_is_frames(value) or _is_looped(value)) and not frames:
                frames = True
                written = _write_frames(folder, value)
                texts.append(f"The {written} frames before it are safe in {folder} (frame_00000.png, ...).")
            elif _is_latent(value) and not _is_looped(value):
                path = folder / f"{name}.latent"
                _save_latent(path, value["samples"])
                texts.append(f"The latents before it are safe in {path}: load them with LoadLatent.")
            elif _is_sound(value):
                sound = folder / f"{name}.wav"
                _save_sound(sound, value)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if frames:
        texts.append(_way_on(folder, arguments, sound))
    return " ".join(texts)


def _write_frames(folder: Path, value: Tensor | Mapping[str, Tensor]) -> int:
    """Write them one by one, since a copy of all may not fit; returns how many."""
    video = value if isinstance(value, Tensor) else value["video"]
    for index, image in enumerate(video):
        shown = image if video is value else (image + 1) / 2
        write_frame(folder, index, torch.from_numpy(to_pixels(shown[..., :3])))
    return len(video)


def _way_on(folder: Path, arguments: Mapping[str, object], sound: Path | None) -> str:
    rate = arguments.get("frame_rate", arguments.get("fps", FRAMES_A_SECOND))
    heard = f" --audio {shlex.quote(str(sound))}" if sound else ""
    return f"To make a video of them: wanvideo assemble {shlex.quote(str(folder))} --fps {rate:g}{heard}"


def _is_frames(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[-1] in (3, 4) and value.shape[0] > 0


def _is_looped(value: object) -> bool:
    """The LATENT of a loop of windows: its samples are the last window's, its frames the whole video's."""
    return isinstance(value, Mapping) and isinstance(value.get("video"), Tensor) and not value.get("output_path")


def _is_latent(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("samples"), Tensor) and value["samples"].numel() > 0


def _is_sound(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("waveform"), Tensor) and value["waveform"].numel() > 0


def _save_latent(path: Path, samples: Tensor) -> None:
    # The second, empty tensor tells ComfyUI's LoadLatent that no factor is to be taken out.
    write_tensors(path, {"latent_tensor": samples, "latent_format_version_0": torch.empty(0)})


def _save_sound(path: Path, audio: Mapping[str, object]) -> None:
    waveform, rate = audio["waveform"][0], int(audio["sample_rate"])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(waveform.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        for start in range(0, waveform.shape[1], rate):
            part = waveform[:, start : start + rate].float().nan_to_num(0.0).clamp(-1, 1)
            file.writeframes((part.t() * 32767).round().to(torch.int16).contiguous().cpu().numpy().tobytes())
