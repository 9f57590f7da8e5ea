"""Memory of a GPU that other processes of the host write into, by functions of the CUDA driver alone.

torch has no call for a strided copy by a copy engine (its own is a kernel), nor for a stream's wait for a number in
memory. Both are the driver's: cuMemcpy3DAsync, and cuStreamWriteValue32, which comes behind all that its stream wrote
before, with cuStreamWaitValue32, for which no kernel runs. The memory is shared by cuIpcGetMemHandle.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# A flag of each rank lies behind the memory, on lines of its own.
FLAG_BYTES = 128
NOTHING, TRIAL = -1, 0
TRIAL_BYTES, TRIAL_SECONDS = 1024, 5.0
LAZY_PEER_ACCESS, UNIFIED, OUT_OF_MEMORY = 1, 4, 2

_Address, _Size, _Kind = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int


class PeerMemoryError(RuntimeError):
    """Ranks cannot write into each other's memory."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


def _side(name: str) -> tuple[tuple[str, type], ...]:
    sizes = ((f"{name}{field}", _Size) for field in ("XInBytes", "Y", "Z", "LOD"))
    places = ((f"{name}{field}", _Address) for field in ("Host", "Device", "Array", "Reserved"))
    pitches = ((f"{name}{field}", _Size) for field in ("Pitch", "Height"))
    return (*sizes, (f"{name}MemoryType", _Kind), *places, *pitches)


class _Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = (*_side("src"), *_side("dst"), ("WidthInBytes", _Size), ("Height", _Size), ("Depth", _Size))


class Box(NamedTuple):
    """One copy by a copy engine, in bytes: `depth` slices of `height` rows of `width`; offsets, and of each side the
    bytes from row to row and the rows from slice to slice."""

    to: int
    of: int
    width: int
    height: int
    depth: int
    to_pitch: int
    of_pitch: int
    to_rows: int
    of_rows: int


@lru_cache(maxsize=256)
def boxes(shape: tuple[int, ...], to: tuple[int, ...], of: tuple[int, ...], itemsize: int) -> tuple[Box, ...]:
    """A copy between tensors of one shape with the strides `to` and `of`, as few boxes as it takes."""
    if 0 in shape:
        return ()
    # From the last dimension on: (count, bytes from one to the next on each side), joined where both sides go on.
    dims = [(itemsize, 1, 1)]
    for count, to_stride, of_stride in zip(*(reversed(sizes) for sizes in (shape, to, of)), strict=True):
        if count == 1:
            continue
        inner, to_inner, of_inner = dims[-1]
        step = to_stride * itemsize, of_stride * itemsize
        if step == (inner * to_inner, inner * of_inner):
            dims[-1] = inner * count, to_inner, of_inner
        else:
            dims.append((count, *step))
    (width, *_), *outer = dims
    height, to_pitch, of_pitch = outer.pop(0) if outer else (1, width, width)
    depth, to_rows, of_rows = 1, height, height
    if outer and outer[0][1] % to_pitch == outer[0][2] % of_pitch == 0:
        depth, to_slice, of_slice = outer.pop(0)
        to_rows, of_rows = to_slice // to_pitch, of_slice // of_pitch
    starts = itertools.product(*([(i * a, i * b) for i in range(count)] for count, a, b in outer))
    offsets = ((sum(a for a, _ in start), sum(b for _, b in start)) for start in starts)
    return tuple(Box(*offset, width, height, depth, to_pitch, of_pitch, to_rows, of_rows) for offset in offsets)


