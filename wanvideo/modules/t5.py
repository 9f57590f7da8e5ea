"""The UMT5 text encoder: transformers' UMT5EncoderModel behind the key names of Wan's and of Hugging Face's files.

Source: Wan-Video/Wan2.1 (umt5-xxl, prompts padded to 512 tokens under a mask), google/umt5.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...quantized.fp8 import FP8_DTYPES, Fp8Linear, refuse_without_fp8
from ...quantized.gguf import GgufEmbedding
from ...quantized.linear import QuantizedLinear
from ...quiet_imports import kernels_hidden
from ..assign import check, fill, layer_count, read
from ..checkpoint import Checkpoint, open_checkpoint
from ..gguf_file import BLOCKS
from ..memory import gigabytes
from ..model_file import part_paths
from ..opaque import Opaque
from ..streaming import Streamed
from ..text_cache import content_digest
from .tokenizer import EMBEDDED, Tokenizer, find_tokenizer

if TYPE_CHECKING:
    from ...host import Host

log = logging.getLogger("wanvideo")

QUANTIZATIONS = ("disabled", "fp8_e4m3fn")
# Storages whose layers any dtype of activations reaches: transformers casts these to the dtype of a `wo` layer's weight
# unless that is int8.
KEPT = (BLOCKS, "INT8", "INT4", "W4A8", "W6A8")
FP8 = "F8_E4M3"
WEIGHTED = re.compile(r"\((.*?):(\d+\.?\d*|\.\d+)\)")

# Hugging Face's name -> Wan's, or llama.cpp's in GGUF files: inside a block, and of the rest.
BLOCK_NAMES = {
    "layer.0.layer_norm.": "norm1.",
    "layer.0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
    "layer.0.SelfAttention.": "attn.",
    "layer.1.layer_norm.": "norm2.",
    "layer.1.DenseReluDense.wi_0.": "ffn.gate.0.",
    "layer.1.DenseReluDense.wi_1.": "ffn.fc1.",
    "layer.1.DenseReluDense.wo.": "ffn.fc2.",
}
TOP_NAMES = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}


GGML_BLOCK_NAMES = {
    "layer.0.layer_norm.": "attn_norm.",
    "layer.0.SelfAttention.relative_attention_bias.": "attn_rel_b.",
    "layer.0.SelfAttention.": "attn_",
    "layer.1.layer_norm.": "ffn_norm.",
    "layer.1.DenseReluDense.wi_0.": "ffn_gate.",
    "layer.1.DenseReluDense.wi_1.": "ffn_up.",
    "layer.1.DenseReluDense.wo.": "ffn_down.",
}
GGML_TOP_NAMES = {
    "shared.weight": "token_embd.weight",
    "encoder.embed_tokens.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
}
STYLES = {
    "wan": (TOP_NAMES, "blocks.", BLOCK_NAMES),
    "ggml": (GGML_TOP_NAMES, "enc.blk.", GGML_BLOCK_NAMES),
}


def wan_name(name: str) -> str:
    """Wan's name of a Hugging Face name."""
    return styled_name(name, "wan")


def styled_name(name: str, style: str) -> str:
    """The name in another style ("wan" or "ggml") of a Hugging Face name."""
    top, prefix, block = STYLES[style]
    if name in top:
        return top[name]
    _, _, number, rest = name.split(".", 3)
    for old, new in block.items():
        if rest.startswith(old):
            return f"{prefix}{number}.{new}{rest.removeprefix(old)}"
    return name


def parse_weights(prompt: str) -> tuple[str, dict[str, float]]:
    """Prompt with "(words:1.2)" marks -> the plain prompt, and the weight of each marked part."""
    weights = {text: float(weight) for text, weight in WEIGHTED.findall(prompt)}
    return WEIGHTED.sub(r"\1", prompt), weights


