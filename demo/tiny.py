"""Small models of the published architectures, as tensors under published names with seeded random weights.

Used for the demo's checkpoints and by the tests, which save them in every file format.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..clip_image.extension import ClipImageExtension
from ..multitalk.extension import MultiTalk
from ..quiet_imports import kernels_hidden
from ..wanvideo.config import WanConfig
from ..wanvideo.extension import Extension
from ..wanvideo.modules.model import WanModel
from ..wanvideo.modules.t5 import wan_name
from ..wanvideo.modules.vae import build_vae
from ..wanvideo.modules.vae_keys import VaeLayout, to_diffusers

TEXT_DIM, CLIP_DIM, SPEECH_DIM, SPEECH_LAYERS = 64, 64, 64, 2
VOCABULARY = 96
SENTENCES = (
    "a person talks to the camera", "a woman is singing a song in the evening", "an old man strokes his beard",
    "the face is round and friendly with brown eyes", "soft light falls on a plain blue wall", "high quality video",
    "blurred, overexposed, static picture with bad hands", "a red panda balances on a bamboo stem near a waterfall",
    "he gets up and jumps into the quiet lake", "the mouth opens and closes in time with the words",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small model: tensors by published name, and the header fields that its file needs."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a safetensors file, floating-point tensors in `dtype`."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        save_file({k: v.contiguous() for k, v in stored.items()}, path, metadata=self.metadata or None)


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Inside, torch draws the numbers of this seed; what it draws afterwards is as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


SPEECH = MultiTalk(
    features=SPEECH_LAYERS * SPEECH_DIM, intermediate_dim=64, context_tokens=8, output_dim=64, voiced=(0, 1, 2)
)


def transformer(
    *, in_dim: int, extensions: Sequence[Extension] = (), layers: int = 3, seed: int = 0, out_dim: int = 16
) -> Tiny:
    """A Wan transformer of 128 channels in two heads."""
    config = WanConfig(
        dim=128, ffn_dim=256, num_heads=2, num_layers=layers, in_dim=in_dim, out_dim=out_dim, text_dim=TEXT_DIM
    )
    with torch.no_grad(), drawn(seed):
        model = WanModel(config, extensions)
        for name, parameter in model.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(parameter, std=0.1)
    return Tiny(tensors=dict(model.state_dict()), metadata={"wanvideo.num_heads": "2"})


def image_to_video(seed: int = 0, clip_dim: int = CLIP_DIM) -> Tiny:
    """Wan 2.1 image to video: CLIP image cross-attention, 36 channels in."""
    return transformer(in_dim=36, extensions=(ClipImageExtension(clip_dim=clip_dim),), seed=seed)


def speech_module(seed: int = 1) -> Tiny:
    """The InfiniteTalk module for the transformer above."""
    whole = transformer(in_dim=36, extensions=(SPEECH,), seed=seed).tensors
    mine = {key: value for key, value in whole.items() if SPEECH.owns(key)}
    return Tiny(tensors={key.replace("multitalk_audio_proj.", "audio_proj."): v for key, v in mine.items()})


def vae(seed: int = 2, base_dim: int = 8) -> Tiny:
    """A Wan 2.1 VAE of small widths with random weights."""
    layout = VaeLayout(
        base_dim=base_dim,
        decoder_base_dim=base_dim,
        z_dim=16,
        stages=(1, 2, 4, 4),
        res_blocks=2,
        temporal=(False, True, True),
        channels=3,
        nested=False,
    )
    with drawn(seed):
        return vae_file(build_vae(layout), layout)


def vae_file(model: nn.Module, layout: VaeLayout) -> Tiny:
    """A VAE under published names."""
    parameters = dict(model.named_parameters())
    named = {}
    for key in vae_names():
        name = to_diffusers(key, layout)
        if name in parameters:
            named[key] = parameters[name].detach()
    return Tiny(tensors=named)


def vae_names(units: int = 16) -> Iterable[str]:
    """Every key that a VAE with up to `units` blocks a side may have, under published names."""
    convs = [f"{name}.{leaf}" for name in ("residual.2", "residual.6", "shortcut") for leaf in ("weight", "bias")]
    block = ["residual.0.gamma", "residual.3.gamma", *convs]
    sampler = [f"{name}.{leaf}" for name in ("resample.1", "time_conv") for leaf in ("weight", "bias")]
    attention = ["norm.gamma", *(f"{name}.{leaf}" for name in ("to_qkv", "proj") for leaf in ("weight", "bias"))]
    for name in ("conv1", "conv2"):
        yield from (f"{name}.weight", f"{name}.bias")
    for side, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        yield from (f"{side}.{end}" for end in ("conv1.weight", "conv1.bias", "head.0.gamma"))
        yield from (f"{side}.head.2.weight", f"{side}.head.2.bias")
        for unit, leaves in (("0", block), ("1", attention), ("2", block)):
            yield from (f"{side}.middle.{unit}.{leaf}" for leaf in leaves)
        for unit in range(units):
            yield from (f"{side}.{stages}.{unit}.{leaf}" for leaf in [*block, *sampler])


def text_encoder(seed: int = 3, *, wan_names: bool = True, sentences: Sequence[str] = SENTENCES) -> Tiny:
    """A UMT5 encoder of two layers with its tokenizer, trained on the sentences, inside."""
    with kernels_hidden("transformers"):
        from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=VOCABULARY, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    with drawn(seed):
        model = UMT5EncoderModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    tensors = {wan_name(k): v for k, v in parameters.items()} if wan_names else parameters
    return Tiny(tensors={**tensors, "spiece_model": tokenizer(sentences)})


def tokenizer(sentences: Sequence[str] = SENTENCES) -> Tensor:
    """A sentencepiece model trained on a few sentences, as bytes."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter((*sentences,) * 20),
        model_writer=written,
        vocab_size=VOCABULARY,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8).clone()


