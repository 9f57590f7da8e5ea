"""The exchange by copy engines: what lies where, and what is overwritten when."""

import os
import random
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from limits import PATIENCE
from wanvideo_wrapper.distributed import copies, peer_memory
from wanvideo_wrapper.distributed.exchange import Collectives
from wanvideo_wrapper.distributed.peer_memory import PeerMemory, PeerMemoryError, boxes
from wanvideo_wrapper.distributed.sequence import SequenceShard, shares, span
from wires import Team, box_copied

HEADS, SIZE = 5, 6


@pytest.mark.parametrize(
    ("shape", "permuted"),
    [
        ((7,), (0,)),
        ((4, 3, 5), (0, 1, 2)),
        ((3, 1, 4, 5), (0, 1, 2, 3)),
        ((4, 3, 5), (2, 0, 1)),
        ((2, 3, 4, 5, 2), (0, 1, 2, 3, 4)),
    ],
)
def test_boxes_copy_what_a_tensor_copy_does(shape, permuted):
    """Parts of larger tensors, whose bytes beside them stay."""
    edges = [(random.randrange(3), random.randrange(1, 3)) for _ in shape]
    wholes = [torch.randn([first + n + last for n, (first, last) in zip(shape, edges, strict=True)]) for _ in range(2)]
    views = [whole[tuple(slice(a, a + n) for n, (a, _) in zip(shape, edges, strict=True))] for whole in wholes]
    place, part = (view.permute(permuted) for view in views)
    want = wholes[0].clone()
    want[tuple(slice(a, a + n) for n, (a, _) in zip(shape, edges, strict=True))] = views[1]
    memory = wholes[0].numpy().reshape(-1).view(np.uint8)
    box_copied(memory, place.storage_offset() * 4, place, part)
    assert torch.equal(wholes[0], want)


def test_a_frame_of_places_is_a_slice_of_a_box():
    """The shapes of 14B on two ranks: one call of the driver, in rows of 20 heads."""
    tokens, part = torch.empty(1, 21, 1560, 20, 128, device="meta"), torch.empty(1, 21, 780, 40, 128, device="meta")
    place, part = tokens[:, :, 780:], part[:, :, :, 20:]
    (box,) = boxes(tuple(place.shape), place.stride(), part.stride(), 2)
    assert box[2:] == (5120, 780, 21, 5120, 10240, 1560, 780)


def test_nothing_is_copied_of_nothing():
    assert boxes((2, 0, 3), (0, 3, 1), (3, 3, 1), 2) == ()


@pytest.mark.parametrize("size", [8, 20, 128])
@pytest.mark.parametrize(("to", "of"), [(0, 0), (0, 1), (1, 0), (3, 3), (8, 16)])
def test_own_heads_lie_where_they_belong(to, of, size):
    """Both sides begin anywhere in their storage; numbers of 16 bytes are of no use unless both sides have them."""
    whole, given = torch.zeros(2 * 3 * 4 * size + to), torch.randn(2 * 3 * 5 * size + of)
    whole, given = whole.bfloat16(), given.bfloat16()
    place, part = whole[to:].view(2, 3, 4, size)[:, :, 1:3], given[of:].view(2, 3, 5, size)[:, :, 2:4]
    want = whole.clone()
    want[to:].view(2, 3, 4, size)[:, :, 1:3] = part
    copies._copy(place, part)
    assert torch.equal(whole, want) and want.any()
    assert copies._is_wide(place) == (size % 8 == 0 and to % 8 == 0)
    assert copies._is_wide(part) == (size % 8 == 0 and of % 8 == 0)


def pause():
    time.sleep(random.random() * 6e-4)


def block(shard, tokens, in_order):
    """The four exchanges with work of any length between them; what arrived is read as late as can be."""
    arriving = []
    for t in tokens[:3]:
        arriving.append(shard.heads(shard.take(t), in_order=in_order))
        pause()
    q, k, v = (arrived() for arrived in arriving)
    pause()
    read = [t.clone() for t in (q, k, v)]
    result = shard.tokens(read[0] + 2 * read[2], heads=HEADS, in_order=in_order)
    pause()
    return (*read, result.clone())


@pytest.fixture
def small_first(monkeypatch):
    """Boxes that the tests' tensors outgrow."""
    monkeypatch.setattr(copies, "FIRST_BYTES", copies.ALIGNMENT)


