"""Sound and video files (ComfyUI and VideoHelperSuite)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...host import get_host
from ...wanvideo.images import resize_images
from ..media import Encoding, VideoInfo, read_audio, read_frames, write_video
from .pictures import fit, next_file

log = logging.getLogger("wanvideo")

Inputs = dict[str, dict[str, tuple[object, ...]]]
Audio = dict[str, object]

LARGEST = 8192
MANY = 2**53 - 1
WRITTEN_FORMAT = "video/h264-mp4"
# What a model wants: sides divide by the first number, frames are a multiple of the second and the third more.
LOAD_FORMATS = {
    "None": (1, 1, 0),
    "AnimateDiff": (8, 1, 0),
    "Mochi": (16, 6, 1),
    "LTXV": (32, 8, 1),
    "Hunyuan": (16, 4, 1),
    "Cosmos": (16, 8, 1),
    "Wan": (8, 4, 1),
}


class LoadAudio:
    """Sound from the input folder; any file that FFmpeg reads, video included."""

    FUNCTION = "load"
    RETURN_TYPES = ("AUDIO",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"audio": ("STRING", {"audio_upload": True})}}

    def load(self, audio: str) -> tuple[Audio]:
        """AUDIO."""
        return (read_audio(get_host().readable_file(audio)),)


class LoadVideo:
    """Frames of a video from the input folder (VHS_LoadVideo)."""

    FUNCTION = "load_video"
    RETURN_TYPES = ("IMAGE", "INT", "AUDIO", "VHS_VIDEOINFO")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 0, "min": 0, "max": LARGEST}
        count = {"min": 0, "max": MANY, "step": 1}
        return {
            "required": {
                "video": ("STRING", {}),
                "force_rate": ("FLOAT", {"default": 0, "min": 0, "max": 60, "step": 1}),
                "custom_width": ("INT", side),
                "custom_height": ("INT", side),
                "frame_load_cap": ("INT", {"default": 0, **count}),
                "skip_first_frames": ("INT", {"default": 0, **count}),
                "select_every_nth": ("INT", {"default": 1, "min": 1, "max": MANY, "step": 1}),
            },
            "optional": {
                "meta_batch": ("VHS_BatchManager",),
                "vae": ("VAE",),
                "format": (list(LOAD_FORMATS), {"default": "AnimateDiff"}),
            },
        }

    def load_video(
        self,
        video: str,
        force_rate: float,
        custom_width: int,
        custom_height: int,
        frame_load_cap: int,
        skip_first_frames: int,
        select_every_nth: int,
        meta_batch: object = None,
        vae: object = None,
        format: str = "AnimateDiff",
    ) -> tuple[Tensor, int, Audio | None, dict[str, object]]:
        """Frames at the rate and size asked for, their number, their sound, and both rates.

        One side given keeps the proportions; both cut the middle out. Sides and frames are then made to fit `format`.
        """
        if meta_batch is not None or vae is not None:
            raise ValueError("VHS_LoadVideo with meta_batch or vae runs in ComfyUI only; disconnect them.")
        path = get_host().readable_file(video)
        info, frames = read_frames(path)
        rate = force_rate or info.fps
        chosen = _chosen(frames, info.fps, rate, (skip_first_frames, select_every_nth, frame_load_cap))
        step, group, extra = LOAD_FORMATS[format]
        images = [_sized(frame, (custom_width, custom_height), step) for frame in chosen]
        if not images:
            raise ValueError(f"{path.name} has no frames after skipping {skip_first_frames}; skip fewer.")
        batch = torch.cat(images[: (len(images) - extra) // group * group + extra])
        fps = rate / select_every_nth
        sound = _sound_of(path, skip_first_frames / rate, frame_load_cap / fps)
        return batch, len(batch), sound, _details(info, batch, fps)


def _chosen(
    frames: Iterator[np.ndarray], fps: float, rate: float, selection: tuple[int, int, int]
) -> Iterator[np.ndarray]:
    """Frames at `rate`, then without the first ones, then every nth, at most `cap` (0: all)."""
    skip, every, cap = selection
    taken = emitted = 0
    for index, frame in enumerate(frames):
        while taken <= (index + 1e-6) * rate / fps:
            kept = taken >= skip and (taken - skip) % every == 0
            taken += 1
            if kept:
                yield frame
                emitted += 1
                if cap and emitted >= cap:
                    return


def _sized(frame: np.ndarray, goal: tuple[int, int], step: int) -> Tensor:
    """[1, H, W, 3] in 0..1. goal: (width, height), 0 keeps the proportions; sides are rounded to multiples of step."""
    image = torch.from_numpy(frame).float().div(255)[None]
    source = (image.shape[2], image.shape[1])
    ratios = [wanted / side for wanted, side in zip(goal, source, strict=True) if wanted] or [1.0]
    exact = [wanted or side * ratios[0] for wanted, side in zip(goal, source, strict=True)]
    width, height = (max(int(side / step + 0.5), 1) * step for side in exact)
    left, top, wide, high = fit(source, (width, height), "crop", "center").crop
    return resize_images(image[:, top : top + high, left : left + wide], width, height)


def _sound_of(path: Path, start: float, seconds: float) -> Audio | None:
    try:
        sound = read_audio(path, start=start, seconds=seconds)
    except ValueError as error:
        log.info("The frames come without sound: %s", error)
        return None
    return sound if sound["waveform"].numel() else None


def _details(info: VideoInfo, batch: Tensor, fps: float) -> dict[str, object]:
    source = (info.fps, info.frames, info.duration, info.width, info.height)
    loaded = (fps, len(batch), len(batch) / fps, batch.shape[2], batch.shape[1])
    names = ("fps", "frame_count", "duration", "width", "height")
    return {
        f"{kind}_{name}": value
        for kind, values in (("source", source), ("loaded", loaded))
        for name, value in zip(names, values, strict=True)
    }


class VideoCombine:
    """Writes frames and sound as an MP4 with the workflow inside (VHS_VideoCombine)."""

    FUNCTION = "combine_video"
    RETURN_TYPES = ("VHS_FILENAMES",)
    OUTPUT_NODE = True
    ACCEPTS_ALL = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "images": ("IMAGE",),
                "frame_rate": ("FLOAT", {"default": 8, "min": 1, "step": 1}),
                "loop_count": ("INT", {"default": 0, "min": 0, "max": 100, "step": 1}),
                "filename_prefix": ("STRING", {"default": "AnimateDiff"}),
                "format": ("STRING", {"default": WRITTEN_FORMAT}),
                "pingpong": ("BOOLEAN", {"default": False}),
                "save_output": ("BOOLEAN", {"default": True}),
            },
            "optional": {"audio": ("AUDIO",), "meta_batch": ("VHS_BatchManager",), "vae": ("VAE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def combine_video(
        self,
        images: Tensor,
        frame_rate: float,
        loop_count: int,
        filename_prefix: str,
        format: str,
        pingpong: bool,
        save_output: bool,
        audio: Audio | None = None,
        prompt: object = None,
        extra_pnginfo: dict[str, object] | None = None,
        **options: object,
    ) -> dict[str, object]:
        """The path of the file. As VideoHelperSuite does, sound that is longer than the picture is cut off."""
        if format != WRITTEN_FORMAT:
            raise ValueError(f"The format '{format}' is written by ComfyUI only; choose {WRITTEN_FORMAT}.")
        if options.get("meta_batch") is not None or options.get("vae") is not None:
            raise ValueError("VHS_VideoCombine with meta_batch or vae runs in ComfyUI only; disconnect them.")
        if pingpong:
            images = torch.cat((images, images[1:-1].flip(0)))
        if audio is not None and options.get("trim_to_audio"):
            seconds = audio["waveform"].shape[-1] / audio["sample_rate"]
            images = images[: max(round(seconds * frame_rate), 1)]
        if loop_count:
            images = images.repeat(loop_count + 1, 1, 1, 1)
        if audio is not None:
            samples = round(len(images) / frame_rate * audio["sample_rate"])
            audio = {**audio, "waveform": audio["waveform"][..., :samples]}
        host = get_host()
        base = host.output_dir() if save_output else host.temp_dir()
        path = next_file(base, filename_prefix, ".mp4")
        metadata = {}
        if options.get("save_metadata", True):
            saved = {"prompt": prompt, **(extra_pnginfo or {})}
            metadata = {name: json.dumps(value) for name, value in saved.items() if value}
        encoding = Encoding(
            fps=frame_rate,
            crf=int(options.get("crf", 19)),
            pixel_format=str(options.get("pix_fmt", "yuv420p")),
            metadata=metadata,
        )
        write_video(path, images, encoding, audio)
        return {"ui": {"videos": [str(path)]}, "result": ((save_output, [str(path)]),)}


NODE_CLASS_MAPPINGS = {"LoadAudio": LoadAudio, "VHS_LoadVideo": LoadVideo, "VHS_VideoCombine": VideoCombine}
