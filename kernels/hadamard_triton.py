"""Hadamard rotation of heads by butterflies in registers: no shared memory, no barrier, no matrix product.

Some neighbouring threads of a warp, LANES of them, hold a head. A vector is 8 channels, 16 bytes of bfloat16; vectors
are dealt to the threads in turn, so that their loads and stores lie side by side. Tensors are [U, K]: U threads with K
numbers each, and stay that way through every step here.

A rotation of 2 ** n channels is n steps of sums and differences, over neighbours at distance 1, 2, 4 and so on. The
first is float32 and the caller's, since it has the channels as pairs. Its results, a sum and a difference, are rounded
to float16 and share a 32-bit word from then on: both go through the same further steps, one instruction for the two.
The caller's scale bounds the results by 448, and so all sums on the way.

Triton has no tensor of float16 pairs: the few instructions on words are inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

VECTOR = tl.constexpr(8)
# A thread has 1, 2, 4 or 8 vectors. Loops over them, since Triton before 3.5 takes no function that calls itself.
MOST_VECTORS_LOG2 = tl.constexpr(3)
# +1 and -1 in both halves of a word.
ONES, MINUS_ONES = tl.constexpr(0x3C003C00), tl.constexpr(-0x43FF4400)


@triton.jit
def _word(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _add(a, b):
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _subtract(a, b):
    return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _multiply_add(a, b, c):
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _fp8(word):
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f16x2 $0, $1;", "=h,r", [word], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _beside(a, b):
    """[U, K] and [U, K] -> [U, 2 K]"""
    both = tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(both, [both.shape[0], 2 * both.shape[2]])


@triton.jit
def _joined(parts):
    """[U, K] of every vector -> [U, V * K]"""
    for _ in tl.static_range(MOST_VECTORS_LOG2):
        if len(parts) > 1:
            wider = ()
            for i in tl.static_range(len(parts) // 2):
                wider += (_beside(parts[2 * i], parts[2 * i + 1]),)
            parts = wider
    return parts[0]


@triton.jit
def _parted(x, V: tl.constexpr):
    """The reverse."""
    parts = (x,)
    for _ in tl.static_range(MOST_VECTORS_LOG2):
        if len(parts) < V:
            narrower = ()
            for i in tl.static_range(len(parts)):
                halves = tl.reshape(parts[i], [parts[i].shape[0], 2, parts[i].shape[1] // 2])
                first, second = tl.split(tl.permute(halves, (0, 2, 1)))
                narrower += (first, second)
            parts = narrower
    return parts


@triton.jit
def pairs(base, V: tl.constexpr, LANES: tl.constexpr, POLICY: tl.constexpr):
    """The even and the odd channels, [U, 4 V] float32 each, of the vectors at `base` [U]."""
    evens, odds = (), ()
    column = tl.arange(0, VECTOR // 2)[None, :]
    for v in tl.static_range(V):
        place = base + v * VECTOR * LANES
        if base.dtype.element_ty == tl.bfloat16:
            word = tl.load(place.to(tl.pointer_type(tl.int32))[:, None] + column, eviction_policy=POLICY)
            even, odd = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
        elif base.dtype.element_ty == tl.float16:
            word = tl.load(place.to(tl.pointer_type(tl.int32))[:, None] + column, eviction_policy=POLICY)
            even = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            low = tl.load(place[:, None] + column, eviction_policy=POLICY)
            high = tl.load((place + VECTOR // 2)[:, None] + column, eviction_policy=POLICY)
            both = tl.permute(tl.join(low, high), (0, 2, 1)).to(tl.float32)
            even, odd = tl.split(tl.reshape(both, [low.shape[0], VECTOR // 2, 2]))
        evens, odds = evens + (even,), odds + (odd,)
    return _joined(evens), _joined(odds)


@triton.jit
def _step(x):
    """Sums and differences of neighbours, which go to the two ends of K: so the next step's neighbours meet."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return _beside(_add(first, second), _subtract(first, second))


@triton.jit
def _lane_step(x, DISTANCE: tl.constexpr):
    """The same between threads."""
    warps = tl.reshape(x, [x.shape[0] // 32, 32, x.shape[1]])
    lane = tl.arange(0, 32)[None, :, None]
    other = tl.gather(warps, tl.broadcast_to(lane ^ DISTANCE, warps.shape), 1)
    sign = tl.where((lane & DISTANCE) == 0, ONES, MINUS_ONES)
    return tl.reshape(_multiply_add(warps, tl.broadcast_to(sign, warps.shape), other), [x.shape[0], x.shape[1]])


@triton.jit
def store_rotated(sums, differences, target, inside, V: tl.constexpr, LANES: tl.constexpr):
    """All steps but the first on its results [U, 4 V], rounded to E4M3, to the vectors at `target` [U]."""
    x = _step(_step(_word(sums, differences)))
    for power in tl.static_range(5):
        if LANES >> power > 1:
            x = _lane_step(x, 1 << power)
    for power in tl.static_range(4):
        if V >> power > 1:
            x = _step(x)
    column = tl.arange(0, VECTOR // 2)[None, :]
    parts = _parted(x, V)
    for v in tl.static_range(V):
        place = (target + v * VECTOR * LANES).to(tl.pointer_type(tl.int16))
        tl.store(place[:, None] + column, _fp8(parts[v]), mask=inside[:, None])
