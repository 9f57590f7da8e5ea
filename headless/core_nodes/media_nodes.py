"""Sound and video files (ComfyUI and VideoHelperSuite)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...host import get_host
from ...node_tools import Inputs
from ...wanvideo.footage import check_room
from ...wanvideo.images import resize_images
from ...wanvideo.whole_file import partial_file, publish
from ..media import MediaError, VideoInfo, probe, read_audio, read_frames
from ..video_file import (
    FORMATS,
    PRORES_PROFILES,
    Encoding,
    Format,
    Frames,
    check_frames,
    encode_video,
    sound_beside,
    to_pixels,
)
from .pictures import fit, next_file

log = logging.getLogger("wanvideo")

Audio = dict[str, object]

LARGEST = 8192
MANY = 2**53 - 1
WRITTEN_FORMAT = "video/h264-mp4"
PNG_SEQUENCE = "video/8bit-png"
# What the encoders take as CRF.
WORST_CRF = {"libvpx-vp9": 63}
WORST_CRF_OF_MPEG = 51
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

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str) -> bool:
        """The file is there and has sound."""
        probe(get_host().readable_file(audio), "audio")
        return True


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

    @classmethod
    def VALIDATE_INPUTS(cls, video: str, input_types: dict[str, object]) -> bool | str:
        """The file is there and has pictures."""
        if {"meta_batch", "vae"} & set(input_types):
            return "with meta_batch or vae it runs in ComfyUI only; disconnect them."
        probe(get_host().readable_file(video), "video")
        return True

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
        images = list(_that_fit(_sized(frame, (custom_width, custom_height), step) for frame in chosen))
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


def _that_fit(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """The images [1, H, W, 3], as long as memory holds them: what a header says of their number may be wrong."""
    for count, image in enumerate(images, 1):
        remedy = "load fewer with frame_load_cap, or smaller ones with custom_width"
        check_room(count, *image.shape[1:3], remedy=remedy)
        yield image


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
    except MediaError as error:
        log.warning("The frames come without sound: %s", error)
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
    """Writes frames and sound as a video file, or as pictures, with the workflow inside (VHS_VideoCombine)."""

    FUNCTION = "combine_video"
    RETURN_TYPES = ("VHS_FILENAMES",)
    OUTPUT_NODE = True
    WRITES = True
    ACCEPTS_ALL = True
    TAKES_FOLDERS = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "images": ("IMAGE",),
                "frame_rate": ("FLOAT", {"default": 8, "min": 1, "max": 1000, "step": 1}),
                "loop_count": ("INT", {"default": 0, "min": 0, "max": 100, "step": 1}),
                "filename_prefix": ("STRING", {"default": "AnimateDiff"}),
                "format": ("STRING", {"default": WRITTEN_FORMAT}),
                "pingpong": ("BOOLEAN", {"default": False}),
                "save_output": ("BOOLEAN", {"default": True}),
            },
            "optional": {"audio": ("AUDIO",), "meta_batch": ("VHS_BatchManager",), "vae": ("VAE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def EXTRA_INPUTS(cls, values: Mapping[str, object]) -> dict[str, tuple[object, ...]]:
        """Widgets that VideoHelperSuite shows for the format."""
        name = values.get("format")
        form = FORMATS.get(name) if isinstance(name, str) else None
        rows: dict[str, tuple[object, ...]] = {
            "save_metadata": ("BOOLEAN", {"default": True}),
            "trim_to_audio": ("BOOLEAN", {"default": False}),
        }
        if form is not None and form.crf is not None:
            worst = WORST_CRF.get(form.codec, WORST_CRF_OF_MPEG)
            rows["crf"] = ("INT", {"default": form.crf, "min": 0, "max": worst})
            rows["pix_fmt"] = (list(form.pixel_formats), {"default": form.pixel_formats[0]})
        if name == "video/ProRes":
            rows["profile"] = (list(PRORES_PROFILES), {"default": "hq"})
        return rows

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        input_types: Mapping[str, object],
        format: str = WRITTEN_FORMAT,
        filename_prefix: str = "AnimateDiff",
        save_output: bool = True,
    ) -> bool | str:
        """A format that is written here, and a name that stays in its folder."""
        if {"meta_batch", "vae"} & set(input_types):
            return "with meta_batch or vae it runs in ComfyUI only; disconnect them."
        form = _format(format)
        next_file(get_host().output_dir() if save_output else get_host().temp_dir(), filename_prefix, form.suffix)
        return True

    def combine_video(
        self,
        images: Frames,
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
        form = _format(format)
        check_frames(images, filename_prefix)
        if options.get("meta_batch") is not None or options.get("vae") is not None:
            raise ValueError("VHS_VideoCombine with meta_batch or vae runs in ComfyUI only; disconnect them.")
        order = list(range(len(images)))
        if pingpong:
            order += order[1:-1][::-1]
        if audio is not None and options.get("trim_to_audio"):
            seconds = audio["waveform"].shape[-1] / audio["sample_rate"]
            order = order[: max(round(seconds * frame_rate), 1)]
        if loop_count and form.container:
            order *= loop_count + 1
        if audio is not None and not form.sound:
            log.warning("The format %s holds no sound; choose a video format to have it.", format)
        elif audio is not None:
            audio = sound_beside(audio, len(order), frame_rate)
        host = get_host()
        base = host.output_dir() if save_output else host.temp_dir()
        metadata = {}
        if options.get("save_metadata", True):
            saved = {"prompt": prompt, **(extra_pnginfo or {})}
            metadata = {name: json.dumps(value) for name, value in saved.items() if value}
        encoding = Encoding(
            fps=frame_rate,
            crf=int(options.get("crf", form.crf or 0)),
            pixel_format=str(options.get("pix_fmt", form.pixel_formats[0] if form.pixel_formats else "")),
            metadata=metadata,
            format=form,
            profile=str(options.get("profile", "hq")),
            loop=loop_count,
        )
        paths = _written(_Arranged(images, order), encoding, audio, (base, filename_prefix))
        return {"ui": {"videos": paths}, "result": ((save_output, paths),)}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"The format '{name}' is written by ComfyUI only; choose one of: {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class _Arranged:
    """Frames in another order."""

    images: Frames
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.order[index]]


def _written(images: Frames, encoding: Encoding, audio: Audio | None, name: tuple[Path, str]) -> list[str]:
    """The paths under which the video, or the pictures of a sequence, can be seen once they are whole."""
    form = encoding.format
    next_name = partial(next_file, *name, form.suffix)
    with partial_file(next_name().parent, f"video{form.suffix}") as unfinished:
        if form is not FORMATS[PNG_SEQUENCE]:
            encode_video(unfinished, images, encoding, audio)
            return [str(publish(unfinished, next_name))]
    paths: list[Path] = []
    for index in range(len(images)):
        with partial_file(next_name().parent, "picture.png") as unfinished:
            _save_png(unfinished, images[index])
            # The first picture takes the number of the sequence.
            numbered = partial(_sequence_name, paths[0], index + 1) if paths else next_name
            paths.append(publish(unfinished, numbered))
    return [str(path) for path in paths]


def _sequence_name(first: Path, number: int) -> Path:
    return first.with_name(f"{first.name.removesuffix('.001.png')}.{number:03d}.png")


def _save_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    Image.fromarray(to_pixels(image)).save(path, format="PNG")


NODE_CLASS_MAPPINGS = {"LoadAudio": LoadAudio, "VHS_LoadVideo": LoadVideo, "VHS_VideoCombine": VideoCombine}
