"""FP8 linear layers under the names that users of the original pack know, and which layers stay in base precision.

The layers themselves are in `quantized/`: one class for each storage format and kind of product.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .kernels.fp8_rows import Fp8Rows, padded_size, quantize
from .quantized.fp8 import FP8_DTYPES, Fp8MatmulLinear, row_scales, rows_product
from .quantized.linear import (
    INPUT_SCALE_NAMES,
    ROW_MULTIPLE,
    SCALE_NAMES,
    QuantizedLinear,
    activation_scale,
    check_columns,
    frozen,
    padded,
)

log = logging.getLogger("wanvideo")

Scale = Tensor | float
# Scales in an error message.
MOST_NAMED = 8

# Parts of a layer's name that keep it in base precision: small, and sensitive.
KEEP = (
    "norm", "bias", "time_in", "patch_embedding", "time_", "img_emb", "modulation", "text_embedding", "adapter",
    "add", "ref_conv", "audio_proj", "multitalk_audio_proj", "head",
)  # fmt: skip


def keeps_precision(name: str, params_to_keep: Collection[str] = KEEP) -> bool:
    """Whether the layer of this name stays in base precision."""
    return any(part in name for part in params_to_keep)


def fp8_linear_forward(cls: nn.Module, base_dtype: torch.dtype, input: Tensor) -> Tensor:  # noqa: A002
    """The forward of a linear layer `cls` on FP8 tensor cores: input [..., K] -> [..., N] in base_dtype.

    cls: a layer with a weight [N, K] and perhaps a bias. With an FP8 weight, its `weight_scale` or `scale_weight` (one
    value or one a row) and `input_scale` or `scale_input` (one value; without it, or where it is 1, every row of the
    input is measured) are read where they are there. Any other weight runs the layer's `original_forward`, or its plain
    product; a layer that is quantized already, its own product. Tuples become their first entry. FP8 products have no
    gradient.
    Raises ValueError for an input of another width or scales of another number, TypeError for a scale that is no
    number and no tensor.
    """
    # Contiguous before anything else is done with it; the operators below see to its address.
    ready = input.contiguous().to(base_dtype)
    if isinstance(cls, QuantizedLinear):
        return _first(cls(ready)).to(base_dtype)
    if cls.weight.dtype not in FP8_DTYPES.values():
        if hasattr(cls, "original_forward"):
            return _first(cls.original_forward(ready)).to(base_dtype)
        return nn.functional.linear(ready, cls.weight.to(base_dtype), _bias(cls, base_dtype))
    features, columns = cls.weight.shape
    check_columns(ready, columns)
    weight = padded(cls.weight.detach(), padded_size(features, ROW_MULTIPLE), padded_size(columns))
    scale = row_scales(_scale(cls, SCALE_NAMES), features, weight.device)
    scale = nn.functional.pad(scale, (0, 0, 0, weight.shape[0] - features))
    rows = _quantized(ready, activation_scale(_scale(cls, INPUT_SCALE_NAMES), weight.device))
    bias = _bias(cls, base_dtype)
    return rows_product(rows, weight, scale, None if bias is None else bias.detach(), features)


def _quantized(x: Tensor, static: Tensor | None) -> Fp8Rows:
    """x in FP8 with the scale that was measured before; 1 says that none was, which the device finds out itself."""
    rows = quantize(x)
    if static is None:
        return rows
    given = quantize(x, static)
    values = torch.where(static == 1, rows.values.view(torch.uint8), given.values.view(torch.uint8))
    return rows._replace(values=values.view(rows.values.dtype), scale=torch.where(static == 1, rows.scale, given.scale))


class ConvertedLinear(Fp8MatmulLinear):
    """What `convert_fp8_linear` makes of a layer: its results are in `base_dtype`, whatever its input's type is."""

    base_dtype: torch.dtype

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., K] -> [..., N] in base_dtype."""
        return super().forward(x.to(self.base_dtype) if isinstance(x, Tensor) else x._replace(dtype=self.base_dtype))


def convert_fp8_linear(
    module: nn.Module,
    base_dtype: torch.dtype,
    params_to_keep: Collection[str] = (),
    scale_weight_keys: Mapping[str, Scale] | None = None,
) -> None:
    """Let every linear layer of `module` that has an FP8 weight run on FP8 tensor cores, in place.

    The layers stay the same objects, and give results in base_dtype; so do layers that were converted before, with the
    scales that they have. params_to_keep: parts of names of layers that are left alone, as are layers with another
    weight and those that the model loader quantized (choose a "_fast" option there); those with a forward of their own
    are too, with a warning.
    scale_weight_keys: "<layer>.weight_scale" or "<layer>.scale_weight", and "<layer>.input_scale" or
    "<layer>.scale_input" -> scales of the file; without them the layer's attributes of these names.
    Raises ValueError for scales of layers that the module does not have, before anything is changed, and for scales
    that do not fit; TypeError for a scale that is no number and no tensor.
    """
    scales = _scales_by_layer(module, scale_weight_keys or {})
    converted = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or keeps_precision(name, params_to_keep):
            continue
        if isinstance(layer, ConvertedLinear):
            _rebase(layer, base_dtype)
            continue
        if isinstance(layer, QuantizedLinear) or layer.weight.dtype not in FP8_DTYPES.values():
            continue
        if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
            log.warning("'%s' has an FP8 weight but a forward of its own: it is left as it is.", name)
            continue
        given = scales.get(layer, {})
        static = _measured(_scale(layer, INPUT_SCALE_NAMES, given))
        _adopt(layer, _scale(layer, SCALE_NAMES, given), static, base_dtype)
        converted += 1
    log.info("FP8 matrix products: %d linear layers.", converted)


def _scales_by_layer(module: nn.Module, scales: Mapping[str, Scale]) -> dict[nn.Module, dict[str, Scale]]:
    """Layer -> its scales by their last name; a layer with several names is found under each.

    Raises ValueError that names the scales of layers that are not there: without theirs, those meant would use 1.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    found: dict[nn.Module, dict[str, Scale]] = {}
    strays = []
    for key, scale in scales.items():
        name, _, leaf = key.rpartition(".")
        if leaf not in (*SCALE_NAMES, *INPUT_SCALE_NAMES):
            continue
        if hasattr(layers.get(name), "weight"):
            found.setdefault(layers[name], {})[leaf] = scale
        else:
            strays.append(key)
    if strays:
        more = f" and {len(strays) - MOST_NAMED} more" if len(strays) > MOST_NAMED else ""
        raise ValueError(
            "scale_weight_keys has scales of layers that the module does not have: "
            f"{', '.join(strays[:MOST_NAMED])}{more}. Name layers as the module's `named_modules` does, without a "
            "prefix of the file such as 'diffusion_model.', and leave out those of other modules."
        )
    return found


