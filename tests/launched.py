"""What the ranks of the launch tests do."""

import os
import signal
import time

import torch
import torch.distributed as dist
from limits import PATIENCE


def adds(folder, rank):
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    (folder / str(dist.get_rank())).write_text(f"{value:.0f} {rank.device}")
    return [f"{value:.0f}"]


def fails(folder, rank):
    if dist.get_rank() == 1:
        raise ValueError("The file is of another kind; choose another.")
    dist.barrier()


def dies(folder, rank):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def never_ends(folder, rank):
    """A first rank that looks at no signal, as one in a long step; the test stops when both are here."""
    dist.barrier()
    (folder / str(os.getpid())).touch()
    time.sleep(PATIENCE)


def differs(case, rank):
    """Of a case's velocity, from that of one process."""
    import ranked

    return [str(ranked.case_difference(case)[0])]


class Holder:
    """An actor that holds a place of a cluster."""

    def here(self):
        return os.getpid()