def clip_vision(seed: int = 4, patch: int = 14) -> Tiny:
    """A CLIP vision tower of two layers under ComfyUI's names; patches of 14 pixels give 257 tokens."""
    with kernels_hidden("transformers"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CLIP_DIM, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=224, patch_size=patch, hidden_act="gelu",
    )  # fmt: skip
    with drawn(seed):
        model = CLIPVisionModel(config)
    tensors = {f"vision_model.{k.removeprefix('vision_model.')}": v.detach() for k, v in model.named_parameters()}
    return Tiny(tensors=tensors, metadata={"wanvideo.num_heads": "2"})


def wav2vec(seed: int = 5) -> Tiny:
    """A Wav2Vec2 encoder of two layers with random weights."""
    return wav2vec_file(wav2vec_model(seed))


def wav2vec_model(seed: int) -> nn.Module:
    """An untrained Wav2Vec2 encoder of two layers."""
    with kernels_hidden("transformers"):
        from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=SPEECH_DIM, num_hidden_layers=SPEECH_LAYERS, num_attention_heads=2, intermediate_size=128,
        conv_dim=(32,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    with drawn(seed):
        return Wav2Vec2Model(config)


def wav2vec_file(model: nn.Module) -> Tiny:
    """A Wav2Vec2 encoder under the published names."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {}
    for name, parameter in model.named_parameters():
        for new, published in old.items():
            name = name.replace(new, published)
        tensors[f"wav2vec2.{name}"] = parameter.detach()
    return Tiny(tensors=tensors, metadata={"wanvideo.num_heads": "2"})


def lora(of: Tiny, rank: int = 4, seed: int = 6) -> Tiny:
    """A LoRA of the attention and feed-forward layers of a transformer, in ComfyUI's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, value in of.tensors.items():
        layer = key.removesuffix(".weight")
        if value.dim() == 2 and key.endswith(".weight") and ("_attn." in key or ".ffn." in key):
            down = torch.randn(rank, value.shape[1], generator=generator) * 0.02
            up = torch.randn(value.shape[0], rank, generator=generator) * 0.02
            tensors |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return Tiny(tensors=tensors)
