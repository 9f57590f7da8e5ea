"""Synthesises the speech that training and the quality bench use: `python -m wanvideo_wrapper.demo.train.record`.

Needs the programs espeak-ng and flite. The recordings are in the repository, so training itself needs neither.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...multitalk.audio import SAMPLE_RATE
from ..sounds import read_sound, write_opus
from . import RECORDINGS

log = logging.getLogger("wanvideo")

Sound = NDArray[np.float32]

SUBJECTS = (
    "The captain", "My neighbour", "A quiet child", "Everybody", "The old gardener", "Our teacher", "Some tourist",
    "The morning train", "A yellow bird", "Nobody", "The baker's daughter", "That huge machine", "An honest lawyer",
)  # fmt: skip
VERBS = (
    "remembers", "has lost", "wants to paint", "cannot find", "often talks about", "carefully opened", "will repair",
    "never liked", "suddenly noticed", "is looking for", "bought", "should have measured",
)  # fmt: skip
OBJECTS = (
    "the bridge", "seven blue boxes", "a bowl of hot soup", "the long way home", "every single question", "his bicycle",
    "an enormous wooden ship", "the music of that evening", "two cups of coffee", "a letter from Paris", "the weather",
    "her favourite umbrella", "those strange little noises",
)  # fmt: skip
PLACES = (
    "behind the station", "before breakfast", "in the middle of June", "without a word", "at the edge of the village",
    "for the third time", "", "", "because it rained", "under the kitchen table", "and then walked away",
)  # fmt: skip
OPENERS = ("", "", "", "Well, ", "Hello! ", "No, no. ", "Listen: ", "I think so. ", "Do you know why? ", "Yes. ")

ESPEAK = (
    "en-us+m1", "en-us+m3", "en-us+m5", "en-us+m7", "en-gb+f1", "en-us+f2", "en-gb+f3", "en-us+f4", "en-gb+Andy",
    "en-us+Annie", "en-us+Gene", "en-gb+linda", "en-us+max", "en-gb+paul", "en-us+belinda", "en-gb-scotland+m2",
    "de+m4", "fr+f2", "es+Mario", "it+f3",
)  # fmt: skip
FLITE = ("kal16", "awb")
UNSEEN_ESPEAK = ("en-us+f5", "en-us+m8", "en-gb+Alicia", "en-us+michel", "en-gb+Diogo", "en-us+steph")
UNSEEN_FLITE = ("slt", "rms")
TRAINING_SECONDS, UNSEEN_SECONDS, UNSEEN_TAKES = 45.0, 5.0, 2
PAUSE_SECONDS = (0.12, 0.9)
LEVEL_DB = 4.0


def sentence(choose: random.Random) -> str:
    """A random English sentence."""
    parts = (choose.choice(SUBJECTS), choose.choice(VERBS), choose.choice(OBJECTS), choose.choice(PLACES))
    return choose.choice(OPENERS) + " ".join(part for part in parts if part) + "."


def espeak(voice: str, text: str, choose: random.Random, path: Path) -> None:
    """Speak with espeak-ng at a random speed and pitch."""
    speed, pitch = str(choose.randint(125, 190)), str(choose.randint(30, 70))
    subprocess.run(["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "-w", str(path), text], check=True)


def flite(voice: str, text: str, choose: random.Random, path: Path) -> None:
    """Speak with flite at a random speed."""
    stretch = f"duration_stretch={choose.uniform(0.85, 1.25):.2f}"
    subprocess.run(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", str(path)], check=True)


def take(speak: Callable[..., None], voice: str, seconds: float, choose: random.Random) -> Sound:
    """Sentences of one voice with pauses between, each at a level of its own."""
    parts: list[Sound] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentence.wav"
        while sum(map(len, parts)) < seconds * SAMPLE_RATE:
            pause = np.zeros(int(choose.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), dtype=np.float32)
            speak(voice, sentence(choose), choose, path)
            spoken = read_sound(path)
            level = 10 ** (choose.uniform(-LEVEL_DB, LEVEL_DB) / 20) * 0.3 / max(np.abs(spoken).max(), 1e-3)
            parts += [pause, (spoken * level).astype(np.float32)]
    return np.concatenate(parts)[: int(seconds * SAMPLE_RATE)]


def record(folder: Path) -> None:
    """Write training/*.opus and unseen/*.opus below `folder`."""
    for number, voice in enumerate((*ESPEAK, *FLITE)):
        speak = flite if voice in FLITE else espeak
        path = folder / "training" / f"{voice.replace('+', '_')}.opus"
        write_opus(path, take(speak, voice, TRAINING_SECONDS, random.Random(number)))
        log.info("%s", path)
    for number, voice in enumerate((*UNSEEN_ESPEAK, *UNSEEN_FLITE)):
        speak = flite if voice in UNSEEN_FLITE else espeak
        for part in range(UNSEEN_TAKES):
            path = folder / "unseen" / f"{voice.replace('+', '_')}_{part + 1}.opus"
            write_opus(path, take(speak, voice, UNSEEN_SECONDS, random.Random(1000 + 10 * number + part)))
            log.info("%s", path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDINGS)
