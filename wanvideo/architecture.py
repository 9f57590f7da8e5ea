"""The sizes of a Wan transformer, read from its tensor shapes. Layers are counted, not assumed."""

from __future__ import annotations

from collections.abc import Mapping

from .assign import head_count, layer_count
from .checkpoint import Checkpoint
from .config import PATCH_SIZE, WanConfig
from .families import LORA, TRANSFORMER, Layout
from .systems import Systems

HEAD_SIZE = 128
REQUIRED = ("patch_embedding.weight", "head.head.weight")
# Where sizes are read, unless a system has other layers in the place of these.
WAN = Layout(time="time_embedding.0", feed_forward="blocks.0.ffn.0")
TEXT, TEXT_READER = "text_embedding.0.weight", "blocks.0.cross_attn.q.weight"


def config_of(checkpoint: Checkpoint, systems: Systems) -> WanConfig:
    """The configuration of a transformer under canonical names.

    Raises ValueError, saying what the file is, if it is another kind of model, incomplete, or one whose extra weights
    this version cannot use.
    """
    name, shapes = checkpoint.path.name, checkpoint.shapes
    kind = systems.kind_of(shapes)
    if kind is None or kind.name != TRANSFORMER:
        found = "an unknown kind of file" if kind is None else f"a {kind.name}"
        loader = f"; load it with '{kind.loader}'" if kind is not None and kind.loader and kind.name != LORA else ""
        raise ValueError(f"{name} is {found}, not a Wan transformer{loader or '; choose another file'}.")
    layouts = (kind.layout for kind in systems.extensions if kind.layout is not None)
    layout = next((other for other in layouts if f"{other.feed_forward}.weight" in shapes), WAN)
    required = (*REQUIRED, f"{layout.time}.weight", f"{layout.feed_forward}.weight")
    if TEXT in shapes or TEXT_READER in shapes:
        required = (*required, TEXT, TEXT_READER)
    missing = [key for key in required if key not in shapes]
    if missing:
        raise ValueError(f"{name} lacks '{missing[0]}', so it is no complete Wan transformer; download it again.")
    for system, key in systems.missing(shapes).items():
        raise ValueError(f"{name} needs {system} ('{key}'), which this version does not have; choose a base model.")
    return _config(checkpoint, shapes, layout)


def _config(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> WanConfig:
    dim, in_dim, *patch = shapes["patch_embedding.weight"]
    if tuple(patch) != PATCH_SIZE:
        raise ValueError(f"{checkpoint.path.name} has patches of {tuple(patch)}; only {PATCH_SIZE} can be run.")
    text_dim = shapes[TEXT][1] if TEXT in shapes else 0
    return WanConfig(
        dim=dim,
        # NVFP4 fills weights up to whole blocks, but never their bias.
        ffn_dim=shapes.get(f"{layout.feed_forward}.bias", shapes[f"{layout.feed_forward}.weight"])[0],
        num_heads=head_count(checkpoint, dim, HEAD_SIZE),
        num_layers=layer_count(shapes, "blocks."),
        in_dim=in_dim,
        out_dim=shapes["head.head.weight"][0] // (PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]),
        text_dim=text_dim,
        freq_dim=shapes[f"{layout.time}.weight"][1],
    )
