"""What a backend is, what it must know of the model, and a row of the capability table.

Shapes: B batch, L tokens, H heads, D head size, C = H * D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import packages

Capability = tuple[int, int]


class Attention(Protocol):
    """A backend: q, k, v [B, L, H, D] -> [B, L, H, D], contiguous. mask [B, H, Lq, Lk] or 1 for B, H: True allows."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Softmax attention with scale D ** -0.5. Never changes q, k or v.

        Raises ValueError for a mask that the backend cannot honour.
        """


class FusedAttention(Protocol):
    """A backend that also takes queries and keys as the linear layers give them, to norm and turn them itself."""

    name: str

    def fused(
        self, q_raw: Tensor, k_raw: Tensor, v: Tensor, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Tensor:
        """q_raw, k_raw [B, L, C], v [B, L, H, D], rope [L, D/2, 2] cosine and sine float32 -> [B, L, H, D].

        norm_q, norm_k: WanRMSNorm (`weight` [C], `eps`), over all heads at once. Called where no extension reads or
        replaces q, k and v. A backend may also have `fused_rows`, the same with FP8 rows of [B, L, C] as its result,
        which is called where the output projection multiplies in FP8 and nothing else reads it.
        """


@runtime_checkable
class GridAttention(Protocol):
    """A backend that must know where tokens lie in the video."""

    def on_grid(self, grid: tuple[int, int, int]) -> Attention:
        """The backend for a token grid (frames, height, width); tokens beyond it belong to no frame."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The self-attention that a backend is asked to run. dtype: of q, k and v; masked: whether calls have masks."""

    device: torch.device
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False

    @property
    def capability(self) -> Capability | None:
        """Compute capability of the GPU; None elsewhere."""
        return capability(self.device)


def capability(device: torch.device) -> Capability | None:
    """Compute capability of a CUDA device; None for other devices and for ROCm, where the number means nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A row of the table: what an option runs, what it needs, and how to make it.

    runs: in words, for the log and the doctor. exports: (module, function) pairs of which one must import. least: the
    lowest compute capability; only: those that it has kernels for; both None: any device. head_dims: sizes it takes,
    None for all. any_dtype: whether it computes in the model's precision, not in 16 bits. masks: whether it honours
    masks. get: how a user gets it. extra: any other reason. ends: the option that runs on the first and last step
    instead.
    """

    runs: str
    make: Callable[[AttentionSpec], Attention]
    exports: tuple[packages.Export, ...] = ()
    least: Capability | None = None
    only: tuple[Capability, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    any_dtype: bool = False
    masks: bool = False
    get: str = ""
    extra: Callable[[AttentionSpec], str | None] = lambda spec: None
    ends: str | None = None

    def reason(self, spec: AttentionSpec) -> str | None:
        """Why it cannot run, None where it can. Cheap tests first; nothing is imported where the GPU rules it out."""
        if spec.masked and not self.masks:
            return "it takes no mask, and this model's attention needs one"
        return self._device(spec) or self._head_dim(spec) or packages.reason(self.exports) or self.extra(spec)

    def _device(self, spec: AttentionSpec) -> str | None:
        if self.least is None and self.only is None:
            return None
        wanted = f"{dotted(self.least)} or newer" if self.only is None else " or ".join(dotted(c) for c in self.only)
        have = spec.capability
        if have is None:
            return f"it needs an NVIDIA GPU of compute capability {wanted}, and the device is '{spec.device}'"
        if (self.least is not None and have < self.least) or (self.only is not None and have not in self.only):
            return f"it needs compute capability {wanted}, and this GPU has {dotted(have)}"
        return None

    def _head_dim(self, spec: AttentionSpec) -> str | None:
        if self.head_dims is None or spec.head_dim in self.head_dims:
            return None
        sizes = " or ".join(str(size) for size in self.head_dims)
        return f"it takes heads of {sizes} channels, and this model's have {spec.head_dim}"


def dotted(version: Capability) -> str:
    """(9, 0) -> 9.0."""
    return f"{version[0]}.{version[1]}"
