"""Published key names of the Wan VAEs -> those of diffusers' AutoencoderKLWan, and its sizes from the tensor shapes.

Sources: Wan-Video/Wan2.1 (one flat list of units a side), Wan-Video/Wan2.2 (one list a stage), huggingface/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..frames import VAE_TIME_STRIDE

Shapes = Mapping[str, tuple[int, ...]]

PREFIX = "model."

_TOP = {"conv1.": "quant_conv.", "conv2.": "post_quant_conv."}
_ENDS = {"conv1.": "conv_in.", "head.0.": "norm_out.", "head.2.": "conv_out."}
_MIDDLE_UNITS = ("resnets.0", "attentions.0", "resnets.1")
_BLOCK = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_UNIT = re.compile(r"^(encoder\.down|decoder\.up)samples\.(\d+)\.(?:(?:down|up)samples\.(\d+)\.)?(.+)$")
_MIDDLE = re.compile(r"^(encoder|decoder)\.middle\.([012])\.(.+)$")
_SAMPLER = re.compile(r"^encoder\.downsamples\.(\d+)\.resample\.")
_SAMPLER_LEAVES = ("resample.", "time_conv.")


@dataclass(frozen=True, kw_only=True)
class VaeLayout:
    """Sizes of a Wan VAE.

    base_dim, decoder_base_dim: widths that `stages` multiplies; z_dim: latent channels; res_blocks: residual blocks of
    an encoder stage (a decoder stage has one more); temporal: whether each encoder stage but the last halves the frame
    rate; channels: of a pixel, those of its patch included; nested: the 2.2 form, with shortcuts around the stages.
    """

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    stages: tuple[int, ...]
    res_blocks: int
    temporal: tuple[bool, ...]
    channels: int
    nested: bool

    @property
    def patch(self) -> int:
        """Pixels a side that are folded into channels before the first convolution: 1 (2.1) or 2 (2.2)."""
        return 2 if self.nested else 1

    @property
    def spatial_factor(self) -> int:
        """Pixels a side behind one latent."""
        return 2 ** (len(self.stages) - 1) * self.patch


def to_diffusers(key: str, layout: VaeLayout) -> str:
    """The diffusers name of a published key; any other key stays as it is."""
    return _renamed(key, layout.res_blocks)


def file_names(keys: Iterable[str]) -> dict[str, str]:
    """diffusers name -> the file's key, which is a published one, `model.` and a published one, or diffusers' own."""
    plain = {key.removeprefix(PREFIX): key for key in keys}
    samplers = [int(found[1]) for found in map(_SAMPLER.match, plain) if found]
    return {_renamed(key, min(samplers, default=0)): original for key, original in plain.items()}


def read_layout(shapes: Shapes) -> VaeLayout:
    """The sizes of the VAE with these tensor shapes, by diffusers name.

    Raises KeyError, naming a missing tensor, if it is no Wan VAE.
    """
    base, channels = shapes["encoder.conv_in.weight"][:2]
    nested = "encoder.down_blocks.0.resnets.0.conv2.weight" in shapes
    first = shapes[f"encoder.down_blocks.0.{'resnets.0.' if nested else ''}conv2.weight"][0] // base
    sampler = "upsampler" if nested else "upsamplers.0"
    widths = [shapes[name][0] for name in _present(shapes, "decoder.up_blocks.{}.resnets.0.conv2.weight")]
    if not widths or not first:
        raise KeyError("decoder.up_blocks.0.resnets.0.conv2.weight")
    faster = [f"decoder.up_blocks.{i}.{sampler}.time_conv.weight" in shapes for i in range(len(widths) - 1)]
    if 2 ** sum(faster) != VAE_TIME_STRIDE:
        raise KeyError(f"time compression by {VAE_TIME_STRIDE}")
    decoder_base = widths[-1] // first
    return VaeLayout(
        base_dim=base,
        decoder_base_dim=decoder_base,
        z_dim=shapes["post_quant_conv.weight"][0],
        stages=tuple(width // decoder_base for width in reversed(widths)),
        res_blocks=len(_present(shapes, "decoder.up_blocks.0.resnets.{}.conv2.weight")) - 1,
        temporal=tuple(reversed(faster)),
        channels=channels,
        nested=nested,
    )


def _present(shapes: Shapes, pattern: str) -> list[str]:
    """The names that the pattern gives for 0, 1, ... as long as they are there."""
    names = [pattern.format(i) for i in range(len(shapes))]
    absent = next((i for i, name in enumerate(names) if name not in shapes), len(names))
    return names[:absent]


def _renamed(key: str, res_blocks: int) -> str:
    unit, middle = _UNIT.match(key), _MIDDLE.match(key)
    if unit is not None:
        return _unit_name(*unit.groups(), res_blocks=res_blocks)
    if middle is not None:
        side, index, leaf = middle.groups()
        return f"{side}.mid_block.{_MIDDLE_UNITS[int(index)]}.{_replace_head(leaf, _BLOCK)}"
    side, _, rest = key.partition(".")
    if side in ("encoder", "decoder"):
        return f"{side}.{_replace_head(rest, _ENDS)}"
    return _replace_head(key, _TOP)


def _unit_name(side: str, first: str, second: str | None, leaf: str, *, res_blocks: int) -> str:
    """The name of a residual block or sampler: unit `first` of the flat list, or `second` of stage `first`."""
    leaf = _replace_head(leaf, _BLOCK)
    if second is not None:
        unit = f"{side.partition('.')[2]}sampler" if leaf.startswith(_SAMPLER_LEAVES) else f"resnets.{second}"
        return f"{side}_blocks.{first}.{unit}.{leaf}"
    if side == "encoder.down":
        return f"{side}_blocks.{first}.{leaf}"
    # A decoder stage has one residual block more than an encoder stage, then a sampler.
    stage, block = divmod(int(first), res_blocks + 2)
    unit = "upsamplers.0" if block == res_blocks + 1 else f"resnets.{block}"
    return f"{side}_blocks.{stage}.{unit}.{leaf}"


def _replace_head(key: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