def _scale(layer: nn.Module, names: Sequence[str], given: Mapping[str, Scale] | None = None) -> Tensor | None:
    """The scale under the first of the names that has one, in `given` or else on the layer.

    Raises TypeError for anything but a number or a tensor.
    """
    candidates = [(given or {}).get(name) for name in names] + [getattr(layer, name, None) for name in names]
    scale = next((one for one in candidates if one is not None), None)
    if scale is None or isinstance(scale, Tensor):
        return scale
    if isinstance(scale, (int, float)):
        return torch.tensor(float(scale))
    raise TypeError(
        f"A scale of a layer is a number or a tensor, not {type(scale).__name__}: convert it to one of them."
    )


def _adopt(layer: nn.Linear, scale: Tensor | None, static: Tensor | None, base: torch.dtype) -> None:
    """Turn the layer into one that multiplies in FP8, padded and aligned once; hooks and what hangs on it stay."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach().to(base)
    quantized = ConvertedLinear(weight, scale, bias, static)
    # Attributes and buffers would hide the parameters of these names, and the other names would be stored twice.
    for name in (*SCALE_NAMES, *INPUT_SCALE_NAMES):
        for place in (vars(layer), layer._buffers, layer._parameters):
            place.pop(name, None)
    layer.__class__ = ConvertedLinear
    layer.base_dtype = base
    layer.out_features, layer.in_features = weight.shape
    layer._parameters |= quantized._parameters
    layer.scale_input = quantized.scale_input


def _rebase(layer: ConvertedLinear, base: torch.dtype) -> None:
    """Let a converted layer give its results in another precision."""
    layer.base_dtype = base
    layer.bias = None if layer.bias is None else frozen(layer.bias.to(base))


def _measured(scale: Tensor | None) -> Tensor | None:
    """A scale of activations that says something: files write 1 where none was measured."""
    return None if scale is None or (scale.numel() == 1 and float(scale.detach()) == 1) else scale


def _bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
