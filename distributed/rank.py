"""One rank: how it meets the others, and how its work ends. Which process and host it is on, its starter decides."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..host import CancelledError
from .ranks import ProcessRanks
from .told import Tell

log = logging.getLogger("wanvideo")

COLLECTIVE_MINUTES = 30


@dataclass(frozen=True)
class Rank:
    """What the work of a rank is given.

    device: its own. cancel: set when it is to stop at its next step. tell: takes what the first rank shows; None where
    this process has a terminal for it.
    """

    device: str
    ranks: ProcessRanks
    cancel: threading.Event = field(default_factory=threading.Event)
    tell: Tell | None = None


# Returns lines, of which those of the first rank count.
Work = Callable[[Rank], Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """How a rank's work ended. failure: the reason; of a cancelled one, where its frames are."""

    shown: Sequence[str] = ()
    failure: str | None = None
    cancelled: bool = False

    def error(self) -> Exception | None:
        """What its starter raises."""
        if not self.cancelled:
            return None if self.failure is None else RuntimeError(self.failure)
        error = CancelledError("Cancelled.")
        if self.failure:
            error.add_note(self.failure)
        return error


def outcome(work: Callable[[], Sequence[str]]) -> Outcome:
    """Of work that is done here."""
    try:
        return Outcome(work())
    except CancelledError as error:
        return Outcome(failure="\n".join(_notes(error)), cancelled=True)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return Outcome(failure="\n".join((str(error), *_notes(error))))
    # A library that ends its process, too: an actor's would go on, and its starter wait for an outcome.
    except BaseException as error:
        log.exception("A rank failed.")
        return Outcome(failure="\n".join((repr(error), *_notes(error))))


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", ())


def join(rank: int, count: int, device: str, store: dist.Store) -> ProcessRanks:
    """Meet the other ranks by a store that all of them have opened."""
    own = torch.device(device)
    options: dict[str, object] = {}
    if own.type == "cuda":
        # NVLink's multicast needs rights that containers often lack, and then hangs.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.cuda.set_device(own)
        options["device_id"] = own
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(minutes=COLLECTIVE_MINUTES),
        **options,
    )
    dist.barrier()
    return ProcessRanks(own)


def meeting(folder: str, count: int) -> dist.Store:
    """Of ranks of one host, in a folder of their own."""
    return dist.FileStore(f"{folder}/store", count)
