"""What a checkpoint is, told from its tensor names: for error messages and for `describe`.

Systems bring rows of their own (`Extension.file`); `systems.py` joins them. Source of the names: the published files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Kind(NamedTuple):
    """A kind of file: name, the node that loads it ("" for none of this pack), patterns that must all be present.

    whole: a model of its own, although some of its tensors may be named like a Wan transformer's. own: beginnings of
    keys, in a module of a transformer, of a model of the system's own that the transformer does not read.
    """

    name: str
    loader: str
    patterns: tuple[str, ...]
    whole: bool = False
    own: tuple[str, ...] = ()

    def fits(self, shapes: Shapes) -> bool:
        """Whether a file with these tensors is of this kind."""
        return all(any(re.search(pattern, key) for key in shapes) for pattern in self.patterns)


class Layout(NamedTuple):
    """Names of the layers that sizes of a transformer are read from: the first of the time, and of a feed-forward."""

    time: str
    feed_forward: str


TRANSFORMER = "Wan transformer"
LORA = "LoRA"
T5 = "T5 text encoder of Flux, SD3 and others, not UMT5"

# The first row that fits names the file, so rows go from the most special to the most general.
LORA_KIND = Kind(
    LORA, "WanVideo Lora Select", (r"(lora_(A|B|down|up)\b|lora\.(down|up)\.|\.lora_(A|B)\.|\.diff(_b|_m)?$)",)
)
TRANSFORMER_KIND = Kind(
    TRANSFORMER, "WanVideo Model Loader", (r"^patch_embedding\.weight$", r"^blocks\.0\.self_attn\.q\.weight$")
)
OTHER_KINDS = (
    Kind("Wan VAE", "WanVideo VAE Loader", (r"^(model\.)?decoder\.conv1\.weight$", r"^(model\.)?conv2\.weight$")),
    Kind("Wan VAE in diffusers names", "WanVideo VAE Loader", (r"^decoder\.conv_in\.", r"^post_quant_conv\.")),
    Kind("UMT5 text encoder", "WanVideo T5 Text Encoder Loader", (r"^token_embedding\.weight$", r"attn\.q\.weight$")),
    Kind(
        "UMT5 text encoder",
        "WanVideo T5 Text Encoder Loader",
        (
            r"^(shared|encoder\.embed_tokens)\.weight$",
            r"^encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$",
        ),
    ),
    Kind(
        "UMT5 text encoder",
        "WanVideo T5 Text Encoder Loader",
        (r"^token_embd\.weight$", r"^enc\.blk\.1\.attn_rel_b\.weight$"),
    ),
    # It has relative positions in its first block alone.
    Kind(T5, "", (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$",)),
    Kind(T5, "", (r"^enc\.blk\.0\.attn_rel_b\.weight$",)),
    Kind(
        "CLIP vision encoder",
        "WanVideo CLIP Text Encoder Loader",
        (r"^visual\.transformer\.0\.", r"^visual\.patch_embedding\."),
    ),
    Kind("CLIP vision encoder", "Load CLIP Vision", (r"vision_model\.encoder\.layers\.0\.",)),
    Kind("wav2vec2 speech encoder", "Wav2vec2 Model Loader", (r"^(wav2vec2\.)?feature_extractor\.conv_layers\.0\.",)),
    Kind(
        "Whisper speech encoder",
        "Whisper Model Loader",
        (r"^(model\.)?encoder\.embed_positions\.weight$", r"encoder\.conv1\.weight$"),
    ),
    Kind(
        "Qwen2.5 language model",
        "Qwen Loader",
        (r"^model\.embed_tokens\.weight$", r"^model\.layers\.0\.self_attn\.q_proj\.bias$"),
    ),
    Kind("Stable Diffusion checkpoint", "", (r"(^|\.)input_blocks\.0\.0\.weight$",)),
    Kind("Flux or Hunyuan transformer", "", (r"(^|\.)double_blocks\.0\.",)),
    Kind("MMDiT transformer (SD3 or the like)", "", (r"(^|\.)joint_blocks\.0\.",)),
    Kind("tiny VAE (TAEHV)", "WanVideo Tiny VAE Loader", (r"^encoder\.0\.weight$", r"^decoder\.1\.weight$")),
)


def kind_of(shapes: Shapes, of_systems: Sequence[Kind] = ()) -> Kind | None:
    """What a file with these tensors is, or None where no row fits. of_systems: the kinds that systems know."""
    whole = [kind for kind in of_systems if kind.whole]
    parts = [kind for kind in of_systems if not kind.whole]
    rows = (*whole, LORA_KIND, TRANSFORMER_KIND, *parts, *OTHER_KINDS)
    return next((kind for kind in rows if kind.fits(shapes)), None)