@pytest.mark.usefixtures("small_first")
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_has_its_heads_and_its_tokens_block_after_block(ranks):
    """Unequal places, heads and tokens behind the video; a larger batch in between, for which the boxes grow."""
    frames, places, behind = 3, 7, 5
    length = frames * places + behind
    kinds = [(1, False), (1, True), (2, True), (2, False), (1, False), (1, True)]
    tokens = [[torch.randn(batch, length, HEADS, SIZE) for _ in range(3)] for batch, _ in kinds]
    team = Team(ranks)

    def work(rank, exchange):
        shard = SequenceShard("", rank, ranks, frames, places, behind, exchange=exchange)
        return shard, [block(shard, t, in_order) for t, (_, in_order) in zip(tokens, kinds, strict=True)]

    made = team.run(work)
    places_of = [shard.take(torch.arange(length), dim=0) for shard, _ in made]
    for rank, (shard, found) in enumerate(made):
        for (_, in_order), given, (*heads, result) in zip(kinds, tokens, found, strict=True):
            # Where the order is not asked for, the ranks' tokens lie one behind the other.
            order = torch.arange(length) if in_order else torch.cat(places_of)
            start, stop = span(shares(HEADS, ranks), rank)
            for t, arrived in zip(given, heads, strict=True):
                assert torch.equal(arrived, t[:, order, start:stop])
            assert torch.equal(result, shard.take(given[0] + 2 * given[2]))
    assert len(set(team.opened)) > 2
    assert len(team.closed) == len(team.opened) - ranks, "memory that is too small is given back"


def test_what_goes_is_held_until_it_is_there_and_no_longer():
    """A copy engine reads memory that the allocator would give away, and four tensors a block are much memory."""

    def work(rank, exchange):
        shard, array = SequenceShard("", rank, 2, 1, 8, exchange=exchange), np.random.rand(1, 4, HEADS, SIZE)
        given, seen = torch.from_numpy(array), weakref.ref(array)
        del array
        call = shard.heads(given, in_order=False)
        del given
        held = seen() is not None
        call()
        return held, seen() is None

    assert Team(2).run(work) == [(True, True)] * 2


@pytest.fixture
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


CASES = ("eager", "batch", "in order", "one block compiled")
# Ranks are forks, and this process may have begun to use CUDA, which a fork of it then cannot.
LAUNCHED = """
import copied
from functools import partial
from wanvideo_wrapper.distributed.launch import launch
try:
    print(launch({work}, count=2, device="cuda"))
except RuntimeError as error:
    print(error)
"""


def launched(work):
    """What the ranks of a process of its own show, or why they ended."""
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", LAUNCHED.format(work=work)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
def test_a_model_is_to_the_bit_what_it_is_by_collectives():
    shown = launched(f"partial(copied.compared, {CASES})")
    assert shown == str([f"{case}: Copies, equal: True, near: True" for case in CASES])


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
def test_nothing_is_overwritten_or_read_too_early():
    assert launched("copied.hurried") == "['0']"


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
def test_a_stream_that_waits_for_a_dead_rank_ends_with_its_process():
    assert launched("copied.dies").startswith("Rank 1 of 2 died (SIGKILL)")


def test_what_is_traced_goes_by_collectives(monkeypatch):
    shard = SequenceShard("", 0, 2, 3, 4, exchange=object())
    assert shard._exchange is shard.exchange
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(shard._exchange, Collectives)


def test_ranks_of_several_hosts_share_no_memory():
    memory = PeerMemory.__new__(PeerMemory)
    with pytest.raises(PeerMemoryError, match="several hosts"):
        memory._opened([("one", b""), ("another", b"")])


def unreachable(*_):
    raise PeerMemoryError("cuIpcOpenMemHandle_v2: peer access is not supported between these two devices.")


def test_the_log_says_why_heads_go_by_nccl(monkeypatch, caplog):
    caplog.set_level("INFO", "wanvideo")
    monkeypatch.setattr(copies.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(copies, "PeerMemory", unreachable)
    for _ in range(2):
        assert copies.exchange_of(None, torch.device("cuda")) is None
    (said,) = caplog.messages
    assert said.endswith("peer access is not supported between these two devices.") and "NCCL" in said


def test_a_driver_without_a_function_is_a_reason(monkeypatch):
    monkeypatch.setattr(peer_memory, "_driver", lambda: SimpleNamespace())
    with pytest.raises(PeerMemoryError, match=r"this driver has no cuStreamWriteValue32_v2\."):
        peer_memory._flagged("cuStreamWriteValue32_v2", 0, 1, SimpleNamespace(cuda_stream=0))
