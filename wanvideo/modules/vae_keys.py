"""Published key names of the Wan VAEs -> diffusers' AutoencoderKLWan, and its sizes from the tensor shapes.

Sources: Wan-Video/Wan2.1 (flat lists of blocks) and Wan-Video/Wan2.2 (one list a stage); key names are facts of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

RESIDUAL = {"0.gamma": "norm1.gamma", "2.": "conv1.", "3.gamma": "norm2.gamma", "6.": "conv2."}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
TOP = {"conv1.": "quant_conv.", "conv2.": "post_quant_conv."}
ENDS = {"conv1.": "conv_in.", "head.0.": "norm_out.", "head.2.": "conv_out."}
STAGE_22 = re.compile(r"^(encoder|decoder)\.(?:down|up)samples\.\d+\.(?:down|up)samples\.")


@dataclass(frozen=True, kw_only=True)
class VaeLayout:
    """Sizes of a Wan VAE. stages: width multiples; nested: 2.2 form (residual stages, 2x2 patches of pixels)."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    stages: tuple[int, ...]
    res_blocks: int
    temporal: tuple[bool, ...]
    channels: int
    nested: bool

    @property
    def patch(self) -> int | None:
        """Pixels a side that are folded into channels before the first convolution."""
        return 2 if self.nested else None

    @property
    def spatial_factor(self) -> int:
        """Pixels a side behind one latent."""
        return 2 ** (len(self.stages) - 1) * (self.patch or 1)


def read_layout(shapes: Shapes) -> VaeLayout:
    """The sizes of a VAE with these tensors under published names. Raises KeyError if it is no Wan VAE."""
    nested = any(STAGE_22.match(key) for key in shapes)
    base = shapes["encoder.conv1.bias"][0]
    widths, temporal, blocks = _encoder_stages(shapes, nested)
    return VaeLayout(
        base_dim=base,
        decoder_base_dim=shapes["decoder.head.0.gamma"][0] * base // widths[0],
        z_dim=shapes["conv2.weight"][0],
        stages=tuple(width // base for width in widths),
        res_blocks=blocks,
        temporal=tuple(temporal),
        channels=shapes["encoder.conv1.weight"][1],
        nested=nested,
    )


def _encoder_stages(shapes: Shapes, nested: bool) -> tuple[list[int], list[bool], int]:
    pattern = r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)" if nested else r"encoder\.downsamples\.()(\d+)"
    units: dict[tuple[int, int], str] = {}
    for key in shapes:
        found = re.match(pattern + r"\.", key)
        if found:
            units[int(found[1] or 0), int(found[2])] = found[0]
    widths: list[int] = []
    temporal: list[bool] = []
    blocks, fresh, stage = 0, True, 0
    for (unit_stage, _), prefix in sorted(units.items()):
        if nested and unit_stage != stage:
            fresh, stage = True, unit_stage
        if prefix + "resample.1.weight" in shapes:
            temporal.append(prefix + "time_conv.weight" in shapes)
            fresh = True
            continue
        if fresh:
            widths.append(shapes[prefix + "residual.6.weight"][0])
            fresh = False
        blocks += len(widths) == 1
    return widths, temporal, blocks


def to_diffusers(key: str, layout: VaeLayout) -> str:
    """The diffusers name of a published key."""
    for old, new in TOP.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    side, _, rest = key.partition(".")
    for old, new in ENDS.items():
        if rest.startswith(old):
            return f"{side}.{new}{rest.removeprefix(old)}"
    if rest.startswith("middle."):
        _, unit, tail = rest.split(".", 2)
        return f"{side}.mid_block.{MIDDLE[unit]}.{_inside(tail)}"
    return f"{side}.{_stage(side, rest, layout)}"


def _stage(side: str, rest: str, layout: VaeLayout) -> str:
    parts = rest.split(".")
    blocks = layout.res_blocks + (side == "decoder")
    if layout.nested:
        stage, unit, tail = int(parts[1]), int(parts[3]), ".".join(parts[4:])
    else:
        stage, unit = divmod(int(parts[1]), blocks + 1)
        tail = ".".join(parts[2:])
    if side == "encoder" and not layout.nested:
        return f"down_blocks.{parts[1]}.{_inside(tail)}"
    lists = {"encoder": ("down_blocks", "downsampler"), "decoder": ("up_blocks", "upsampler")}
    name, sampler = lists[side]
    if unit < blocks:
        return f"{name}.{stage}.resnets.{unit}.{_inside(tail)}"
    return f"{name}.{stage}.{sampler if layout.nested else 'upsamplers.0'}.{tail}"


def _inside(tail: str) -> str:
    if tail.startswith("shortcut."):
        return "conv_" + tail
    if tail.startswith("residual."):
        inner = tail.removeprefix("residual.")
        for old, new in RESIDUAL.items():
            if inner.startswith(old):
                return new + inner.removeprefix(old)
    return tail
