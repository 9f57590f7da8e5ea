"""Qwen2.5-VL as an encoder of a text and a picture: transformers' Qwen2_5_VLModel, with the surface of ComfyUI's CLIP.

Source: Qwen/Qwen2.5-VL (architecture, positions), Qwen/Qwen-Image (what the text is put into, and what is cut off).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...quiet_imports import kernels_hidden
from ..assign import assign, head_count, layer_count
from ..checkpoint import Checkpoint, open_checkpoint
from .clip import DEVIATION, MEAN
from .qwen import EPSILON, HEAD_SIZE, LONGEST, ROPE_BASE
from .qwen_tokenizer import IMAGE, START, QwenTokenizer, find_qwen_tokenizer

if TYPE_CHECKING:
    from ...host import Host

PATCH, MERGE, FRAMES = 14, 2, 2
# Sides in pixels of what becomes one token, and how many pixels a picture may have.
TOKEN, LEAST, MOST = PATCH * MERGE, 56**2, 12_845_056
VISION_HEAD, VISION_BASE = 80, 10_000.0
TEMPLATE = (
    f"{START}system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    f"relationships of the objects and background:<|im_end|>\n{START}user\n{{}}<|im_end|>\n{START}assistant\n"
)
VISUAL, EMBEDDING, LAYER = "visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.layers.0"


class Question(NamedTuple):
    """ids of the whole text, and the picture IMAGE [1, H, W, 3] that stands where the ids have a mark for one."""

    ids: list[int]
    image: Tensor | None


class QwenVision:
    """A loaded Qwen2.5-VL under the host's memory management (socket CLIP)."""

    def __init__(self, model: nn.Module, tokenizer: QwenTokenizer, *, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)
        self._tokenizer = tokenizer

    def tokenize(self, text: str, images: Sequence[Tensor] = (), llama_template: str | None = None) -> Question:
        """The text inside of a template, whose {} it takes, and the first picture of the first batch."""
        ids = self._tokenizer.encode((llama_template or TEMPLATE).format(text))
        return Question(ids, images[0][:1] if images else None)

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: Question) -> list[list[object]]:
        """CONDITIONING: the last hidden states [1, N, C] float32 from the user's text on."""
        device = self.managed.acquire()
        mark = self._tokenizer.id_of(IMAGE)
        ids, grid = list(tokens.ids), None
        if tokens.image is not None and mark in ids:
            pixels, grid = patches(tokens.image)
            place = ids.index(mark)
            ids[place : place + 1] = [mark] * (grid[0] * grid[1] // MERGE**2)
        embedded = self.model.language_model.embed_tokens(torch.tensor([ids], device=device))
        positions = torch.arange(len(ids)).expand(3, -1)
        if grid is not None:
            seen = self.model.visual(pixels.to(embedded), grid_thw=torch.tensor([(1, *grid)], device=device))
            # Older versions of transformers return the features themselves.
            features = getattr(seen, "pooler_output", seen)
            embedded[0, place : place + len(features)] = features
            positions = placed(len(ids), place, grid)
        hidden = self.model.language_model(
            inputs_embeds=embedded, position_ids=positions[:, None].to(device), use_cache=False
        ).last_hidden_state
        self.managed.release()
        return [[hidden[:, self._begin(tokens.ids) :].float().cpu(), {}]]

    def _begin(self, ids: list[int]) -> int:
        """Where the user's text begins: behind the second mark of a speaker and that speaker's name."""
        start = self._tokenizer.id_of(START)
        marks = [place for place, number in enumerate(ids) if number == start]
        if len(marks) < 2:
            return 0
        user = self._tokenizer.encode(f"{START}user\n")
        return marks[1] + len(user) if ids[marks[1] : marks[1] + len(user)] == user else marks[1]


def patches(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """IMAGE [1, H, W, 3] -> patches [rows * columns, 3 * 2 * 14 * 14], four that become a token together, and their
    numbers (rows, columns). A picture counts as two equal frames."""
    height, width = image.shape[1:3]
    rows, columns = (round(side / TOKEN) * TOKEN for side in (height, width))
    if rows * columns > MOST:
        share = math.sqrt(height * width / MOST)
        rows, columns = (max(TOKEN, int(side / share / TOKEN) * TOKEN) for side in (height, width))
    elif rows * columns < LEAST:
        share = math.sqrt(LEAST / (height * width))
        rows, columns = (math.ceil(side * share / TOKEN) * TOKEN for side in (height, width))
    pixels = F.interpolate(image[..., :3].float().movedim(-1, 1), size=(rows, columns), mode="bilinear")[0]
    mean, deviation = (torch.tensor(values).view(3, 1, 1).to(pixels) for values in (MEAN, DEVIATION))
    cells = ((pixels - mean) / deviation).unflatten(2, (-1, MERGE, PATCH)).unflatten(1, (-1, MERGE, PATCH))
    by_token = cells.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)
    return by_token.flatten(4).flatten(0, 3), (rows // PATCH, columns // PATCH)


def placed(count: int, start: int, grid: tuple[int, int]) -> Tensor:
    """Positions [3, count] in time, height and width where a picture's tokens begin at `start`; text goes on behind
    its longer side."""
    rows, columns = (side // MERGE for side in grid)
    cells = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij"))
    behind = count - start - rows * columns
    text = torch.arange(start).expand(3, -1), torch.arange(behind).expand(3, -1) + start + max(rows, columns)
    return torch.cat((text[0], cells.flatten(1) + start, text[1]), dim=1)


def load_qwen_vl(path: Path, *, dtype: torch.dtype, host: Host) -> QwenVision:
    """Load a Qwen2.5-VL under ComfyUI's (and Hugging Face's older) names; FP8 files are expanded to `dtype`.

    Raises ValueError for another kind of file, FileNotFoundError where there is no tokenizer.
    """
    checkpoint = open_checkpoint(path)
    if not {VISUAL, EMBEDDING} <= checkpoint.shapes.keys():
        raise ValueError(f"{path.name} is no Qwen2.5-VL: choose qwen_2.5_vl_7b.safetensors.")
    with torch.device("meta"):
        model = _build(checkpoint)
    names = {name: name.replace("language_model.", "model.") for name, _ in model.named_parameters()}
    tokenizer = find_qwen_tokenizer(path, [path.parent, host.models_dir("text_encoders")])
    assign(model, checkpoint, names, dtype=dtype, what="Qwen2.5-VL")
    for name, module in model.named_modules():
        for buffer, value in list(module.named_buffers(recurse=False)):
            # Frequencies of positions, which are in no file.
            base = ROPE_BASE if name.startswith("language_model") else VISION_BASE
            setattr(module, buffer, base ** -(torch.arange(len(value)) / len(value)))
    return QwenVision(model, tokenizer, host=host)


def _build(checkpoint: Checkpoint) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    shapes = checkpoint.shapes
    vocabulary, width = shapes[EMBEDDING]
    heads = head_count(checkpoint, width, HEAD_SIZE)
    size = width // heads // 16
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{LAYER}.mlp.gate_proj.weight"][0],
        "num_hidden_layers": layer_count(shapes, "model.layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes[f"{LAYER}.self_attn.k_proj.weight"][0] * heads // width,
        "rms_norm_eps": EPSILON,
        "max_position_embeddings": LONGEST,
        "rope_theta": ROPE_BASE,
        # Of 64 pairs of channels: 16 for time, 24 for height and width each.
        "rope_scaling": {"rope_type": "default", "mrope_section": [2 * size, 3 * size, 3 * size]},
    }
    seen = shapes[VISUAL][0]
    depth = layer_count(shapes, "visual.blocks.")
    vision = {
        "depth": depth,
        "hidden_size": seen,
        "intermediate_size": shapes["visual.blocks.0.mlp.gate_proj.weight"][0],
        "num_heads": seen // VISION_HEAD,
        "out_hidden_size": width,
        # Every eighth block sees the whole picture, the others windows of it.
        "fullatt_block_indexes": [block for block in range(depth) if block % 8 == 7],
    }
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
