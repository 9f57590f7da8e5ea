"""Waiting modules run with their own weights in any order of visits, and the next one is on its way in time."""

import gc
import random

import pytest
import torch
from swap_stand_in import CountedCopies, LateCopies
from torch import nn
from wanvideo_wrapper.wanvideo.host_slabs import PAGE, HostSlab, Unit
from wanvideo_wrapper.wanvideo.swapper import Swapper

EARLY_AND_LATE = pytest.mark.parametrize("kind", [CountedCopies, LateCopies])


class Part(nn.Module):
    """Parameters and buffers of several types and odd sizes."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(7, 5 + seed % 3), nn.Linear(5 + seed % 3, 3).bfloat16())
        self.register_buffer("bytes", torch.randint(256, (13,), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.empty(0))
        self.requires_grad_(False)


def values(part):
    return [t.clone() for t in (*part.parameters(), *part.buffers())]


def same(part, wanted):
    return all(torch.equal(t, want) for t, want in zip((*part.parameters(), *part.buffers()), wanted, strict=True))


def waiting(count, copies):
    parts = [Part(seed) for seed in range(count)]
    wanted = [values(part) for part in parts]
    units = [Unit(part) for part in parts]
    for unit in units:
        unit.gather(copies)
    return parts, wanted, units


def go(swapper, parts, wanted, order, copies):
    for place in order:
        copies.log.append(("between", None))
        with swapper.visit(parts[place]):
            copies.log.append(("run", None))
            assert same(parts[place], wanted[place])
            assert all(t.data_ptr() % 256 == 0 for t in (*parts[place].parameters(), *parts[place].buffers()))


@EARLY_AND_LATE
@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 9])
def test_any_order_of_visits(kind, pins, ahead):
    copies, choose = kind(pins=pins), random.Random(ahead)
    parts, wanted, units = waiting(5, copies)
    swapper = Swapper(units, copies, ahead=ahead)
    go(swapper, parts, wanted, [choose.randrange(5) for _ in range(120)], copies)
    go(swapper, parts, wanted, list(range(5)) * 3, copies)
    swapper.close()
    assert all(same(part, want) for part, want in zip(parts, wanted, strict=True))


@EARLY_AND_LATE
@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_in_order_nothing_is_waited_for_from_the_first_forward_on(kind, pins, ahead):
    copies = kind(pins=pins)
    parts, wanted, units = waiting(6, copies)
    swapper = Swapper(units, copies, ahead=ahead)
    go(swapper, parts, wanted, range(6), copies)
    assert copies.misses() == (0 if pins else 1)
    copies.log.clear()
    copies.log += [("record", slot.released) for slot in swapper._slots]
    copies.copied = 0
    go(swapper, parts, wanted, [*range(6)] * 4, copies)
    # The first block of a step came during the last one of the step before, and each came once.
    assert copies.misses() == 0 and copies.copied == 24


PASSES = {
    "further lists between": [[0, 5, 1, 6, 2, 7, 3, 4]],
    "a skipped block": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7]],
    "three passes": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 7], [0, 2, 3, 4, 5, 6, 7]],
    "a block that runs twice": [[0, 1, 2, 1, 3, 4, 5, 6, 7]],
    "the last never runs": [[0, 1, 2, 3, 4, 5, 6]],
}


@EARLY_AND_LATE
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_an_order_is_learned_in_the_first_step(kind, passes):
    copies, step = kind(), [place for order in passes for place in order]
    parts, wanted, units = waiting(8, copies)
    swapper = Swapper(units, copies)
    go(swapper, parts, wanted, step, copies)
    before = copies.misses()
    go(swapper, parts, wanted, step, copies)
    learned = copies.misses()
    go(swapper, parts, wanted, step * 4, copies)
    # In the second step the first pass may still look like the one before it.
    assert learned - before <= len(passes) and copies.misses() == learned


def test_what_waits_unpinned_is_copied_behind_the_work_of_the_block_that_runs():
    copies = CountedCopies(pins=False)
    parts, wanted, units = waiting(4, copies)
    swapper = Swapper(units, copies)
    go(swapper, parts, wanted, [*range(4)] * 2, copies)
    kinds = [kind for kind, _ in copies.log[-10:]]
    assert kinds == ["between", "wait", "run", "record", "copy"] * 2
    pinned = CountedCopies()
    parts, wanted, units = waiting(4, pinned)
    go(Swapper(units, pinned), parts, wanted, [*range(4)] * 2, pinned)
    assert [kind for kind, _ in pinned.log[-10:]] == ["between", "wait", "copy", "run", "record"] * 2


@EARLY_AND_LATE
def test_two_slabs_of_the_largest_and_nothing_more(kind):
    copies = kind()
    parts, wanted, units = waiting(5, copies)
    swapper = Swapper(units, copies)
    identities = [[id(t) for t in unit.tensors()] for unit in units]
    go(swapper, parts, wanted, [*range(5)] * 3, copies)
    assert len(copies.slabs) == 2 and copies.bytes_on_device() == 2 * max(unit.nbytes for unit in units)
    assert identities == [[id(t) for t in unit.tensors()] for unit in units]
    swapper.close()
    gc.collect()
    assert copies.bytes_on_device() == 0


def test_a_lone_unit_comes_once():
    copies = CountedCopies()
    parts, wanted, units = waiting(1, copies)
    go(Swapper(units, copies), parts, wanted, [0] * 5, copies)
    assert copies.copied == len(copies.slabs) == 1


@EARLY_AND_LATE
@pytest.mark.parametrize("count", [2, 5])
def test_values_that_were_replaced_meanwhile(kind, count):
    """As a LoRA of changing strength replaces them, in units that are on their way already, too."""
    copies = kind()
    parts, wanted, units = waiting(count, copies)
    swapper = Swapper(units, copies)
    go(swapper, parts, wanted, [*range(count)] * 2, copies)
    stored = [part.scale.data for part in parts]
    for part, want in zip(parts, wanted, strict=True):
        part.scale.data = torch.randn(())
        want[0 if part.scale is next(part.parameters()) else [*part.parameters()].index(part.scale)] = (
            part.scale.clone()
        )
    changed = [part.scale.data_ptr() for part in parts]
    go(swapper, parts, wanted, [*range(count)] * 2, copies)
    assert changed == [part.scale.data_ptr() for part in parts]
    for part, value in zip(parts, stored, strict=True):
        part.scale.data = value
    wanted = [values(part) for part in parts]
    go(swapper, parts, wanted, [*range(count)] * 2, copies)


@EARLY_AND_LATE
def test_after_an_error_weights_wait_as_before(kind):
    copies = kind()
    parts, wanted, units = waiting(4, copies)
    addresses = [[t.data_ptr() for t in unit.tensors()] for unit in units]
    swapper = Swapper(units, copies)
    go(swapper, parts, wanted, [0, 1], copies)
    with pytest.raises(KeyError), swapper.visit(parts[2]):
        raise KeyError
    assert addresses == [[t.data_ptr() for t in unit.tensors()] for unit in units]
    go(swapper, parts, wanted, [0, 1, 2, 3, 0, 1, 2, 3], copies)


@EARLY_AND_LATE
def test_visits_inside_of_visits(kind):
    copies = kind()
    parts, wanted, units = waiting(4, copies)
    swapper = Swapper(units, copies)
    with swapper.visit(parts[0]):
        with swapper.visit(parts[2]), swapper.visit(parts[0]):
            assert same(parts[0], wanted[0]) and same(parts[2], wanted[2])
            with pytest.raises(RuntimeError, match="More than 2"), swapper.visit(parts[3]):
                pass
        assert same(parts[0], wanted[0])
        with swapper.visit(nn.Linear(2, 2)):
            pass
    go(swapper, parts, wanted, [0, 1, 2, 3], copies)


@pytest.mark.parametrize("strided", [False, True])
def test_tensors_share_a_slab_at_multiples_of_256_bytes(strided):
    tensors = [torch.randn(5, 7), torch.randn(3).double(), torch.tensor(3), torch.randn(2, 4, 65).bfloat16()]
    if strided:
        tensors = [t.transpose(0, -1) if t.dim() else t for t in tensors]
    before = [t.clone() for t in tensors]
    slab = HostSlab(tensors)
    assert [slab.offset(t) for t in tensors] == [0, 256, 512, 768]
    assert slab.memory.nbytes == 768 + 5 * 256 and slab.memory.data_ptr() % PAGE == 0
    assert all(torch.equal(t, b) and t.is_contiguous() for t, b in zip(tensors, before, strict=True))
    assert slab.offset(torch.randn(3)) is None and slab.offset(tensors[0][1:]) is None


def test_pinned_memory_is_exact_and_goes_with_its_slab():
    copies = CountedCopies()
    _, _, units = waiting(3, copies)
    wanted = sum(-(-t.nbytes // 256) * 256 for unit in units for t in unit.tensors())
    assert sum(copies.pinned.values()) == wanted == sum(unit.nbytes for unit in units)
    for unit in units:
        unit.gather(copies)
    assert len(copies.pinned) == 3
    units[0].release()
    units[0].release()
    assert len(copies.pinned) == 2 and not units[0].pinned
    units[0].gather(copies)
    assert len(copies.pinned) == 3
    del units, unit
    gc.collect()
    assert not copies.pinned


def test_tensors_that_join_get_a_slab_of_their_own_and_the_rest_stays():
    copies = CountedCopies()
    parts, wanted, units = waiting(1, copies)
    addresses = [t.data_ptr() for t in units[0].tensors()]
    parts[0].layers[0].lora = nn.Parameter(torch.randn(3, 5), requires_grad=False)
    wanted = [values(parts[0])]
    units[0].gather(copies)
    assert len(units[0].slabs) == len(copies.pinned) == 2
    go(Swapper(units, copies), parts, wanted, [0, 0], copies)
    units[0].release(keep=1)
    assert len(units[0].slabs) == len(copies.pinned) == 1 and same(parts[0], wanted[0])
    del parts[0].layers[0].lora
    assert [t.data_ptr() for t in units[0].tensors()] == addresses
