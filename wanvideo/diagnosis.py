"""The second look after a step that gave NaN or infinite values: which layer or attention kernel gave the first one.

It runs the step once more with a test, and a wait for the device, behind every layer. Nothing of it runs in a healthy
step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..kernels.fp8_rows import Fp8Rows
from ..quantized.linear import QuantizedLinear
from .modules.attention import WanSelfAttention
from .modules.layers import WanLayerNorm, WanRMSNorm
from .modules.model import WanModel
from .tokens import BlockInputs

# Layers whose input is what an attention kernel gave.
_AFTER_KERNEL = re.compile(r"blocks\.(\d+)\.(self_attn\.o|cross_attn\.o|audio_cross_attn\.proj)$")
_KERNELS = {
    "cross_attn.o": "cross-attention to the text or the picture ('sdpa')",
    "audio_cross_attn.proj": "audio attention ('sdpa')",
}


class _FoundError(Exception):
    """Ends the second look; carries the sentence."""


def origin(model: WanModel, again: Callable[[], object]) -> str | None:
    """Where NaN or infinity first arises when `again` runs the model, as a clause; None if it does not this time."""
    found = None
    with _plain(model), _watched(model):
        try:
            again()
        except _FoundError as error:
            found = str(error)
    return found


@contextmanager
def _plain(model: WanModel) -> Iterator[None]:
    """Blocks uncompiled: compiled code does not see hooks that come later."""
    kept = [block._compiled_call_impl for block in model.blocks]
    for block in model.blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, compiled in zip(model.blocks, kept, strict=True):
            block._compiled_call_impl = compiled


@contextmanager
def _watched(model: WanModel) -> Iterator[None]:
    running: dict[int, str] = {}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, (WanLayerNorm, WanRMSNorm))}
    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            hooks.append(module.register_forward_pre_hook(_before(name, running, norms)))
            hooks.append(module.register_forward_hook(_after(name)))
        elif isinstance(module, WanSelfAttention):
            hooks.append(module.register_forward_pre_hook(_remember(name, running)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _remember(name: str, running: dict[int, str]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[object, ...]) -> None:
        found = _AFTER_KERNEL.match(f"{name}.o")
        inputs = next((a for a in arguments if isinstance(a, BlockInputs)), None)
        if found is not None and inputs is not None and found[2] == "self_attn.o":
            running[int(found[1])] = (inputs.attention or module.attention).name

    return hook


def _before(name: str, running: dict[int, str], norms: dict[str, nn.Module]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[object, ...]) -> None:
        if all(_finite(argument) for argument in arguments):
            return
        _check_norms(name, norms)
        kernel = _AFTER_KERNEL.match(name)
        if kernel is None:
            raise _FoundError(f"it arose before layer {name}")
        block, layer = int(kernel[1]), kernel[2]
        self_attention = f"self-attention '{running[block]}'" if block in running else "self-attention"
        what = _KERNELS.get(layer, self_attention)
        raise _FoundError(f"it came from {what} in block {block}, whose inputs were finite")

    return hook


def _check_norms(name: str, norms: dict[str, nn.Module]) -> None:
    """Raises _FoundError for weights of norms in the block of layer `name`: kernels read them without calling those."""
    block = tuple(name.split(".")[:2])
    for norm, module in norms.items():
        if tuple(norm.split(".")[:2]) == block and not all(_finite(parameter) for parameter in module.parameters()):
            raise _FoundError(f"the weights of layer {norm} are not finite")


def _after(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, _: object, out: object) -> None:
        if _finite(out):
            return
        if not all(_finite(parameter) for parameter in module.parameters()):
            raise _FoundError(f"the weights of layer {name} are not finite")
        label = f" ({module.label})" if isinstance(module, QuantizedLinear) else ""
        raise _FoundError(f"it came from layer {name}{label}, whose input was finite")

    return hook


def _finite(value: object) -> bool:
    if isinstance(value, Fp8Rows):
        return _finite(value.values) and _finite(value.scale)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    # Types of 8 bits have no test of their own.
    with suppress(RuntimeError):
        return bool(torch.isfinite(value).all())
    return bool(torch.isfinite(value.float()).all())
