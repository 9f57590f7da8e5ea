"""The encoders of prompt and picture in their published sizes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..host import Host
from ..quiet_imports import kernels_hidden
from ..wanvideo.modules.clip import ClipVision
from ..wanvideo.modules.t5 import TextEncoder
from ..wanvideo.modules.tokenizer import Tokenizer
from .random_model import CLIP_DIM, DTYPE, PROMPT_TOKENS, Case, RandomFile

# umt5-xxl and ViT-H/14; "tiny" is no encoder: it shows that the command works.
TEXT = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
VISION = dict(hidden_size=CLIP_DIM, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
TINY_TEXT = dict(vocab_size=256, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
TINY_VISION = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
PICTURE = 224


def random_text_encoder(case: Case, host: Host) -> TextEncoder:
    """UMT5 in bfloat16; a character is a token."""
    with kernels_hidden("transformers"):
        from transformers import UMT5Config, UMT5EncoderModel

    sizes = TINY_TEXT if case.model == "tiny" else TEXT
    config = UMT5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    model.encoder.embed_tokens = model.shared
    tokenizer = Tokenizer(lambda text: [ord(letter) % 256 for letter in text])
    return TextEncoder(_drawn(model), tokenizer, path=Path("random_umt5.safetensors"), host=host, name="random")


def random_clip(case: Case, host: Host) -> ClipVision:
    """ViT-H/14 in bfloat16."""
    with kernels_hidden("transformers"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = TINY_VISION if case.model == "tiny" else VISION
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=PICTURE, patch_size=14, hidden_act="gelu"))
    embeddings = getattr(model, "vision_model", model).embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0])[None]
    return ClipVision(_drawn(model), host=host)


def _drawn(model: nn.Module) -> nn.Module:
    """The model of meta tensors, with random weights."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    file = RandomFile(shapes, "encoder")
    for name in shapes:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(file.read(name).to(DTYPE), requires_grad=False))
    return model.eval()


def calls(case: Case, host: Host) -> dict[str, Callable[[], object]]:
    """What encodes two prompts, and a picture. Each leaves the device when it is done, as its node does."""
    text, vision = random_text_encoder(case, host), random_clip(case, host)

    def prompts() -> list[Tensor]:
        try:
            return text.encode(["p" * PROMPT_TOKENS, "n" * (PROMPT_TOKENS // 2)])
        finally:
            text.managed.release()

    def picture() -> SimpleNamespace:
        try:
            return vision.encode_image(torch.rand(1, PICTURE, PICTURE, 3))
        finally:
            vision.managed.release()

    return {"encoding two prompts": prompts, "encoding a picture": picture}