class PeerMemory:
    """A `Wire`, opened by all ranks of a group at once.

    Raises PeerMemoryError on all of them where one cannot reach another, and torch.OutOfMemoryError.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, size: int) -> None:
        self._group, self._device, self._size = group, device, size
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._others = [(self._rank + step) % self._ranks for step in range(1, self._ranks)]
        self._copying = torch.cuda.Stream(device)
        offers = self._of_all(self._offer)
        self._addresses = self._of_all(lambda: self._opened(offers))[self._rank]
        self._of_all(self._try)

    def _of_all(self, make: Callable[[], T]) -> list[T]:
        """What every rank makes. Where one cannot, all raise its reason: none must wait for it alone."""
        made: tuple[T | None, Exception | None]
        try:
            made = make(), None
        except (PeerMemoryError, torch.OutOfMemoryError) as error:
            made = None, error
        every: list[tuple[T, Exception | None]] = [made] * self._ranks
        dist.all_gather_object(every, made, group=self._group)
        for _, error in every:
            if error is not None:
                raise error
        return [value for value, _ in every]

    def _offer(self) -> tuple[str, bytes]:
        """The host and the handle of memory that is made here."""
        self._address = _allocated(self._size + self._ranks * FLAG_BYTES)
        whole = torch.as_tensor(_Raw(self._address, self._size + self._ranks * FLAG_BYTES), device=self._device)
        self.memory, flags = whole[: self._size], whole[self._size :]
        self._flags = flags.view(torch.int32).view(self._ranks, -1)[:, 0]
        self._flags.fill_(NOTHING)
        torch.cuda.synchronize(self._device)
        handle = _IpcHandle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), _Address(self._address))
        return platform.node(), bytes(handle.bytes)

    def _opened(self, offers: Sequence[tuple[str, bytes]]) -> list[int]:
        """Addresses of every rank's memory, as this one has it."""
        if len({host for host, _ in offers}) > 1:
            raise PeerMemoryError("they are of several hosts.")
        addresses = []
        for rank, (_, handle) in enumerate(offers):
            address = _Address(self._address)
            if rank != self._rank:
                opened = ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), ctypes.c_uint(LAZY_PEER_ACCESS)
                _call("cuIpcOpenMemHandle_v2", *opened)
            addresses.append(address.value)
        return addresses

    def _try(self) -> None:
        """A few bytes from every rank to every other: there are machines whose cards reach each other in name only."""
        places = self.memory[: self._ranks * TRIAL_BYTES].view(self._ranks, -1)
        part = torch.full((TRIAL_BYTES,), self._rank + 1, dtype=torch.uint8, device=self._device)
        wait = self.send(TRIAL, [[(places[self._rank], part)]] * self._ranks)
        end = time.monotonic() + TRIAL_SECONDS
        while bool((self._flags[self._others] != TRIAL).any()):
            if time.monotonic() > end:
                raise PeerMemoryError(f"what they sent did not arrive within {TRIAL_SECONDS:.0f} seconds.")
            time.sleep(0.001)
        wait()
        want = torch.arange(1, self._ranks + 1, device=self._device)[:, None]
        if not bool((places == want)[self._others].all()):
            raise PeerMemoryError("what arrived is not what they sent.")

    def send(self, number: int, pieces: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Callable[[], None]:
        """As `Wire` says, in the order of this device's streams."""
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        # From the next rank on, so that no two send to the same card at once.
        for target in self._others:
            for place, part in pieces[target]:
                _copy(place.data_ptr() + self._addresses[target] - self._address, place, part, self._copying)
            _flagged("cuStreamWriteValue32_v2", self._flag(target, self._rank), number, self._copying)
        ended = self._copying.record_event()

        def wait() -> None:
            reader = torch.cuda.current_stream(self._device)
            for source in self._others:
                _flagged("cuStreamWaitValue32_v2", self._flag(self._rank, source), number, reader)
            reader.wait_event(ended)

        return wait

    def _flag(self, owner: int, source: int) -> int:
        """The address of the flag that `source` sets in the memory of `owner`."""
        return self._addresses[owner] + self._size + source * FLAG_BYTES

    def close(self) -> None:
        """As `Wire` says: it goes when nobody writes any more, and nobody has it open."""
        torch.cuda.synchronize(self._device)
        self._of_all(lambda: None)
        self._of_all(self._unmap)
        _call("cuMemFree_v2", _Address(self._address))

    def _unmap(self) -> None:
        for rank in self._others:
            _call("cuIpcCloseMemHandle", _Address(self._addresses[rank]))


class _Raw:
    """Bytes at an address, as torch takes them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _allocated(size: int) -> int:
    address = _Address()
    status = _driver().cuMemAlloc_v2(ctypes.byref(address), _Size(size))
    if status == OUT_OF_MEMORY:
        torch.cuda.empty_cache()
        status = _driver().cuMemAlloc_v2(ctypes.byref(address), _Size(size))
    if status == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"The GPU has no {size / 1e9:.1f} GB left for what other GPUs send to it.")
    _check(status, "cuMemAlloc_v2")
    return address.value


def _copy(address: int, place: Tensor, part: Tensor, stream: torch.cuda.Stream) -> None:
    """`part` to the address, laid out as `place`."""
    for box in boxes(tuple(place.shape), place.stride(), part.stride(), part.itemsize):
        copy = _Copy3D(
            srcMemoryType=UNIFIED,
            srcDevice=part.data_ptr() + box.of,
            srcPitch=box.of_pitch,
            srcHeight=box.of_rows,
            dstMemoryType=UNIFIED,
            dstDevice=address + box.to,
            dstPitch=box.to_pitch,
            dstHeight=box.to_rows,
            WidthInBytes=box.width,
            Height=box.height,
            Depth=box.depth,
        )
        _call("cuMemcpy3DAsync_v2", ctypes.byref(copy), _Address(stream.cuda_stream))


def _flagged(name: str, address: int, number: int, stream: torch.cuda.Stream) -> None:
    """A stream's write of a number, or its wait for this number or a higher one, modulo 2^32."""
    _call(name, _Address(stream.cuda_stream), _Address(address), ctypes.c_uint32(number), ctypes.c_uint(0))


def _call(name: str, *arguments: object) -> None:
    function = getattr(_driver(), name, None)
    if function is None:
        raise PeerMemoryError(f"this driver has no {name}.")
    _check(function(*arguments), name)


def _check(status: int, name: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise PeerMemoryError(f"{name}: {(text.value or b'unknown error').decode()}.")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise PeerMemoryError(f"{error}.") from error
