"""Models that run beside the transformer, part by part: the same to the bit, through two slabs of the device."""

import contextlib
import copy
from dataclasses import replace
from random import Random

import pytest
import torch
from contract import build, cases_of, inputs, placed
from swap_stand_in import CountedCopies, LateCopies
from torch import nn
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.host.residence import tensors_of
from wanvideo_wrapper.wanvideo import turns
from wanvideo_wrapper.wanvideo.own_model import in_turns
from wanvideo_wrapper.wanvideo.turns import InTurns, brought

CPU = torch.device("cpu")
CASES = cases_of("uni3c") | cases_of("controlnet")


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def beside(case, copies=None, device="cpu:0"):
    """The case's transformer, and its payload with a model of its own on a device."""
    _, model = build(case.extension, config=case.config)
    module = copy.deepcopy(case.payload.controlnet.module)
    managed, places = in_turns(module, StandaloneHost(device=device))
    if copies is not None:
        places.copies_for = lambda device: copies
    net = replace(case.payload.controlnet, managed=managed, turns=places)
    return model.to(device), replace(case.payload.to(torch.device(device), torch.float32), controlnet=net)


@torch.no_grad()
def forwards(model, payload, steps=3):
    device = next(model.parameters()).device

    return torch.stack([model(placed(inputs(payload, step=step, seed=step), device)).cpu() for step in range(steps)])


