"""Sound and video files (ComfyUI and VideoHelperSuite)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...host import get_host
from ...wanvideo.images import resize_images
from ...wanvideo.payloads import round_frames
from ..media import Encoding, VideoInfo, read_audio, read_frames, write_video
from .pictures import next_file

Inputs = dict[str, dict[str, tuple[object, ...]]]
Audio = dict[str, object]

LARGEST = 8192
MANY = 2**53 - 1
WRITTEN_FORMAT = "video/h264-mp4"


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
                "video": ("STRING", {"video_upload": True}),
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
                "format": ("STRING", {"default": "AnimateDiff"}),
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
        """Frames at the rate and size asked for, their number, the sound, and both rates."""
        if meta_batch is not None or vae is not None:
            raise ValueError("VHS_LoadVideo with meta_batch or vae runs in ComfyUI only; disconnect them.")
        path = get_host().readable_file(video)
        info, frames = read_frames(path)
        rate = force_rate or info.fps
        chosen = _chosen(frames, info.fps, rate, (skip_first_frames, select_every_nth, frame_load_cap))
        images = [_sized(frame, custom_width, custom_height) for frame in chosen]
        if not images:
            raise ValueError(f"{path.name} has no frames after skipping {skip_first_frames}; skip fewer.")
        if format == "Wan":
            images = images[: round_frames(len(images))]
        batch = torch.cat(images)
        return batch, len(batch), _sound_of(path), _details(info, batch, rate / select_every_nth)


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


def _sized(frame: np.ndarray, width: int, height: int) -> Tensor:
    image = torch.from_numpy(frame).float().div(255)[None]
    if not width and not height:
        return image
    ratio = image.shape[2] / image.shape[1]
    return resize_images(image, width or round(height * ratio), height or round(width / ratio))


def _sound_of(path: object) -> Audio | None:
    try:
        return read_audio(path)
    except ValueError:
        # A silent video is a video all the same.
        return None


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
        """The path of the file."""
        if format != WRITTEN_FORMAT:
            raise ValueError(f"The format '{format}' is written by ComfyUI only; choose {WRITTEN_FORMAT}.")
        if options.get("meta_batch") is not None or options.get("vae") is not None:
            raise ValueError("VHS_VideoCombine with meta_batch or vae runs in ComfyUI only; disconnect them.")
        if pingpong:
            images = torch.cat((images, images[1:-1].flip(0)))
        if audio is not None and options.get("trim_to_audio"):
            seconds = audio["waveform"].shape[-1] / audio["sample_rate"]
            images = images[: max(round(seconds * frame_rate), 1)]
        host = get_host()
        base = host.output_dir() if save_output else host.temp_dir()
        path = next_file(base, filename_prefix, ".mp4")
        metadata = None
        if options.get("save_metadata", True):
            metadata = {"prompt": json.dumps(prompt), "workflow": json.dumps((extra_pnginfo or {}).get("workflow"))}
        encoding = Encoding(
            fps=frame_rate,
            crf=int(options.get("crf", 19)),
            pixel_format=str(options.get("pix_fmt", "yuv420p")),
            metadata=metadata,
        )
        write_video(path, images, encoding, audio)
        return {"ui": {"videos": [str(path)]}, "result": ((save_output, [str(path)]),)}


NODE_CLASS_MAPPINGS = {"LoadAudio": LoadAudio, "VHS_LoadVideo": LoadVideo, "VHS_VideoCombine": VideoCombine}
