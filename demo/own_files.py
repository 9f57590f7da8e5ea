"""The demo with the user's own speech and portrait."""

from __future__ import annotations

from pathlib import Path

from . import portrait as portraits
from .sounds import FPS


def assignments(speech: Path | None, portrait: Path | None) -> list[str]:
    """What to set in the demo's workflow. Raises ValueError for a file that the demo cannot use."""
    made = []
    if portrait is not None:
        portraits.check(portrait)
        made.append(f"LoadImage.image={portrait.resolve()}")
    if speech is not None:
        frames = round(seconds(speech) * FPS)
        made += [f"LoadAudio.audio={speech.resolve()}", f"MultiTalkWav2VecEmbeds.num_frames={frames}"]
    return made


def folders(*files: Path | None) -> tuple[Path, ...]:
    """Where the files lie: naming a file allows to read it."""
    return tuple(file.resolve().parent for file in files if file is not None)


def seconds(speech: Path) -> float:
    """Length of a sound file. Raises ValueError if it holds no sound."""
    import av

    try:
        with av.open(str(speech)) as container:
            if not container.streams.audio:
                raise ValueError(f"{speech} holds no sound: give a file with speech in it.")
            length = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{speech} cannot be read as sound ({error}): give a WAV, FLAC, MP3 or Opus file.") from error
    if length < 1 / FPS:
        raise ValueError(f"{speech} is shorter than one frame of video: give a file with speech in it.")
    return length
