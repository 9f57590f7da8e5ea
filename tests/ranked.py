"""What the ranks of the parity tests run; each function is the same on every rank."""

from dataclasses import replace

import torch

torch.manual_seed(7)  # Some cases are drawn as they are imported.

from contract import ALL_CASES, build, inputs  # noqa: E402
from wanvideo_wrapper.distributed.ranks import ProcessRanks  # noqa: E402
from wanvideo_wrapper.wanvideo.shard import ALONE  # noqa: E402

CPU = torch.device("cpu")
HEADS = 4


def built(case):
    config = replace(case.config, num_heads=HEADS)
    return build(case.extension, config=config)[1]


def one_step(model, *payloads, ranks, batch=1, channels=16):
    with model.shared_by(ranks), torch.no_grad():
        return model(inputs(*payloads, batch=batch, channels=channels))


def difference(name):
    """Largest relative difference of a case's velocity to that of one process, and its place on every rank."""
    case = ALL_CASES[name]
    model = built(case)
    alone = one_step(model, case.payload, ranks=ALONE)
    shared = one_step(model, case.payload, ranks=ProcessRanks(CPU))
    return float((shared - alone).norm() / alone.norm()), float(shared.sum())
