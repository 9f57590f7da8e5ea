"""The CLIP ViT-H vision encoder: transformers' CLIPVisionModel behind the key names of Wan's and ComfyUI's files.

Source: Wan-Video/Wan2.1 (open-clip XLM-RoBERTa ViT-H/14; the features are those before the last layer).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...quiet_imports import kernels_hidden
from ..assign import assign, head_count, layer_count
from ..checkpoint import Checkpoint, open_checkpoint
from ..finite import check_finite

if TYPE_CHECKING:
    from ...host import Host

HEAD_SIZE = 80
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

# transformers' name -> name in Wan's file, in front and inside a layer. q, k and v are one tensor there.
TOP_NAMES = {
    "embeddings.class_embedding": "visual.cls_embedding",
    "embeddings.patch_embedding.weight": "visual.patch_embedding.weight",
    "embeddings.position_embedding.weight": "visual.pos_embedding",
    "pre_layrnorm.": "visual.pre_norm.",
    "post_layernorm.": "visual.post_norm.",
}
LAYER_NAMES = {
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "self_attn.out_proj.": "attn.proj.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
}
FUSED = ("q_proj", "k_proj", "v_proj")


class ClipVision:
    """A loaded vision encoder under the host's memory management, with the surface of ComfyUI's CLIP_VISION."""

    def __init__(self, model: nn.Module, *, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)
        self._size = model.config.image_size

    @torch.no_grad()
    def encode(self, images: Tensor, *, crop: bool = True) -> Tensor:
        """Images [N, H, W, C] in 0..1 -> features before the last layer [N, tokens, channels], float32 on the CPU.

        crop: keep the aspect ratio and cut the middle out, else squeeze.
        """
        device = self.managed.acquire()
        pixels = preprocess(images, self._size, crop=crop).to(device, next(self.model.parameters()).dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2].float().cpu()

    def encode_image(self, images: Tensor, crop: bool = True) -> SimpleNamespace:
        """As ComfyUI's: an object whose penultimate_hidden_states are the features."""
        return SimpleNamespace(penultimate_hidden_states=self.encode(images, crop=crop))


def preprocess(images: Tensor, size: int, *, crop: bool) -> Tensor:
    """Images [N, H, W, C] in 0..1 -> normalized pixels [N, 3, size, size], bicubic, rounded to 8 bits."""
    check_finite("The pictures hold", images, unit="frame")
    pixels = images[..., :3].float().movedim(-1, 1)
    height, width = pixels.shape[2:]
    target = (size, size)
    if crop:
        scale = size / min(height, width)
        target = (round(scale * height), round(scale * width))
    if (height, width) != (size, size):
        pixels = nn.functional.interpolate(pixels, size=target, mode="bicubic", antialias=True)
        top, left = (pixels.shape[2] - size) // 2, (pixels.shape[3] - size) // 2
        pixels = pixels[:, :, top : top + size, left : left + size]
    pixels = (pixels * 255).clamp(0, 255).round() / 255
    mean, deviation = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def load_clip_vision(path: Path, *, dtype: torch.dtype, host: Host) -> ClipVision:
    """Load a CLIP vision tower of any size under Wan's or transformers' names.

    Raises ValueError for another kind of file.
    """
    checkpoint = _Plain.of(open_checkpoint(path))
    with torch.device("meta"):
        model = _build(checkpoint)
    names = {name: name.removeprefix("vision_model.") for name, _ in model.named_parameters()}
    assign(model, checkpoint, names, dtype=dtype, what="CLIP vision encoder")
    # The one buffer is not in any file.
    embeddings = getattr(model, "vision_model", model).embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0])[None]
    return ClipVision(model, host=host)


class _Plain:
    """A checkpoint under transformers' names without the `vision_model.` prefix, whatever the file's names are."""

    def __init__(self, checkpoint: Checkpoint, source: dict[str, tuple[str, int | None]]) -> None:
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._checkpoint, self._source = checkpoint, source
        self.shapes = {name: self._shape(*entry) for name, entry in source.items()}
        self.formats = {name: checkpoint.formats[key] for name, (key, _) in source.items()}
        self.dtypes = {name: checkpoint.dtypes[key] for name, (key, _) in source.items()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Plain:
        """Read the naming from the keys."""
        if "visual.patch_embedding.weight" in checkpoint.shapes:
            return cls(checkpoint, _wan_sources(checkpoint))
        source = {
            key.rpartition("vision_model.")[2]: (key, None) for key in checkpoint.shapes if "vision_model." in key
        }
        if "embeddings.patch_embedding.weight" not in source:
            raise ValueError(
                f"{checkpoint.path.name} is no CLIP vision encoder: choose clip_vision_h.safetensors or Wan's "
                "open-clip-xlm-roberta-large-vit-huge-14 file."
            )
        return cls(checkpoint, source)

    def _shape(self, key: str, part: int | None) -> tuple[int, ...]:
        shape = self._checkpoint.shapes[key]
        return shape if part is None else (shape[0] // len(FUSED), *shape[1:])

    def tensor(self, name: str, *, mapped: bool = False) -> Tensor:
        """The tensor; a third of the fused one for q, k and v. mapped: see `TensorFile.read`."""
        key, part = self._source[name]
        value = self._checkpoint.tensor(key, mapped=mapped)
        return value if part is None else value.chunk(len(FUSED))[part].clone()


def _wan_sources(checkpoint: Checkpoint) -> dict[str, tuple[str, int | None]]:
    source: dict[str, tuple[str, int | None]] = {}
    for new, old in TOP_NAMES.items():
        for key in (k for k in checkpoint.shapes if k.startswith(old)):
            source[new + key.removeprefix(old)] = (key, None)
    prefix = "visual.transformer."
    for key in (k for k in checkpoint.shapes if k.startswith(prefix)):
        number, rest = key.removeprefix(prefix).split(".", 1)
        layer = f"encoder.layers.{number}."
        if rest.startswith("attn.to_qkv."):
            leaf = rest.removeprefix("attn.to_qkv.")
            source |= {f"{layer}self_attn.{name}.{leaf}": (key, part) for part, name in enumerate(FUSED)}
        for new, old in LAYER_NAMES.items():
            if rest.startswith(old):
                source[layer + new + rest.removeprefix(old)] = (key, None)
    return source


def _build(checkpoint: _Plain) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

    width, _, patch, _ = checkpoint.shapes["embeddings.patch_embedding.weight"]
    positions = max(checkpoint.shapes["embeddings.position_embedding.weight"][:-1])
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=checkpoint.shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=layer_count(checkpoint.shapes, "encoder.layers."),
        num_attention_heads=head_count(checkpoint, width, HEAD_SIZE),
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)
