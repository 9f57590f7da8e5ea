"""What the ranks of the launch tests do."""

import os
import signal
import time

import torch
import torch.distributed as dist


def adds(folder, rank):
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    (folder / str(dist.get_rank())).write_text(f"{value:.0f} {rank.device}")


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
    (folder / str(dist.get_rank())).touch()
    time.sleep(60)
