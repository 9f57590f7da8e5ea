"""The demo with the user's own speech and portrait."""

from __future__ import annotations

from pathlib import Path

from ..headless.graph import Link, Node, Prompt
from . import portrait as portraits
from .sounds import FPS


def connect(prompt: Prompt, speech: Path | None, portrait: Path | None) -> None:
    """Put the user's files in the place of the demo's. Raises ValueError for a file that the demo cannot use."""
    if portrait is not None:
        portraits.check(portrait)
        _load(prompt, 0, Node("portrait", "LoadImage", "", {"image": str(portrait.resolve())}))
    if speech is not None:
        prompt.find("MultiTalkWav2VecEmbeds").inputs["num_frames"] = round(seconds(speech) * FPS)
        _load(prompt, 1, Node("speech", "LoadAudio", "", {"audio": str(speech.resolve())}))


def _load(prompt: Prompt, slot: int, loader: Node) -> None:
    """Let the loader give what an output of the demo's own node gave."""
    before = Link(prompt.find("WanVideoDemoInputs").id, slot)
    for node in prompt.nodes.values():
        node.inputs.update({name: Link(loader.id, 0) for name, value in node.inputs.items() if value == before})
    prompt.nodes[loader.id] = loader


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