class TextEncoder(Opaque):
    """A loaded UMT5 encoder and its tokenizer, under the host's memory management. name: see `encoder_name`."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, *, path: Path, host: Host, name: str) -> None:
        self.path = path
        self.name = name
        self._host = host
        self._place = Streamed(model, model.encoder.block)
        self.managed = host.manage(model, place=self._place)
        self._model = model
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, device: torch.device | None = None) -> list[Tensor]:
        """One tensor [tokens, dim] per prompt on the CPU, without padding. device: where to compute, None: the host's.

        "(words:1.2)" multiplies the embedding of those words. Raises ValueError for FP8 on a device that has none.
        """
        if any(parameter.dtype in FP8_DTYPES.values() for parameter in self._model.parameters()):
            refuse_without_fp8(f"The text encoder {self.path.name} has", device or self._host.device())
        if device is None:
            device = self.managed.acquire()
        else:
            self._place(device)
        with self._place.turns():
            return [self._encode_one(prompt, device) for prompt in prompts]

    def _encode_one(self, prompt: str, device: torch.device) -> Tensor:
        plain, weights = parse_weights(prompt)
        ids = self._tokenizer.encode(plain)
        if max(ids) >= self._model.config.vocab_size:
            raise ValueError(
                f"The tokenizer of {self.path.name} knows more tokens than its {self._model.config.vocab_size} "
                "embeddings: use another file of the text encoder, or its own tokenizer."
            )
        tokens = torch.tensor([ids], device=device)
        hidden = self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].cpu()
        for words, weight in weights.items():
            part = self._tokenizer.encode(words)[:-1]
            for start in _occurrences(ids, part):
                hidden[start : start + len(part)] *= weight
        return hidden


def _occurrences(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    size = len(part)
    return [i for i in range(len(ids) - size + 1) if size and list(ids[i : i + size]) == list(part)]


def encoder_name(path: Path, dtype: torch.dtype, quantization: str = "disabled") -> str:
    """What an embedding was made with: content of the file, precision, quantization. The file need not be loaded."""
    return f"{content_digest(part_paths(path))} {dtype}" + (f" {quantization}" if quantization != "disabled" else "")


def load_text_encoder(path: Path, *, dtype: torch.dtype, host: Host, quantization: str = "disabled") -> TextEncoder:
    """Load a UMT5 encoder of any size, under Wan's, Hugging Face's or llama.cpp's names.

    quantization: "fp8_e4m3fn" stores layers in FP8 (half the memory, expanded for each product). Those that a file has
    in FP8 stay so under "disabled", too, which expands NVFP4 and MXFP8 to `dtype`. GGUF and integers stay as they are.
    Raises ValueError for another kind of file or quantization, FileNotFoundError without a tokenizer.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization '{quantization}' of a text encoder does not exist; choose one of: "
            f"{', '.join(QUANTIZATIONS)}."
        )
    checkpoint = open_checkpoint(path)
    names = _file_names(checkpoint)
    with torch.device("meta"):
        model = _build(checkpoint, names)
    if any(form.startswith(BLOCKS) for form in checkpoint.formats.values()) and quantization != "disabled":
        raise ValueError(f"{path.name} is a GGUF file, whose own quantization is used: choose quantization 'disabled'.")
    kept = sorted({kind for form in checkpoint.formats.values() if (kind := form.split()[0]) in KEPT})
    if kept and quantization != "disabled":
        log.info("%s holds %s, which is kept as it is.", path.name, ", ".join(kept))
    model.encoder.embed_tokens = model.shared
    check(model, checkpoint, names, what="UMT5 text encoder", besides=(EMBEDDED,))
    _compress(model, checkpoint, names, dtype=dtype, fp8=quantization != "disabled")
    fill(model, checkpoint, names, dtype_of=lambda name: dtype)
    _say_what_is_expanded(model, checkpoint, names)
    tokenizer = find_tokenizer(checkpoint, [path.parent, host.models_dir("text_encoders")])
    name = encoder_name(path, dtype, quantization)
    return TextEncoder(model, tokenizer, path=path, host=host, name=name)


