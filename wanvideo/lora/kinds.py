"""The kinds of change that a LoRA file makes to one weight, and what they are worth in float32.

N output features, K input features (with a kernel's positions, for convolutions), r the rank, factor alpha / r. A
change is a sum of

- a pair: factor * up [N, r] @ down [r, K], with LoCon's core `mid` [r, r, ...] between the two;
- LoHa: factor * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise;
- LoKr: factor * kron(w1, w2), each in full or as a product; both in full have no rank, and alpha means nothing then;
- a full difference (`diff`; ComfyUI's `w_norm`);

and of a bias (`diff_b`, `b_norm`, PEFT's bias of `up`). DoRA rescales rows or columns of weight plus change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
# (rank, whether it is a pair's) -> alpha / r: from the layer's own alpha, the file's configuration, or by default.
FactorOf = Callable[[int, bool], float]


# ComfyUI's and LyCORIS' name of DoRA's lengths, and PEFT's.
MAGNITUDES = ("dora_scale", "magnitude")
OTHER_SIZE = "it is made for"
_SHARED = ("alpha", *MAGNITUDES)


class Delta(Protocol):
    """A change of a weight at strength 1."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""

    def values(self) -> Tensor:
        """float32 [rows, columns], where the tensors are."""


class Pair(NamedTuple):
    """factor * up [N, r] @ down [r, K]."""

    down: Tensor
    up: Tensor
    factor: float

    @property
    def size(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def values(self) -> Tensor:
        return self.factor * (self.up.float() @ self.down.float())


class Hadamard(NamedTuple):
    """factor * product(first) * product(second): two matrices of low rank, multiplied elementwise."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    factor: float

    @property
    def size(self) -> tuple[int, int]:
        return _product_size(self.first)

    def values(self) -> Tensor:
        return self.factor * _product(self.first).flatten(1) * _product(self.second).flatten(1)


class Kronecker(NamedTuple):
    """factor * kron(product(first), product(second))."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    factor: float

    @property
    def size(self) -> tuple[int, int]:
        (rows, columns), (more_rows, more_columns) = _product_size(self.first), _product_size(self.second)
        return rows * more_rows, columns * more_columns

    def values(self) -> Tensor:
        # Not torch.kron, which fails for the strides that a core of rank 1 leaves behind.
        product = torch.einsum("ab,cd...->acbd...", _product(self.first), _product(self.second))
        return self.factor * product.reshape(self.size)


class Full(NamedTuple):
    """The difference itself, in the weight's shape."""

    difference: Tensor

    @property
    def size(self) -> tuple[int, int]:
        rows = self.difference.shape[0] if self.difference.dim() else 1
        return rows, self.difference.numel() // max(rows, 1)

    def values(self) -> Tensor:
        return self.difference.float().reshape(self.size)


class Magnitude(NamedTuple):
    """DoRA: the lengths that rows (or columns) of weight plus change are given.

    by_base: they are divided by the lengths of the weight alone, as ComfyUI does for rows of a `dora_scale`; PEFT's
    `lora_magnitude_vector`, and columns, by those of the sum.
    """

    lengths: Tensor
    rows: bool
    by_base: bool

    def gain(self, base: Tensor, total: Tensor) -> Tensor:
        """What multiplies `total` = base + change, both float32 [N, ...], broadcast against them."""
        axis = 0 if self.rows else 1
        others = [dim for dim in range(base.dim()) if dim != axis]
        norm = torch.linalg.vector_norm(base if self.by_base else total, dim=others, keepdim=True)
        norm = norm.clamp(min=torch.finfo(torch.float32).eps)
        return self.lengths.to(base.device).float().reshape(norm.shape) / norm


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one group of keys does to one layer or parameter, at strength 1."""

    deltas: tuple[Delta, ...] = ()
    bias: Tensor | None = None
    magnitude: Magnitude | None = None

    def delta(self, shape: torch.Size) -> Tensor:
        """The sum of the deltas, float32 in the weight's shape, before DoRA's rescaling."""
        return sum(delta.values().reshape(shape) for delta in self.deltas)

    def weight(self, shape: torch.Size, base: Callable[[], Tensor]) -> Tensor:
        """The change of the weight, float32; base: the weight that DoRA rescales, asked for only then."""
        delta = self.delta(shape)
        if self.magnitude is None:
            return delta
        weight = base().to(delta.device).float()
        total = weight + delta
        return self.magnitude.gain(weight, total) * total - weight


class Reading(NamedTuple):
    """A change, and the parts that do not belong to it with the reason, as the end of "left out: ..."."""

    change: Change
    unused: dict[str, str]


def read_change(
    parts: Parts, factor_of: FactorOf, shape: torch.Size, bias: int | None, unsound: Collection[str] = ()
) -> Reading:
    """The change of a weight of this shape, and of a bias of this size, that the parts of one group make.

    unsound: names of parts that the file has but that cannot be read; what needs them is left out. Nothing is raised
    for parts that do not fit: the reading says why they are left out.
    """
    unused: dict[str, str] = {}
    deltas = []
    magnitude = _magnitude(parts, shape)
    for names, read in _KINDS:
        present = [name for name in names if name in parts]
        if not present:
            continue
        try:
            _check_sound((*names, *_SHARED), unsound)
            delta = read(parts, factor_of)
            _check_size(delta, shape)
            _check_magnitude(parts, magnitude, shape)
        except ValueError as error:
            unused |= dict.fromkeys(present, str(error))
        else:
            deltas.append(delta)
    if not deltas:
        reason = next(iter(unused.values()), "no change belongs to it")
        unused |= dict.fromkeys((name for name in MAGNITUDES if name in parts), reason)
        magnitude = None
    total = _bias(parts, next((d for d in deltas if isinstance(d, Pair)), None), bias, unused)
    if "alpha" in parts and not deltas and total is None:
        unused["alpha"] = next(iter(unused.values()), "no change belongs to it")
    return Reading(Change(deltas=tuple(deltas), bias=total, magnitude=magnitude), unused)


def _check_sound(names: Sequence[str], unsound: Collection[str]) -> None:
    broken = next((name for name in names if name in unsound), None)
    if broken is not None:
        raise ValueError(f"its '{broken}' cannot be read")


def _check_magnitude(parts: Parts, magnitude: Magnitude | None, shape: torch.Size) -> None:
    name = next((n for n in MAGNITUDES if n in parts), None)
    if name is not None and magnitude is None:
        raise ValueError(f"its '{name}' has {parts[name].numel()} lengths, which fit no weight of {_times(shape)}")


def _check_size(delta: Delta, shape: torch.Size) -> None:
    rows, columns = delta.size
    whole, wanted = math.prod(shape), list(shape)
    if isinstance(delta, Full):
        fits = _without_ones(delta.difference.shape) == _without_ones(shape)
    else:
        fits = bool(wanted) and rows == wanted[0] and rows * columns == whole
    if not fits:
        size = tuple(delta.difference.shape) if isinstance(delta, Full) else (rows, columns)
        raise ValueError(f"{OTHER_SIZE} {' x '.join(map(str, size))} where this model has {_times(shape)}")


def _times(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def _read_pair(parts: Parts, factor_of: FactorOf) -> Pair:
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"half of its pair is missing ('{'up' if 'down' in parts else 'down'}')")
    down, up = _matrix(parts["down"]), _matrix(parts["up"])
    rank = down.shape[0]
    if rank == 0 or up[0].numel() != rank:
        raise ValueError(f"the halves of its pair have the ranks {rank} and {up[0].numel()}")
    if "mid" in parts:
        mid = _matrix(parts["mid"])
        if mid.shape[:2] != (rank, rank) or down.numel() != rank * down.shape[1]:
            raise ValueError(f"its 'lora_mid' is {_times(mid.shape)}, which fits no pair of rank {rank}")
        down = torch.einsum("nm...,mj->nj...", mid.float(), down.flatten(1).float())
    return Pair(down.flatten(1), up.flatten(1), factor_of(rank, True))


def _read_hadamard(parts: Parts, factor_of: FactorOf) -> Hadamard:
    first = _factors(parts, "hada_w1", core="hada_t1")
    second = _factors(parts, "hada_w2", core="hada_t2")
    if len(first) == 1 or len(second) == 1 or _product_size(first) != _product_size(second):
        raise ValueError("the two products of its LoHa differ in size")
    return Hadamard(first, second, factor_of(first[1].shape[0], False))


def _read_kronecker(parts: Parts, factor_of: FactorOf) -> Kronecker:
    first, second = _factors(parts, "lokr_w1"), _factors(parts, "lokr_w2", core="lokr_t2")
    if len(first) == 1 and first[0].dim() > 2:
        raise ValueError(f"'lokr_w1' is {_times(first[0].shape)}, and no matrix")
    # ComfyUI, LyCORIS: the rank is that of the last factor which has one.
    factored = next((factors for factors in (second, first) if len(factors) > 1), None)
    return Kronecker(first, second, 1.0 if factored is None else factor_of(factored[1].shape[0], False))


def _read_full(parts: Parts, factor_of: FactorOf) -> Full:
    if parts["diff"].numel() == 0:
        raise ValueError("its 'diff' is empty")
    return Full(parts["diff"])


def _factors(parts: Parts, name: str, core: str | None = None) -> tuple[Tensor, ...]:
    """A matrix in full, or its factors a, b and, where the file has it, the core between them."""
    a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if name in parts and a is None and b is None:
        return (_matrix(parts[name]),)
    if a is None or b is None or name in parts:
        raise ValueError(f"of '{name}' it has neither the whole nor both factors")
    a, b = _matrix(a), _matrix(b)
    middle = None if core is None else parts.get(core)
    if a.dim() > 2 or b.dim() > 2:
        raise ValueError(f"the factors of '{name}' are no matrices")
    if middle is None:
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"the factors of '{name}' have the ranks {a.shape[1]} and {b.shape[0]}")
        return a, b
    middle = _matrix(middle)
    if middle.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError(f"'{core}' is {_times(middle.shape)}, which fits no factors of '{name}'")
    return a, b, middle


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    factors = tuple(factor.float() for factor in factors)
    if len(factors) == 1:
        return factors[0]
    if len(factors) == 2:
        return factors[0] @ factors[1]
    a, b, core = factors
    return torch.einsum("ij...,ip,jr->pr...", core, a, b)


def _product_size(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    if len(factors) == 1:
        return factors[0].shape[0], factors[0][0].numel()
    if len(factors) == 2:
        return factors[0].shape[0], factors[1].shape[1]
    a, b, core = factors
    return a.shape[1], b.shape[1] * core.shape[2:].numel()


def _matrix(t: Tensor) -> Tensor:
    """t, which has at least rows and columns and values. Raises ValueError else."""
    if t.dim() < 2 or t.numel() == 0:
        raise ValueError(f"a part of it has the shape {tuple(t.shape)}")
    return t


def _magnitude(parts: Parts, shape: torch.Size) -> Magnitude | None:
    """None where there is none, or it does not fit."""
    name = next((n for n in MAGNITUDES if n in parts), None)
    if name is None or len(shape) < 2:
        return None
    lengths, peft = parts[name], name == "magnitude"
    rows = peft or lengths.dim() == 1 or lengths.shape[:1] == shape[:1]
    if lengths.numel() != (shape[0] if rows else shape[1]):
        return None
    return Magnitude(lengths, rows, by_base=rows and not peft)


def _bias(parts: Parts, pair: Pair | None, size: int | None, unused: dict[str, str]) -> Tensor | None:
    """The change of the bias: a difference, and what PEFT adds to `up`'s result."""
    total = None
    for name, factor in (("diff_b", 1.0), ("up_bias", None if pair is None else pair.factor)):
        if name not in parts:
            continue
        if size is None:
            unused[name] = "it changes the bias of a layer which has none"
        elif parts[name].numel() != size:
            unused[name] = f"it has {parts[name].numel()} values where the bias has {size}"
        elif factor is None:
            unused[name] = "no pair belongs to it"
        else:
            value = factor * parts[name].float().flatten()
            total = value if total is None else total + value
    return total


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Parts, FactorOf], Delta]], ...] = (
    (("down", "up", "mid"), _read_pair),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), _read_hadamard),
    (
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        _read_kronecker,
    ),
    (("diff",), _read_full),
)
