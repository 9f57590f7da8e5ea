"""The demo's graph as calls: models loaded once for a setting, then one video after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import NODE_CLASS_MAPPINGS as NODES
from ...multitalk.audio import SAMPLE_RATE
from ..sounds import FPS, Sound

SIZE, WINDOW_FRAMES, MOTION_FRAMES = 128, 33, 9
STEPS, SHIFT, SCHEDULER = 12, 3.0, "euler"
NEGATIVE = "blurred, static picture"
# Node and widgets of each step cache; the rest of the widgets have the nodes' defaults.
ALWAYS = {"start_step": 1, "end_step": -1, "cache_device": "main_device"}
CACHES = {
    "TeaCache": ("WanVideoTeaCache", {"rel_l1_thresh": 0.1, "use_coefficients": False, "mode": "e", **ALWAYS}),
    "MagCache": ("WanVideoMagCache", {"magcache_thresh": 0.02, "magcache_K": 4, **ALWAYS}),
    "EasyCache": ("WanVideoEasyCache", {"easycache_thresh": 0.05, **ALWAYS}),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a row of the bench compares: precision, quantization, attention and step cache of the transformer, steps."""

    precision: str = "bf16"
    quantization: str = "disabled"
    attention: str = "sdpa"
    cache: str = ""
    steps: int = STEPS

    @property
    def name(self) -> str:
        """As the table shows it."""
        return " / ".join(filter(None, (self.quantization, self.attention, self.precision, self.cache)))


class Talker:
    """Makes talking videos with one setting.

    Raises what the loaders raise where the setting cannot run.
    """

    def __init__(self, setting: Setting) -> None:
        module = _call("MultiTalkModelLoader", model="tiny_infinitetalk.safetensors")
        self.model = _call(
            "WanVideoModelLoader",
            model="tiny_wan_i2v.safetensors",
            base_precision=setting.precision,
            quantization=setting.quantization,
            load_device="main_device",
            attention_mode=setting.attention,
            multitalk_model=module,
        )
        self.steps = setting.steps
        self.cache = {}
        if setting.cache:
            node, widgets = CACHES[setting.cache]
            self.cache = {"cache_args": _call(node, **widgets)}
        self.vae = _call("WanVideoVAELoader", model_name="tiny_wan_vae.safetensors", precision="fp32")
        self.text = _call("LoadWanVideoT5TextEncoder", model_name="tiny_umt5.safetensors", precision="fp32")
        self.clip = _call("LoadWanVideoClipTextEncoder", model_name="tiny_clip_vision.safetensors", precision="fp32")
        self.wav2vec = _call(
            "Wav2VecModelLoader",
            model="tiny_wav2vec2.safetensors",
            base_precision="fp32",
            load_device="main_device",
        )

    def make(
        self, portrait: Tensor, sounds: Sequence[Sound], *, prompt: str, seed: int, masks: Tensor | None = None
    ) -> tuple[NDArray[np.float32], float]:
        """Portrait [H, W, 3] in 0..1 and a voice a person -> video [frames, 128, 128, 3] in 0..1, and seconds."""
        begun = time.monotonic()
        frames = max(len(sound) for sound in sounds) * FPS // SAMPLE_RATE
        voices = {f"audio_{i + 1}": _audio(sound) for i, sound in enumerate(sounds)}
        speech = _call(
            "MultiTalkWav2VecEmbeds",
            wav2vec_model=self.wav2vec,
            normalize_loudness=True,
            num_frames=frames,
            fps=float(FPS),
            audio_scale=1.0,
            audio_cfg_scale=1.0,
            multi_audio_type="para",
            ref_target_masks=masks,
            **voices,
        )
        looks = _call(
            "WanVideoClipVisionEncode",
            clip_vision=self.clip,
            image_1=portrait[None],
            strength_1=1.0,
            strength_2=1.0,
            crop="center",
            combine_embeds="average",
            force_offload=False,
        )
        picture = _call(
            "WanVideoImageToVideoMultiTalk",
            vae=self.vae,
            width=SIZE,
            height=SIZE,
            frame_window_size=WINDOW_FRAMES,
            motion_frame=MOTION_FRAMES,
            force_offload=False,
            colormatch="disabled",
            start_image=portrait[None],
            clip_embeds=looks,
            mode="infinitetalk",
        )
        text = _call(
            "WanVideoTextEncode", positive_prompt=prompt, negative_prompt=NEGATIVE, t5=self.text, force_offload=False
        )
        samples = _call(
            "WanVideoSampler",
            model=self.model,
            image_embeds=picture,
            text_embeds=text,
            multitalk_embeds=speech,
            steps=self.steps,
            cfg=1.0,
            shift=SHIFT,
            seed=seed,
            force_offload=False,
            scheduler=SCHEDULER,
            riflex_freq_index=0,
            **self.cache,
        )
        video = _call("WanVideoPassImagesFromSamples", samples=samples).numpy()
        return video, time.monotonic() - begun

    def reconstruct(self, video: NDArray[np.floating]) -> NDArray[np.float32]:
        """A video of 4n+1 frames through the VAE and back."""
        pixels = torch.from_numpy(np.ascontiguousarray(video)).float().movedim(-1, 0) * 2 - 1
        made = self.vae.decode(self.vae.encode(pixels)).clamp(-1, 1)
        return ((made + 1) / 2).movedim(0, -1).numpy()


def _audio(sound: Sound) -> dict[str, object]:
    return {"waveform": torch.from_numpy(np.float32(sound))[None, None], "sample_rate": SAMPLE_RATE}


def _call(name: str, **inputs: object) -> object:
    """The first output of a node."""
    node = NODES[name]()
    return getattr(node, node.FUNCTION)(**inputs)[0]
