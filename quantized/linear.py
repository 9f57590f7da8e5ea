"""What all quantized linear layers have in common.

N output features, K input features. Their forward takes [..., K] and returns [..., N] in the input's dtype; the input
is never changed, and nothing waits for the device. Weights, scales and biases are parameters, so that they travel with
their block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import op_name
from ..kernels.fp8_rows import Fp8Rows, quantize
from ..tensor_layout import check_entry, kernel_ready

ROW_MULTIPLE = 16
BLACKWELL = (10, 0)
# What files and layers call a layer's scales: ComfyUI and LightX2V, then older FP8 files and the original pack.
SCALE_NAMES = ("weight_scale", "scale_weight")
GLOBAL_SCALE_NAMES = ("weight_scale_2", "scale_weight_2")
INPUT_SCALE_NAMES = ("input_scale", "scale_input")


class QuantizedLinear(nn.Linear):
    """A linear layer with a weight in few bits.

    A class says how it is stored and multiplied: `stored` are the tensors, `settings` the whole numbers that they are
    read by, `values` what they are worth. label: both in words, for messages. takes_rows: whether it reads activations
    that are FP8 already.
    """

    takes_rows = False
    label: ClassVar[str]
    settings: tuple[int, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A class without a label is one of these under another name, such as a layer with a LoRA.
        if "label" in vars(cls):
            cls.kind = cls.__name__
            _kinds[cls.kind] = cls

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = out_features, in_features
        self.bias = None if bias is None else frozen(bias)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight."""
        raise NotImplementedError

    @staticmethod
    def values(stored: Sequence[Tensor], settings: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight's values [N, K] in new memory, or more rows and columns where it was filled up."""
        raise NotImplementedError

    @classmethod
    def multiply(
        cls, x: Tensor, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
    ) -> Tensor:
        """x [M, K], contiguous, times the weight transposed, plus bias [N] in x's dtype: [M, N]."""
        wide = cls.values(stored, settings, x.dtype)[:out_features, : x.shape[1]]
        check_entry(f"product of {cls.__name__}", weight=wide)
        return F.linear(x, wide, bias)

    @classmethod
    def fast_kind(cls, device: torch.device) -> type[QuantizedLinear]:
        """The class of the same storage whose products on `device` are in few bits; this one where it has none."""
        return cls

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight's values [N, K]."""
        return self.values(self.stored, self.settings, dtype)[: self.out_features, : self.in_features]

    def add(self, difference: Tensor) -> None:
        """Change the weight by [N, K] float32 and store it anew."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Raises ValueError for another K."""
        check_columns(x, self.in_features)
        return _product(x, self.kind, self.stored, self.settings, self.bias, self.out_features)


_kinds: dict[str, type[QuantizedLinear]] = {}


@torch.library.custom_op(op_name("quantized_product"), mutates_args=())
def _product(
    x: Tensor, kind: str, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
) -> Tensor:
    rows = kernel_ready(x.reshape(x.shape[:-1].numel(), x.shape[-1]), strided=False)
    stored = [kernel_ready(t, strided=False) for t in stored]
    bias = None if bias is None else kernel_ready(bias.to(x.dtype))
    check_entry(kind, strided=False, x=rows, bias=bias, **{f"stored[{n}]": t for n, t in enumerate(stored)})
    if rows.numel():
        # comfy-kitchen launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(x):
            out = _kinds[kind].multiply(rows, stored, settings, bias, out_features)
    else:
        # No rows, or no columns: then the bias alone.
        out = rows.new_zeros(rows.shape[0], out_features)
        out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], out_features)


@_product.register_fake
def _(
    x: Tensor, kind: str, stored: Sequence[Tensor], settings: Sequence[int], bias: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is the product with its weight, plus its bias, and nothing else.

    Not one with a LoRA beside it, which is of another class, nor one that somebody watches through hooks.
    """
    known = _kinds[layer.kind] if isinstance(layer, QuantizedLinear) else nn.Linear
    return type(layer) is known and not (layer._forward_hooks or layer._forward_pre_hooks)


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight's values [N, K] of a layer of any storage; also while a graph is traced."""
    if isinstance(layer, QuantizedLinear):
        return _weight(layer.kind, layer.stored, layer.settings, weight_shape(layer), dtype)
    return layer.weight.to(dtype)


@torch.library.custom_op(op_name("quantized_weight"), mutates_args=())
def _weight(
    kind: str, stored: Sequence[Tensor], settings: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    stored = [kernel_ready(t, strided=False) for t in stored]
    check_entry(f"weight of {kind}", strided=False, **{f"stored[{n}]": t for n, t in enumerate(stored)})
    with torch.cuda.device_of(stored[0]):
        return _kinds[kind].values(stored, settings, dtype)[: shape[0], : shape[1]].contiguous()


@_weight.register_fake
def _(kind: str, stored: Sequence[Tensor], settings: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty(shape, dtype=dtype)


def frozen(t: Tensor) -> nn.Parameter:
    """A parameter without gradient, contiguous in aligned storage."""
    return nn.Parameter(kernel_ready(t.detach(), strided=False), requires_grad=False)


def moved(scale: Tensor, device: torch.device) -> Tensor:
    """A scale as float32 on `device`. The host waits only where it reads the result itself."""
    return scale.detach().to(device, torch.float32, non_blocking=device.type == "cuda")


def activation_scale(scale: Tensor | None, device: torch.device) -> Tensor | None:
    """The scale of all activations that a file gives -> float32, 0-d, on `device`. Raises ValueError for several."""
    if scale is None:
        return None
    if scale.numel() != 1:
        raise ValueError(
            f"A scale of activations of shape {tuple(scale.shape)} must have one value: leave it out, and every row of "
            "an activation is measured."
        )
    return moved(scale, device).reshape(())


def check_columns(x: Tensor | Fp8Rows, columns: int) -> None:
    """Raise ValueError unless x is `columns` wide. Stored weights are wider, so that no product would notice."""
    width = x.shape[-1] if isinstance(x, Tensor) else x.features
    if width != columns:
        raise ValueError(f"The layer reads {columns} channels, but its input has {width}: check what is connected.")


def weight_shape(layer: nn.Module) -> torch.Size:
    """Shape of the layer's weight as the model has it, whatever its storage."""
    if isinstance(layer, QuantizedLinear):
        return torch.Size((layer.out_features, layer.in_features))
    return layer.weight.shape


def all_take_rows(layers: Sequence[nn.Module]) -> bool:
    """Whether one FP8 form of an activation serves all these layers."""
    return all(getattr(layer, "takes_rows", False) for layer in layers)


def shared_input(x: Tensor | Fp8Rows, *layers: nn.Module) -> Tensor | Fp8Rows:
    """x as all these layers read it: quantized once where all of them take FP8 rows."""
    return quantize(x) if isinstance(x, Tensor) and all_take_rows(layers) else x


def padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix of one-byte values with zeros behind them, up to rows x columns."""
    if t.shape == (rows, columns):
        return t
    return F.pad(t.view(torch.uint8), (0, columns - t.shape[1], 0, rows - t.shape[0])).view(t.dtype)