@torch.no_grad()
def _compress(
    model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], *, dtype: torch.dtype, fp8: bool
) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            key = names[f"{name}.weight"]
            # A `wo` layer in FP8 would have its activations cast to FP8, see `KEPT`.
            takes_fp8 = not name.endswith(".wo")
            compressed = _as_stored(layer, checkpoint, key, takes_fp8)
            if compressed is None and fp8 and takes_fp8:
                compressed = Fp8Linear.quantize(read(checkpoint, key, layer.weight.shape), None, torch.float8_e4m3fn)
            if compressed is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, compressed)
    key = names["shared.weight"]
    kind, _, form = checkpoint.formats[key].partition(" ")
    if kind == BLOCKS:
        model.shared = model.encoder.embed_tokens = GgufEmbedding(checkpoint.stored(key).values, form, dtype)


def _as_stored(layer: nn.Linear, checkpoint: Checkpoint, key: str, takes_fp8: bool) -> QuantizedLinear | None:
    form = checkpoint.formats[key]
    if form.startswith(KEPT):
        return checkpoint.layer(key, layer.weight.shape, None)
    if takes_fp8 and form.startswith(FP8):
        found = checkpoint.stored(key)
        return Fp8Linear(found.values, found.scale, None)
    return None


def _say_what_is_expanded(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    compact = set(checkpoint.quantized)
    plain = (name for name, layer in model.named_modules() if type(layer) in (nn.Linear, nn.Embedding))
    expanded = [key for name in plain if (key := names[f"{name}.weight"]) in compact]
    if not expanded:
        return
    kinds = sorted({checkpoint.formats[key].split()[0] for key in expanded})
    log.info(
        "%s (%s): %d of its %d weights in %s are expanded, so that the text encoder takes %s.%s",
        checkpoint.path.name, gigabytes(sum(part.stat().st_size for part in part_paths(checkpoint.path))),
        len(expanded), sum(checkpoint.formats[key].startswith(tuple(kinds)) for key in compact), " and ".join(kinds),
        gigabytes(sum(parameter.nbytes for parameter in model.parameters())),
        "" if kinds == [FP8] else " quantization 'fp8_e4m3fn' takes less.",
    )  # fmt: skip


class _Names(Mapping[str, str]):
    """Hugging Face parameter name -> name in the file, whose style is "hf", "wan" or "ggml"."""

    def __init__(self, checkpoint: Checkpoint, style: str) -> None:
        self._keys, self.style = checkpoint.shapes, style

    def __getitem__(self, name: str) -> str:
        if self.style != "hf":
            return styled_name(name, self.style)
        alias = "encoder.embed_tokens.weight"
        return alias if name == "shared.weight" and name not in self._keys else name

    def __iter__(self) -> object:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _file_names(checkpoint: Checkpoint) -> _Names:
    marks = {
        "token_embedding.weight": "wan",
        "enc.blk.0.attn_q.weight": "ggml",
        "encoder.block.0.layer.0.SelfAttention.q.weight": "hf",
    }
    style = next((style for key, style in marks.items() if key in checkpoint.shapes), None)
    if style is None:
        raise ValueError(
            f"{checkpoint.path.name} is no UMT5 text encoder: choose a umt5-xxl file (bf16, fp16, scaled FP8 or GGUF)."
        )
    return _Names(checkpoint, style)


def _build(checkpoint: Checkpoint, names: _Names) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import UMT5Config, UMT5EncoderModel

    shapes = checkpoint.shapes
    vocabulary, dim = shapes[names["shared.weight"]]
    block = "encoder.block.0.layer"
    bias = names[f"{block}.0.SelfAttention.relative_attention_bias.weight"]
    if bias not in shapes:
        raise ValueError(
            f"{checkpoint.path.name} has no '{bias}': it is a T5 but not the UMT5 that Wan was trained with; choose a "
            "umt5-xxl file."
        )
    buckets, heads = shapes[bias]
    inner = shapes[names[f"{block}.0.SelfAttention.q.weight"]][0]
    prefix = "encoder.block." if names.style == "hf" else STYLES[names.style][1]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=shapes[names[f"{block}.1.DenseReluDense.wi_0.weight"]][0],
        num_layers=layer_count(shapes, prefix),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)
