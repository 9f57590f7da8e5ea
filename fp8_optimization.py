"""FP8 linear layers under the names that users of the original pack know, and which layers stay in base precision.

The layers themselves are in `quantized/`: one class for each storage format and kind of product.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .kernels.fp8_rows import padded_size, quantise
from .quantized.fp8 import FP8_DTYPES, Fp8MatmulLinear, row_scales, rows_product
from .quantized.linear import ROW_MULTIPLE, QuantisedLinear, padded

log = logging.getLogger("wanvideo")

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

    cls: a layer with a weight [N, K] and perhaps a bias. With an FP8 weight, its `scale_weight` (one value or one a
    row) and `scale_input` (one value; without it every row of the input is measured) are read where they are there. Any
    other weight runs the layer's `original_forward`, or its plain product. Tuples become their first entry.
    """
    # Contiguous before anything else is done with it; the operators below see to its address.
    ready = input.contiguous().to(base_dtype)
    if isinstance(cls, QuantisedLinear):
        return _first(cls(ready))
    if cls.weight.dtype not in FP8_DTYPES.values():
        if hasattr(cls, "original_forward"):
            return _first(cls.original_forward(ready))
        return nn.functional.linear(ready, cls.weight.to(base_dtype), _bias(cls, base_dtype))
    features, columns = cls.weight.shape
    weight = padded(cls.weight, padded_size(features, ROW_MULTIPLE), padded_size(columns))
    scale = row_scales(getattr(cls, "scale_weight", None), features).to(weight.device, non_blocking=True)
    scale = nn.functional.pad(scale, (0, 0, 0, weight.shape[0] - features))
    static = getattr(cls, "scale_input", None)
    static = None if static is None else static.to(weight.device, torch.float32, non_blocking=True).reshape(())
    return rows_product(quantise(ready, static), weight, scale, _bias(cls, base_dtype), features)


def convert_fp8_linear(
    module: nn.Module,
    base_dtype: torch.dtype,
    params_to_keep: Collection[str] = (),
    scale_weight_keys: Mapping[str, Tensor] | None = None,
) -> None:
    """Let every linear layer of `module` that has an FP8 weight run on FP8 tensor cores, in place.

    The layers stay the same objects. params_to_keep: parts of names of layers that are left alone, as are layers with
    another weight. scale_weight_keys: "<layer>.scale_weight" and "<layer>.scale_input" -> scales of the file.
    """
    scales = scale_weight_keys or {}
    converted = 0
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or keeps_precision(name, params_to_keep):
            continue
        if layer.weight.dtype in FP8_DTYPES.values():
            scale = scales.get(f"{name}.scale_weight", getattr(layer, "scale_weight", None))
            static = scales.get(f"{name}.scale_input", getattr(layer, "scale_input", None))
            _adopt(layer, scale, _measured(static), base_dtype)
            converted += 1
    log.info("FP8 matrix products: %d linear layers.", converted)


def _adopt(layer: nn.Linear, scale: Tensor | None, static: Tensor | None, base: torch.dtype) -> None:
    """Turn the layer into one that multiplies in FP8, padded and aligned once."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach().to(base)
    static = None if static is None else static.to(weight.device)
    quantised = Fp8MatmulLinear(weight, None if scale is None else scale.to(weight.device), bias, static)
    hooks = {key: value for key, value in vars(layer).items() if "hooks" in key}
    # Plain attributes would hide the parameters of these names.
    for name in ("scale_weight", "scale_input"):
        vars(layer).pop(name, None)
    layer.__class__ = Fp8MatmulLinear
    vars(layer).update(vars(quantised) | hooks)


def _measured(scale: Tensor | None) -> Tensor | None:
    """A scale of activations that says something: files write 1 where none was measured."""
    return None if scale is None or float(scale) == 1 else scale


def _bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
