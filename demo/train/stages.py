"""The stages of training. Each reads the files of the stage before and writes models in the published formats."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...host import StandaloneHost
from ...multitalk.wav2vec import load_wav2vec
from ...wanvideo.modules.clip import load_clip_vision
from ...wanvideo.modules.t5 import load_text_encoder
from ...wanvideo.modules.vae import load_vae
from .. import tiny
from ..faces import HAIRS, MOTIONS, WALLS
from . import RECORDINGS, sizes, talk, vae, wav2vec
from .clips import LAYOUTS, ClipMaker, Clips
from .speech import Bank, make_takes, read_recordings
from .whole_clip import WholeClip

log = logging.getLogger("wanvideo")

FILES = {
    "base": "diffusion_models/tiny_wan_i2v.safetensors",
    "speech": "diffusion_models/tiny_infinitetalk.safetensors",
    "vae": "vae/tiny_wan_vae.safetensors",
    "text": "text_encoders/tiny_umt5.safetensors",
    "clip": "clip_vision/tiny_clip_vision.safetensors",
    "wav2vec": "wav2vec2/tiny_wav2vec2.safetensors",
}
STARTS, GOING_ON, PAIRS = 5000, 4000, 600
COMPILED_FORMS = 64
HEADS = {"wanvideo.num_heads": str(sizes.TRANSFORMER.num_heads)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where to, and for how many seconds: the VAE, the audio encoder, the transformer. share: of the usual clips."""

    out: Path
    device: torch.device
    see_seconds: float = 380.0
    hear_seconds: float = 30.0
    talk_seconds: float = 220.0
    takes: int = 160
    share: float = 1.0
    compiled: bool = True

    def file(self, name: str) -> Path:
        """A model file of the demo."""
        return self.out / "models" / FILES[name]

    def resume(self, name: str) -> Path:
        """What an interrupted stage goes on from."""
        return self.out / f"{name}.resume.safetensors"


def prepare_device() -> None:
    """Settings of a training process: fastest convolutions; the fused norm is compiled for every size it meets."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.recompile_limit = COMPILED_FORMS


def see_and_hear(plan: Plan) -> None:
    """First stage: the VAE and the audio encoder; the two that stay random are written, too."""
    takes = make_takes(read_recordings(RECORDINGS / "training"), plan.takes, seed=0)
    log.info("%d stretches of speech are made.", len(takes))
    encoder = wav2vec.train(
        tiny.wav2vec_model(5), takes, plan.resume("wav2vec"), seconds=plan.hear_seconds, device=plan.device
    )
    model = vae.train(
        takes,
        plan.resume("vae"),
        seconds=plan.see_seconds,
        device=plan.device,
        compiled=plan.compiled,
        share=plan.share,
    )
    save_seers(plan, encoder.cpu(), model.cpu())


def save_seers(plan: Plan, encoder: nn.Module, model: nn.Module) -> None:
    """Write the audio encoder, the VAE, and the two that stay random."""
    tiny.wav2vec_file(encoder).save(plan.file("wav2vec"))
    tiny.vae_file(model, sizes.VAE).save(plan.file("vae"))
    tiny.clip_vision(patch=sizes.CLIP_PATCH).save(plan.file("clip"))
    words = [f"a person with {hair} hair in front of a {wall} wall" for hair in HAIRS for wall in WALLS]
    tiny.text_encoder(sentences=(*tiny.SENTENCES, *words, *(f"the person {motion}" for motion in MOTIONS))).save(
        plan.file("text")
    )


def talk_stage(plan: Plan) -> None:
    """Second stage: the transformer and its audio layers."""
    host = StandaloneHost(models=plan.out / "models", device=str(plan.device))
    takes = make_takes(read_recordings(RECORDINGS / "training"), plan.takes, seed=1)
    log.info("%d stretches of speech are made.", len(takes))
    bank = Bank.encode(load_wav2vec(plan.file("wav2vec"), dtype=torch.float32, host=host), takes, plan.device)
    loaded = load_vae(plan.file("vae"), dtype=torch.float32, host=host)
    loaded.managed.acquire()
    clip_vision = load_clip_vision(plan.file("clip"), dtype=torch.float32, host=host)
    maker = ClipMaker(WholeClip(loaded.model, plan.compiled), bank, clip_vision)
    singles, pairs = make_clips(maker, plan)
    prompts = list(maker.texts.numbers)
    encoder = load_text_encoder(plan.file("text"), dtype=torch.float32, host=host)
    texts = [text.to(plan.device) for text in encoder.encode(prompts, device=torch.device("cpu"))]
    torch.manual_seed(0)
    model = new_transformer().to(plan.device)
    teacher = talk.Teacher(model, bank, texts, singles, pairs)
    trained = talk.train(teacher, plan.resume("talk"), seconds=plan.talk_seconds, compiled=plan.compiled)
    save_transformer(trained.cpu(), plan)


def make_clips(maker: ClipMaker, plan: Plan) -> tuple[list[Clips], list[Clips]]:
    """Clips of one person (that start, that go on), and of two for every layout."""
    counts = [max(int(n * plan.share), 1) for n in (STARTS, GOING_ON, PAIRS)]
    singles = [maker.make(counts[0], goes_on=False), maker.make(counts[1], goes_on=True)]
    pairs = [maker.make(counts[2], goes_on=on, places=places) for places in LAYOUTS for on in (False, True)]
    return singles, pairs


def new_transformer() -> talk.Learner:
    """An untrained transformer whose audio layers add nothing yet."""
    model = talk.Learner(sizes.TRANSFORMER, (sizes.IMAGE, sizes.SPEECH))
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=sizes.TRANSFORMER.dim**-0.5)
    nn.init.zeros_(model.head.head.weight)
    for block in model.blocks:
        nn.init.zeros_(block.audio_cross_attn.proj.weight)
    return model


def save_transformer(model: nn.Module, plan: Plan) -> None:
    """Write the base model and the audio layers as the two files that they are published as."""
    tensors = dict(model.state_dict())
    speech = {key.replace("multitalk_audio_proj.", "audio_proj."): v for key, v in tensors.items() if _is_speech(key)}
    base = {key: value for key, value in tensors.items() if not _is_speech(key)}
    tiny.Tiny(tensors=base, metadata=HEADS).save(plan.file("base"))
    tiny.Tiny(tensors=speech).save(plan.file("speech"))


def _is_speech(key: str) -> bool:
    return sizes.SPEECH.owns(key)