def padded(part):
    return sum(-(-t.nbytes // 256) * 256 for t in tensors_of(nn.ModuleList(part)))


def storages(module):
    return {t.untyped_storage().data_ptr() for t in tensors_of(module)}


def test_the_turns_are_all_of_the_model_and_each_part_once(case):
    module = case.payload.controlnet.module
    inside = [id(t) for parts in module.turns() for t in tensors_of(nn.ModuleList(parts))]
    assert sorted(inside) == sorted(map(id, tensors_of(module))) and len(module.turns()) == 3


@pytest.mark.parametrize("kind", [CountedCopies, LateCopies])
def test_streamed_is_whole_to_the_bit(case, kind):
    copies = kind()
    model, payload = beside(case, copies)
    with payload.controlnet.held(streamed=False):
        want = forwards(model, payload)
    assert not copies.copied
    with payload.controlnet.held(streamed=True):
        copies.log.append(("between", None))
        assert torch.equal(forwards(model, payload), want)
        # Each part once a forward, ahead of its turn; the next forward's first is on its way.
        assert copies.copied == 3 * 3 + 1 and not copies.misses()
    assert torch.equal(forwards(model, payload), want)
    assert (want - forwards(model, replace(payload, strength=0.0))).abs().max() > 1e-3


@torch.no_grad()
def test_every_byte_is_accounted_for(case):
    """Of the device two slabs of the largest turn, and of main memory one copy, exactly."""
    copies, seen = CountedCopies(), []
    model, payload = beside(case, copies)
    net = payload.controlnet
    sizes = [padded(parts) for parts in net.module.turns()]
    with net.held(streamed=True):
        assert net.turns.resident_bytes() == 2 * max(sizes) == copies.bytes_on_device()
        assert sorted(copies.pinned.values()) == sorted(sizes)
        waiting = storages(net.module)
        assert len(waiting) == len(sizes)

        def look(part, _):
            away = storages(net.module) - waiting
            seen.append((len(away), storages(part) == away, copies.bytes_on_device()))

        hooks = [part.register_forward_pre_hook(look) for parts in net.module.turns()[1:] for part in parts]
        forwards(model, payload)
        assert seen == [(1, True, 2 * max(sizes))] * 3 * len(hooks) and len(copies.slabs) == 2
        for hook in hooks:
            hook.remove()
        assert storages(net.module) == waiting
    assert not copies.pinned and not copies.bytes_on_device() and storages(net.module) == waiting
    net.turns.streamed = False
    assert net.turns.resident_bytes() == sum(t.nbytes for t in tensors_of(net.module))


class StopError(Exception):
    pass


def test_twenty_runs_stopped_anywhere_leave_nothing(case):
    copies, random = LateCopies(), Random(3)
    model, payload = beside(case, copies)
    net, left = payload.controlnet, 0

    def stop(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError

    with net.held(streamed=True):
        want, waiting = forwards(model, payload), storages(net.module)
    hooks = [part.register_forward_pre_hook(stop) for parts in net.module.turns()[1:] for part in parts]
    for _ in range(20):
        left = random.randrange(14)
        with contextlib.suppress(StopError), net.held(streamed=random.random() < 0.7):
            forwards(model, payload)
        assert not copies.pinned and not copies.bytes_on_device() and storages(net.module) == waiting
    for hook in hooks:
        hook.remove()
    assert torch.equal(forwards(model, payload), want)


def test_the_host_may_move_it_out_for_a_larger_one(case, monkeypatch):
    """Then each part is brought for its turn, whether it was there as a whole or in slabs."""
    copies, moved = CountedCopies(), []
    model, payload = beside(case, copies)
    want = forwards(model, payload)
    monkeypatch.setattr(turns, "brought", lambda parts, device: moved.append(device) or brought(parts, device))
    for streamed in (False, True):
        moved.clear()
        with payload.controlnet.held(streamed=streamed):
            assert torch.equal(forwards(model, payload, 1), want[:1])
            assert len(moved) == (0 if streamed else 3)
            payload.controlnet.turns(CPU)
            assert not copies.pinned and not copies.bytes_on_device()
            moved.clear()
            assert torch.equal(forwards(model, payload), want) and len(moved) == 9


def test_what_is_brought_waits_where_it_was(case, monkeypatch):
    module = copy.deepcopy(case.payload.controlnet.module)
    monkeypatch.setattr(turns, "kernel_ready", lambda t, strided: t.clone())
    waiting = [p.data_ptr() for p in module.parameters()]
    entrance = {id(p) for part in module.turns()[0] for p in part.parameters()}
    with pytest.raises(StopError), brought(module.turns()[0], CPU):
        for parameter, address in zip(module.parameters(), waiting, strict=True):
            assert (parameter.data_ptr() != address) == (id(parameter) in entrance)
        raise StopError
    assert [p.data_ptr() for p in module.parameters()] == waiting


def test_what_does_not_fit_waits_where_it_was(case, monkeypatch):
    """A part of which the first tensors are on the device already."""
    module, room = case.payload.controlnet.module, [2]

    def copied(tensor, strided):
        room[0] -= 1
        if not room[0]:
            raise torch.OutOfMemoryError
        return tensor.clone()

    monkeypatch.setattr(turns, "kernel_ready", copied)
    before = storages(module)
    with pytest.raises(torch.OutOfMemoryError), brought(module.turns()[0], CPU):
        pass
    assert storages(module) == before


def test_without_room_to_pin_there_is_one_notice(case, caplog):
    copies = LateCopies(pins=False)
    model, payload = beside(case, copies)
    want = forwards(model, payload)
    for _ in range(2):
        with payload.controlnet.held(streamed=True):
            assert torch.equal(forwards(model, payload), want)
    assert [r.getMessage().count("refuses to pin the memory of 3 of 3") for r in caplog.records].count(1) == 1


def test_a_failure_to_place_it_leaves_nothing(case):
    class Full(CountedCopies):
        def allocate(self, size):
            raise torch.OutOfMemoryError

    copies = Full()
    _, payload = beside(case, copies)
    with pytest.raises(torch.OutOfMemoryError), payload.controlnet.held(streamed=True):
        pass
    assert not copies.pinned


def test_where_the_device_is_where_models_wait_nothing_is_streamed(case):
    copies = CountedCopies()
    _, payload = beside(case, copies, device="cpu")
    with payload.controlnet.held(streamed=True):
        assert not copies.pinned and not copies.slabs


def test_a_model_without_turns_is_named():
    with pytest.raises(NotImplementedError, match="InTurns does not say"):
        InTurns().turns()


@pytest.mark.cuda
def test_streamed_on_cuda(case):
    """Equal to the bit; beside the transformer there are two slabs, and nothing else of the model."""
    model, payload = beside(case, device="cuda")
    net = payload.controlnet
    with net.held(streamed=False):
        want = forwards(model, payload)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    for _ in range(20):
        with net.held(streamed=True):
            slabs = torch.cuda.memory_allocated() - base
            assert 0 < slabs <= net.turns.resident_bytes() + 2 * 512
            # Not by the tensors: torch looks at the storage's first byte, which is in front of what is pinned.
            assert all(unit.pinned for unit in net.turns._units)
            assert torch.equal(forwards(model, payload), want)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == base
    assert not any(p.is_cuda for p in net.module.parameters()) and not any(unit.pinned for unit in net.turns._units)
