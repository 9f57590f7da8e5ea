"""Makes the demo's models and portrait: `python -m wanvideo_wrapper.demo.build [DIR]`.

The spoken sentence, input/speech.wav, was made with espeak-ng:
    espeak-ng -v en-us+f3 -s 150 "..." --stdout | sox - -r 16000 -c 1 speech.wav
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from . import ROOT, portrait, tiny

log = logging.getLogger("wanvideo")

PORTRAIT_SEED = 19
FILES = {
    "models/diffusion_models/tiny_wan_i2v.safetensors": tiny.image_to_video,
    "models/diffusion_models/tiny_infinitetalk.safetensors": tiny.speech_module,
    "models/vae/tiny_wan_vae.safetensors": tiny.vae,
    "models/text_encoders/tiny_umt5.safetensors": tiny.text_encoder,
    "models/clip_vision/tiny_clip_vision.safetensors": tiny.clip_vision,
    "models/wav2vec2/tiny_wav2vec2.safetensors": tiny.wav2vec,
}


def build(folder: Path) -> None:
    """Write all files below `folder`."""
    for name, make in FILES.items():
        make().save(folder / name)
        log.info("%s", folder / name)
    portrait.save(folder / "input" / "portrait.png", seed=PORTRAIT_SEED, size=256)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
