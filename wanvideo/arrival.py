"""Weights whose memory on a GPU is there at once, and whose values come part by part beside what already runs.

The first step need not wait for the last block: a block of 14B is copied in a third of the time that one computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..host.staging import Staging
from .device_copies import Copies, Event

# A tensor's memory on the device, and the values that it is to have.
Pair = tuple[Tensor, Tensor]


class Mark(NamedTuple):
    """Of a part: set once its copies are issued, or never will be; and past once they are done."""

    issued: threading.Event
    arrived: Event


class Arrival:
    """Brings parts of a model to the device of `copies`, in their order, by a thread of its own.

    Use `visit` around each run of a part, and `finish` in the end, after errors too: until then targets and sources
    must stay. Both raise what stopped the thread.
    """

    def __init__(self, parts: Mapping[nn.Module, Sequence[Pair]], copies: Copies) -> None:
        self._copies = copies
        self._marks = {part: Mark(threading.Event(), copies.event()) for part in parts}
        self._error: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()
        # Its memory may be that of tensors which the computation issued so far still reads.
        begun = copies.event()
        copies.record(begun)
        self._thread = threading.Thread(target=self._bring, args=(parts, begun), name="weights", daemon=True)
        self._thread.start()

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        """Inside, what is issued finds the module's weights. Modules that are no part are there in any case."""
        mark = self._marks.get(module)
        if mark is not None:
            self._wait(mark)
        yield

    def finish(self) -> None:
        """All parts are there for whatever is issued from now on."""
        self._thread.join()
        if self._error is not None:
            # What was issued before still writes to targets, whose memory the caller may give to others now.
            self._copies.drain()
        for mark in self._marks.values():
            self._wait(mark)

    def _wait(self, mark: Mark) -> None:
        mark.issued.wait()
        if self._error is not None:
            raise self._error
        self._copies.wait(mark.arrived)

    def _bring(self, parts: Mapping[nn.Module, Sequence[Pair]], begun: Event) -> None:
        device = self._copies.device
        sources = [source for pairs in parts.values() for _, source in pairs]
        try:
            with (
                torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
                # Tensors that were made in this mode are written to in no other.
                torch.inference_mode(self._inference),
                Staging(sources, device) as staging,
            ):
                for part, pairs in parts.items():
                    mark = self._marks[part]
                    self._copies.copy(staging.staged(pairs), after=begun, done=mark.arrived)
                    mark.issued.set()
        # Whatever it is, the thread that waits is who can tell the user.
        except BaseException as error:
            self._error = error
        finally:
            for mark in self._marks.values():
                mark.issued.set()
