"""Blocks that are still on their way to the device when a run begins: each is waited for before it computes."""

import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from contract import build, inputs
from swap_stand_in import DEVICE, CountedCopies
from torch import nn
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import CancelledError, StandaloneHost, residence
from wanvideo_wrapper.host.residence import tensors_of
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.arrival import Arrival
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile

CPU = torch.device("cpu")


class SlowCopies(CountedCopies):
    """Every copy waits until it is let through; `wait` notes what the computation was made to wait for."""

    overlap = True

    def __init__(self, *, open_for=0):
        super().__init__()
        self.gate = threading.Semaphore(open_for)

    def copy(self, pairs, *, after, done):
        assert ("record", after) in self.log
        assert self.gate.acquire(timeout=60)
        super().copy(pairs, after=after, done=done)


def parts_of(count):
    parts = [nn.Linear(3, 3) for _ in range(count)]
    return {part: [(torch.full((4,), torch.nan), torch.randn(4)) for _ in range(2)] for part in parts}


def values_there(pairs):
    return all(torch.equal(target, source) for target, source in pairs)


def test_a_part_is_there_once_it_is_visited():
    parts, copies = parts_of(3), SlowCopies()
    arrival = Arrival(parts, copies)
    for part, pairs in parts.items():
        assert not values_there(pairs)
        opener = threading.Timer(0.05, copies.gate.release)
        opener.start()
        with arrival.visit(part):
            assert values_there(pairs) and copies.log[-1][0] == "wait"
        opener.join()
    with arrival.visit(nn.Linear(2, 2)):
        assert copies.log[-1] == ("wait", arrival._marks[part].arrived), "what is no part is there in any case"
    arrival.finish()


def test_in_the_end_all_are_there():
    parts, copies = parts_of(3), SlowCopies(open_for=3)
    Arrival(parts, copies).finish()
    assert all(map(values_there, parts.values())) and [kind for kind, _ in copies.log].count("wait") == 3


def test_what_stops_the_thread_is_told_to_who_waits(monkeypatch):
    def broken(self, pairs, **events):
        raise OSError("The disk has gone.")

    monkeypatch.setattr(SlowCopies, "copy", broken)
    parts, drained = parts_of(2), []
    monkeypatch.setattr(SlowCopies, "drain", lambda self: drained.append(self))
    arrival = Arrival(parts, SlowCopies())
    with pytest.raises(OSError, match="The disk has gone"), arrival.visit(list(parts)[1]):
        raise AssertionError("It has no weights.")
    assert not drained
    with pytest.raises(OSError, match="The disk has gone"):
        arrival.finish()
    assert len(drained) == 1, "copies that were issued before write to memory that is given back now"


def test_in_the_mode_of_who_began():
    with torch.inference_mode():
        parts = parts_of(1)
        Arrival(parts, SlowCopies(open_for=1)).finish()
        assert all(map(values_there, parts.values()))


@pytest.fixture
def counted(monkeypatch):
    """Tensors that were moved count as being on the device, whose name is another one for the CPU."""
    moved, point = set(), residence.Residence._point

    def pointing(self, tensor, target):
        moved.add(id(tensor))
        point(self, tensor, target)

    monkeypatch.setattr(residence.Residence, "_point", pointing)
    monkeypatch.setattr(residence, "_away", lambda tensors, device: [t for t in tensors if id(t) not in moved])
    return moved


def placed(copies):
    _, model = build()
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.overlaps = True
    return model, placement


@torch.no_grad()
def test_a_model_runs_while_its_blocks_arrive(counted):
    copies = SlowCopies()
    model, placement = placed(copies)
    want, homes = model(inputs()), [t.data_ptr() for t in tensors_of(model)]
    plain = model.visit
    placement(DEVICE)
    blocks = [tensor for block in model.blocks for tensor in tensors_of(block)]
    outside = {id(t) for t in tensors_of(model)} - {id(t) for t in blocks}
    assert counted == {id(t) for t in tensors_of(model)} and outside and not copies.copied
    for tensor in blocks:
        # Not by the tensor itself, which would count as changed on the device.
        tensor.data.fill_(torch.nan)
    with placement.swapping(DEVICE):
        assert model.visit != plain
        openers = [threading.Timer(0.05 * (i + 1), copies.gate.release) for i in range(len(model.blocks))]
        for opener in openers:
            opener.start()
        assert torch.equal(model(inputs()), want) and torch.equal(model(inputs()), want)
    assert model.visit == plain and copies.copied == len(model.blocks)
    placement.arrive()
    placement(CPU)
    assert [t.data_ptr() for t in tensors_of(model)] == homes


def test_a_model_that_is_evicted_while_its_blocks_arrive_waits_for_them(counted):
    """Its memory on the device is given back then, which copies must not write to any more."""
    copies = SlowCopies()
    model, placement = placed(copies)
    homes = [t.data_ptr() for t in tensors_of(model)]
    placement(DEVICE)
    opener = threading.Timer(0.05, copies.gate.release, (len(model.blocks),))
    opener.start()
    placement(CPU)
    assert copies.copied == len(model.blocks) and placement._arrival is None
    assert [t.data_ptr() for t in tensors_of(model)] == homes
    opener.join()


