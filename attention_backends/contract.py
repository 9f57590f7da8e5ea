"""What a backend is, what it must know of the model, and a row of the capability table.

Shapes: B batch, L tokens, H heads, D head size, C = H * D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..kernels.fp8_rows import Fp8Rows
from . import packages

Capability = tuple[int, int]
# Makes queries, keys or values when it is called.
Projection = Callable[[], Tensor]
Span = tuple[tuple[int, int], tuple[int, int]]


class Attention(Protocol):
    """A backend: q, k, v [B, L, H, D] -> [B, L, H, D], contiguous. mask [B, H, Lq, Lk] or 1 for B, H: True allows."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Softmax attention with scale D ** -0.5. Never changes q, k or v.

        Raises ValueError for a mask that the backend cannot honour.
        """


class AttentionCall(NamedTuple):
    """Self-attention before the kernel: q, k, v [B, L, H, D].

    spans: static (query range, key range) pairs; empty means that all tokens attend to all. k_lens: how many keys of
    each batch entry count, of which the rest is padding; empty means all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spans: tuple[Span, ...] = ()
    k_lens: tuple[int, ...] = ()


class FusedAttention(ABC):
    """A backend that also takes queries and keys as the linear layers give them, to norm and turn them itself.

    Its forms are called where no extension reads or replaces q, k and v. They ask for each projection when they need
    it, so that one is freed before the next is made.
    """

    @abstractmethod
    def fused(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Tensor:
        """Projections q, k [B, L, C], v [B, L, H, D] -> [B, L, H, D].

        norm_q, norm_k: WanRMSNorm (`weight` [C], `eps`), over all heads at once; rope [L or (B, L), D/2, 2] cosine and
        sine float32.
        """

    @abstractmethod
    def fused_rows(
        self, q: Projection, k: Projection, v: Projection, norm_q: nn.Module, norm_k: nn.Module, rope: Tensor
    ) -> Fp8Rows:
        """The same as FP8 rows [B, L, C], where the output projection multiplies in FP8 and nothing else reads them."""


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
    masks. fused: whether it is a FusedAttention. get: how a user gets it. extra: any other reason. ends: the option
    that runs on the first and last step instead.
    """

    runs: str
    make: Callable[[AttentionSpec], Attention]
    exports: tuple[packages.Export, ...] = ()
    least: Capability | None = None
    only: tuple[Capability, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    any_dtype: bool = False
    masks: bool = False
    fused: bool = False
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
