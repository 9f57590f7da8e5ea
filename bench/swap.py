"""Forwards of a whole model whose blocks wait in main memory (--swap, all by default), beside resident ones.

Resident is measured before and after, so that a change of clocks shows. What the copies take alone is the floor where
they take longer than the arithmetic. The whole model is drawn first: 14B takes a minute and 28 GB of main memory.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from ..host import Host
from ..wanvideo.block_swap import BlockSwapArgs
from ..wanvideo.loading import WanVideoModel
from .clock import Call, peak_above, seconds
from .random_model import Case, inputs_of, load
from .report import Row

FORWARDS = 3
GIB = 2**30


@torch.no_grad()
def measure(case: Case, options: argparse.Namespace, host: Host) -> list[Row]:
    """Resident, swapped, resident again, and the copies alone."""
    device, layers = host.device(), case.config.num_layers
    waiting = layers if options.swap is None else options.swap
    model = load(case, layers, host)
    settings = {
        "resident": None,
        f"{waiting} blocks swapped": BlockSwapArgs(blocks_to_swap=waiting),
        "resident again": None,
    }
    rows, results = [], []
    for name, swap in settings.items():
        values, result = _run(replace(model, block_swap=swap), case, device)
        results.append(result)
        rows.append(Row(name, values))
    if device.type == "cuda":
        size = sum(p.nbytes for p in model.transformer.blocks.parameters()) * waiting // layers
        rows.append(Row("copies alone", {"s a forward": _copies(size, device)}))
    equal = float(torch.equal(results[0], results[1]))
    rows[1] = replace(rows[1], values={**rows[1].values, "equal to the bit": equal})
    base = (rows[0].values["s a forward"] + rows[2].values["s a forward"]) / 2
    return [replace(row, values={**row.values, "times as long": row.values["s a forward"] / base}) for row in rows]


def _run(model: WanVideoModel, case: Case, device: torch.device) -> tuple[dict[str, float], Tensor]:
    inputs = inputs_of(case, device)
    with model.active(model.work(case.latent_size, 1)) as transformer:
        call: Call = lambda: transformer(inputs)  # noqa: E731
        values = {"s a forward": seconds({"": call}, device, FORWARDS)[""]}
        if device.type == "cuda":
            above = torch.cuda.memory_allocated(device) / GIB
            values["GiB at the peak"] = above + peak_above(call, device)
            footprint = model.placement.footprint()
            values["GiB expected"] = footprint.peak(len(model.placement.waiting_blocks())) / GIB
        result = call().cpu()
    model.managed.release()
    return values, result


def _copies(size: int, device: torch.device) -> float:
    """Seconds that copies of so many bytes from pinned memory take with nothing beside them."""
    source = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return seconds({"": lambda: target.copy_(source, non_blocking=True)}, device)[""] * size / source.nbytes
