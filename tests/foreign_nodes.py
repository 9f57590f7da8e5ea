"""Saved graphs with nodes of other packs: fixed outputs in their place, and a run from the command line."""

import av
import numpy as np
from PIL import Image
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import INPUT
from wanvideo_wrapper.headless import core_nodes
from wanvideo_wrapper.headless.cli import main
from wanvideo_wrapper.host import get_host, set_host


def foreign(returns, make):
    """A node class with outputs of these types; make: (its linked inputs by name) -> the outputs."""

    class Foreign:
        RETURN_TYPES = returns
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self, **inputs):
            return make(**inputs)

    return Foreign


def run_graph(case, folder, monkeypatch, device="cpu"):
    """The videos that the graph of a case writes, in the order of their names; `folder` has models/ and input/."""
    for name, node in case.nodes.items():
        nodes = NODE_CLASS_MAPPINGS if name in NODE_CLASS_MAPPINGS else core_nodes.NODE_CLASS_MAPPINGS
        monkeypatch.setitem(nodes, name, node)
    arguments = ["run", case.path, "--models", folder / "models", "--input", folder / "input"]
    arguments += ["--out", folder / f"output_{device}", "--device", device]
    for option, values in (("--set", case.edits), ("--bypass", case.bypassed), ("--mute", case.muted)):
        arguments += [part for value in values for part in (option, value)]
    before = get_host()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        set_host(before)
    return sorted((folder / f"output_{device}").rglob("*.mp4"))


def save_talking_clip(path, frames, rate=16):
    """A picture that slides, with a tone as its sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = (np.sin(np.arange(16000 * frames // rate) / 20) * 9000).astype(np.int16)[None]
    with Image.open(INPUT / "portrait.png") as portrait, av.open(str(path), "w") as container:
        pixels = np.asarray(portrait.convert("RGB").resize((96, 64)))
        video = container.add_stream("libx264", rate=rate, width=96, height=64, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, index, axis=1)), format="rgb24")
            container.mux(video.encode(frame))
        heard = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
        heard.sample_rate = 16000
        container.mux(audio.encode(heard))
        for stream in (video, audio):
            container.mux(stream.encode(None))