def test_only_what_is_in_main_memory_can_arrive_from_there():
    assert residence.Residence().place([torch.empty(3, device="meta")], CPU) == []


class Acquired:
    """A host that places the model, and notes whether its blocks might come later."""

    def __init__(self, placement):
        self.placement, self.overlaps = placement, []

    def acquire(self, working):
        self.overlaps.append(self.placement.overlaps)
        self.placement(DEVICE)
        return DEVICE


@pytest.mark.parametrize("ends", ["well", "cancelled"])
def test_behind_a_run_all_blocks_are_there(ends, tmp_path, counted):
    """Also where it ended before the last had come. A LoRA beside the weights may read them all before."""
    path, copies = tmp_path / "model.safetensors", SlowCopies()
    tiny.transformer(in_dim=16).save(path, torch.float32)
    loaded = load_wan_model(path, LoadOptions(base_dtype=torch.float32), StandaloneHost(device="cpu"), SYSTEMS)
    placement = loaded.placement
    placement.copies_for = lambda device: copies
    loaded = replace(loaded, managed=Acquired(placement))
    opener = threading.Timer(0.05, copies.gate.release, (len(loaded.transformer.blocks),))
    opener.start()
    with nullcontext() if ends == "well" else pytest.raises(CancelledError), loaded.active():
        assert placement._arrival is not None
        if ends == "cancelled":
            raise CancelledError("Cancelled.")
    assert copies.copied == len(loaded.transformer.blocks)
    assert placement._arrival is None and not placement.overlaps
    lora = LoraFile(path=tmp_path / "none", merge=False)
    with pytest.raises(FileNotFoundError), replace(loaded, loras=(lora,)).active():
        raise AssertionError("There is no such file.")
    assert loaded.managed.overlaps == [True, False]
    opener.join()


def test_where_blocks_do_not_come_the_model_is_in_main_memory(counted, monkeypatch):
    def broken(self, pairs, **events):
        raise OSError("The disk has gone.")

    monkeypatch.setattr(SlowCopies, "copy", broken)
    model, placement = placed(SlowCopies())
    homes = [(t.data_ptr(), t.clone()) for t in tensors_of(model)]
    placement(DEVICE)
    with pytest.raises(OSError, match="has gone"), placement.swapping(DEVICE):
        model(inputs())
    with pytest.raises(OSError, match="has gone"):
        placement.arrive()
    placement.arrive()
    for tensor, (address, value) in zip(tensors_of(model), homes, strict=True):
        assert tensor.data_ptr() == address and torch.equal(tensor, value)


def test_where_no_thread_begins_the_model_is_in_main_memory(counted, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    model, placement = placed(SlowCopies())
    homes = [t.data_ptr() for t in tensors_of(model)]
    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="new thread"):
        placement(DEVICE)
    assert placement._arrival is None and [t.data_ptr() for t in tensors_of(model)] == homes


def test_where_memory_does_not_suffice_no_block_is_left_without_values(counted, monkeypatch):
    model, placement = placed(SlowCopies())
    homes, empty_like, made = [t.data_ptr() for t in tensors_of(model)], torch.empty_like, []

    def full(tensor, **options):
        if len(made) > 20:
            raise torch.OutOfMemoryError("full")
        made.append(empty_like(tensor, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        placement(DEVICE)
    assert len(made) > 20 and [t.data_ptr() for t in tensors_of(model)] == homes


@pytest.mark.parametrize("reason", ["swapped", "not asked for", "copies are in order"])
def test_otherwise_blocks_are_there_at_once(reason, counted):
    copies = SlowCopies(open_for=100)
    model, placement = placed(copies)
    if reason == "swapped":
        placement.swap = BlockSwapArgs(blocks_to_swap=1)
    elif reason == "not asked for":
        placement.overlaps = False
    else:
        copies.overlap = False
    placement(DEVICE)
    assert placement._arrival is None and counted


@torch.no_grad()
@pytest.mark.cuda
def test_a_run_on_a_gpu_begins_before_all_blocks_are_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    tiny.transformer(in_dim=16).save(path, torch.float32)
    host = StandaloneHost(device="cuda")
    loaded = load_wan_model(path, LoadOptions(base_dtype=torch.float32), host, SYSTEMS)
    given = inputs_on(loaded, host.device())
    sent = []
    monkeypatch.setattr(Placement, "_send_blocks", noting(Placement._send_blocks, sent))
    with loaded.active() as model:
        got = model(given)
    assert len(sent) == 1
    loaded.managed.release()
    loaded.managed.acquire()
    with loaded.active() as model:
        assert torch.equal(model(given), got) and got.isfinite().all()


def noting(call, sent):
    def noted(self):
        sent.append(self)
        return call(self)

    return noted


def inputs_on(loaded, device):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, loaded.config.in_dim, 3, 8, 8, generator=generator)
    text = torch.randn(4, loaded.config.text_dim, generator=generator)
    return replace(
        inputs(), latents=latents.to(device), text=(text.to(device),), timestep=torch.tensor([500.0], device=device)
    )
