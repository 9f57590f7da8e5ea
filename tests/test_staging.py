"""Copies through pinned pieces: nothing is read before it has arrived, nothing written over before it was read."""

import pytest
import torch
from wanvideo_wrapper.host import staging
from wanvideo_wrapper.host.staging import Piece, Staging

SIZES = [1, 63, 64, 65, 128, 1000]


class Late(torch.Tensor):
    """Pinned memory of a GPU that does every copy at the last moment: when an event behind it is waited for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            Event.copies.append(args[:2])
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Event:
    copies = []

    def __init__(self):
        self.behind = []

    def record(self, stream):
        self.behind = list(Event.copies)

    def synchronize(self):
        with torch._C.DisableTorchFunctionSubclass():
            for copy in self.behind:
                if any(copy is left for left in Event.copies):
                    Event.copies[:] = [left for left in Event.copies if left is not copy]
                    copy[0].copy_(copy[1])


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(staging, "PIECE", 64)
    monkeypatch.setattr(staging, "WORTH_STAGING", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    Event.copies.clear()
    made = Staging([], torch.device("cpu"))
    made._pieces = [Piece(torch.empty(64, dtype=torch.uint8).as_subclass(Late), Event()) for _ in range(2)]
    return made


@pytest.mark.parametrize("size", SIZES)
def test_late_copies_are_waited_for(size, late):
    there, back = (torch.randn(size).to(torch.bfloat16) for _ in range(2))
    with late:
        on_device = late.copy(there)
        fetched = late.fetch(back)
        again = late.copy(back)
    assert not Event.copies
    assert torch.equal(on_device, there) and torch.equal(fetched, back) and torch.equal(again, back)


@pytest.mark.cuda
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float64])
def test_weights_arrive_whole_in_pieces(size, dtype, monkeypatch):
    monkeypatch.setattr(staging, "PIECE", 64)
    monkeypatch.setattr(staging, "WORTH_STAGING", 0)
    tensors = [torch.randn(size, device="cpu").to(dtype), torch.randn(3, size).to(dtype).t(), torch.randn(()).to(dtype)]
    with Staging(tensors, torch.device("cuda")) as copies:
        there = [copies.copy(tensor) for tensor in tensors]
        back = [copies.fetch(tensor) for tensor in there]
    for tensor, moved, returned in zip(tensors, there, back, strict=True):
        assert moved.is_cuda and torch.equal(moved.cpu().double(), tensor.double())
        assert returned.device.type == "cpu" and torch.equal(returned.double(), tensor.double())


@pytest.mark.cuda
def test_memory_that_cannot_be_pinned_is_copied_all_the_same(monkeypatch):
    empty, weight = torch.empty, torch.randn(2**20)

    def unpinned(*size, pin_memory=False, **more):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **more)

    monkeypatch.setattr(staging.torch, "empty", unpinned)
    with Staging([weight], torch.device("cuda")) as copies:
        assert torch.equal(copies.fetch(copies.copy(weight)), weight)
