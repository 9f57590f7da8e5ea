"""What two GPUs do for the tests of the exchange by copy engines."""

import os
import random
import signal
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from wanvideo_wrapper.distributed.sequence import shares, span
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.shard import ALONE
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

CONFIG = WanConfig(in_dim=16, dim=448, ffn_dim=512, num_heads=7, num_layers=4, text_dim=8, text_len=4)
STEPS = 3


class InOrder:
    """Attention that asks for the order of the sequence, as sparse ones do."""

    def on_grid(self, grid):
        return self

    def __call__(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def small_model(device):
    """Seven heads: the ranks' shares are unequal, as those of 225 places are."""
    generator = torch.Generator().manual_seed(3)
    model = WanModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False).to(device, torch.bfloat16)


def velocities(model, ranks, batch):
    """Of steps that follow each other at once: nothing waits for the GPU between them."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(4)
    latents = torch.randn(STEPS, batch, 16, 5, 30, 30, generator=generator).to(device, torch.bfloat16)
    text = tuple(torch.randn(4, 8, generator=generator).to(device, torch.bfloat16) for _ in range(batch))
    with model.shared_by(ranks), torch.no_grad():
        made = [
            model(
                ModelInputs(
                    latents=x, timestep=torch.full((batch,), 500.0, device=device), text=text, step=Step(index=i)
                )
            )
            for i, x in enumerate(latents)
        ]
    return torch.stack(made).float()


def compared(cases, rank):
    """Of the velocities by copy engines: whether those by collectives are equal, and the distance to one GPU's."""
    return [f"{case}: {_compared(case, rank)}" for case in cases]


def _compared(case, rank):
    model, ranks, batch = small_model(rank.device), rank.ranks, 2 if case == "batch" else 1
    if case == "in order":
        model.attention_plan = AttentionPlan(main=InOrder())
    if case == "one block compiled":
        model.blocks[1].compile(backend="eager", fullgraph=True)
    copied = velocities(model, ranks, batch)
    used, ranks._exchanges[1] = ranks._exchanges[1], None
    collected, alone = velocities(model, ranks, batch), velocities(model, ALONE, batch)
    ranks._exchanges[1] = used
    near = float((copied - alone).norm() / alone.norm()) < 0.02 and float(alone.std()) > 0.01
    return f"{type(used).__name__}, equal: {torch.equal(copied, collected)}, near: {near}"


def hurried(rank):
    """Blocks of any size with kernels of any length between their exchanges, against what lies where."""
    device, shared = torch.device(rank.device), random.Random(5)
    own, generator = random.Random(dist.get_rank()), torch.Generator(device).manual_seed(6)
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def pause():
        if device.type == "cuda":
            torch.cuda._sleep(own.randrange(200_000))

    for _ in range(60):
        frames, places, behind, heads = (shared.randrange(2, most) for most in (6, 90, 40, 9))
        batch, in_order = shared.randrange(1, 3), bool(shared.randrange(2))
        shard = rank.ranks.shard((frames, 1, places), frames * places + behind)
        given = torch.randn(3, batch, frames * places + behind, heads, 32, device=device, generator=generator)
        order = torch.arange(given.shape[2], device=device)
        if not in_order:
            order = torch.cat([replace(shard, rank=other).take(order, dim=0) for other in range(shard.ranks)])
        start, stop = span(shares(heads, dist.get_world_size()), dist.get_rank())
        arriving = []
        for t in given:
            pause()
            arriving.append(shard.heads(shard.take(t), in_order=in_order))
        arrived = [call() for call in arriving]
        pause()
        for t, found in zip(given, arrived, strict=True):
            wrong += (found != t[:, order, start:stop]).sum()
        result = shard.tokens(arrived[0] * 2, heads=heads, in_order=in_order)
        pause()
        wrong += (result != shard.take(given[0] * 2)).sum()
    dist.all_reduce(wrong)
    return [str(int(wrong))]


def dies(rank):
    """The second rank is killed while the first one's stream waits for what it sends."""
    shard = rank.ranks.shard((2, 1, 4), 8)
    if dist.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    shard.heads(torch.randn(1, 4, 4, 32, device=rank.device), in_order=False)()
    torch.cuda.synchronize()
