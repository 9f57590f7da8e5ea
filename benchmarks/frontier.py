"""What leaving out work costs: lip-sync and PSNR of the demo's models over the share of the work that is still done.

    python benchmarks/frontier.py --methods TeaCache --json tea.json [--clips 2] [--device cuda]
    python benchmarks/frontier.py --draw steps.json tea.json ... [--plot frontier.png]

The clips are beginnings of those of `wanvideo quality`, which training has not seen; PSNR is to the videos of all steps
with dense attention, same seed. The share is counted, not timed: of forwards whose blocks ran, and for Radial Attention
of the pairs of blocks computed. On 14B, where blocks are all but a percent of the time, a forward left out saves its
time; attention left out saves that share of ATTENTION_SHARE. MagCache follows the curve of another clip, measured here,
as none is published for these models. --draw prints the table, and draws it with --plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from wanvideo_wrapper.attention_backends.radial import block_table
from wanvideo_wrapper.cache_methods.easycache import EasyCache
from wanvideo_wrapper.cache_methods.magcache import MagCache, MagCacheMemory
from wanvideo_wrapper.cache_methods.teacache import TeaCache
from wanvideo_wrapper.demo import MODELS
from wanvideo_wrapper.demo.quality import heldout
from wanvideo_wrapper.demo.quality.bench import Clip, make_clip
from wanvideo_wrapper.demo.quality.metrics import lip_sync, psnr
from wanvideo_wrapper.demo.quality.talker import STEPS, Setting, Talker
from wanvideo_wrapper.demo.sounds import FPS
from wanvideo_wrapper.host import StandaloneHost, set_host
from wanvideo_wrapper.multitalk.audio import SAMPLE_RATE
from wanvideo_wrapper.wanvideo.attention_plan import RadialSettings, with_radial
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.loading import WanVideoModel
from wanvideo_wrapper.wanvideo.step_cache import Moment, StepCache, StepMemory

# Self-attention of 14B at 832x480x81 in FP8 with cudnn_fp8, of a forward's time (docs/attention.md).
ATTENTION_SHARE = 0.58
FRAMES = 57
GRID, BLOCK, BLOCKS = (9, 8, 8), 64, 6
KEPT = {"start_step": 1, "cache_device": "main_device"}
# Whose curve MagCache follows: none of the clips that are measured.
CURVE_CLIP = 15
METHODS = ("fewer steps", "TeaCache", "EasyCache", "MagCache", "Radial Attention")
LINES = {"lip_sync": "lip-sync (correlation)", "psnr": "PSNR to all steps, dense (dB)"}


@dataclass(frozen=True, kw_only=True)
class Recorder(StepCache):
    """Leaves nothing out, and notes how large each step's change is beside that of the step before."""

    label: ClassVar[str] = "Recorder"
    curve: list[float]

    def maker(self, model: WanVideoModel) -> Callable[[torch.device], StepMemory]:
        """For any model."""
        return partial(RecorderMemory, self)


class RecorderMemory(StepMemory):
    """The size of the last change."""

    cache: Recorder
    _size: Tensor | None = None

    def blocks(self, moment: Moment, step: Step, run: Callable[[], Tensor]) -> Tensor:
        """Runs."""
        before = moment.tokens.clone()
        after = run()
        size, last = (after - before).float().norm(dim=-1), self._size if self.goes_on(step) else None
        self.cache.curve.append(1.0 if last is None else float((size / last).mean()))
        self._size = size
        return after


@dataclass(frozen=True, kw_only=True)
class MeasuredMagCache(MagCache):
    """By a curve of these very models."""

    curve: tuple[float, ...]

    def described(self, model: WanVideoModel) -> str:
        """Without the name of a published curve."""
        return self.label

    def maker(self, model: WanVideoModel) -> Callable[[torch.device], MagCacheMemory]:
        """For the model that the curve is of."""
        return partial(MagCacheMemory, self, self.curve)


def short(number: int) -> heldout.Case:
    """The beginning of a held-out clip: enough for two windows."""
    name, sound = heldout.voices()[number]
    return heldout.case(name, (sound[: FRAMES * SAMPLE_RATE // FPS],), number)


def curve_of(talker: Talker) -> tuple[float, ...]:
    """Ratio of each step's change to the one before, of one clip's first window."""
    found: list[float] = []
    with caching(talker, Recorder(curve=found, **KEPT)):
        make_clip(talker, short(CURVE_CLIP))
    return tuple(found[:STEPS])


@contextmanager
def caching(talker: Talker, cache: StepCache) -> Iterator[None]:
    """Inside, the sampler has this step cache."""
    talker.cache = {"cache_args": cache}
    try:
        yield
    finally:
        talker.cache = {}


def made(talker: Talker, clips: int) -> tuple[list[Clip], int]:
    """The clips, and how many forwards ran their blocks."""
    calls = []
    handle = talker.model.transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        return [make_clip(talker, short(number)) for number in range(clips)], len(calls)
    finally:
        handle.remove()


def caches(method: str, talker: Talker) -> dict[str, StepCache]:
    """Settings of a step cache, by name."""
    if method == "TeaCache":
        return {f"{t}": TeaCache(threshold=t, use_coefficients=False, **KEPT) for t in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)}
    if method == "EasyCache":
        return {f"{t}": EasyCache(threshold=t, **KEPT) for t in (0.02, 0.05, 0.1, 0.2, 0.4)}
    curve = curve_of(talker)
    return {f"{t}": MeasuredMagCache(threshold=t, curve=curve, **KEPT) for t in (0.02, 0.06, 0.12, 0.24, 0.5)}


def radial(talker: Talker) -> dict[str, tuple[Talker, float]]:
    """Radial Attention with some steps and blocks dense: its name, who makes the clips, what share is computed."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    made_by, model = {}, talker.model
    for steps, blocks, decay in ((0, 0, 0.2), (3, 1, 0.2), (3, 1, 1.0), (6, 2, 0.2), (9, 3, 0.2)):
        dense = {"dense": "sdpa", "dense_blocks": frozenset(range(blocks)), "dense_steps": steps}
        settings = RadialSettings(**dense, decay=decay, block=BLOCK)
        plan = with_radial(model.attention, settings, model.attention_spec)
        other = object.__new__(Talker)
        other.__dict__.update(talker.__dict__, model=replace(model, attention=plan))
        table = block_table(GRID, tokens, BLOCK, decay, torch.device("cpu")).float().mean().item()
        sparse = (STEPS - steps) * (BLOCKS - blocks) / (STEPS * BLOCKS)
        name = f"decay {decay}, {steps} steps and {blocks} blocks dense"
        made_by[name] = (other, 1 - sparse * (1 - table))
    return made_by


def measure(methods: Sequence[str], clips: int) -> list[dict[str, object]]:
    """A row a setting, the dense one first."""
    dense = Talker(Setting())
    reference, forwards = made(dense, clips)
    rows = [row("all steps, dense", "", reference, reference, forwards=1.0, attention=1.0)]

    def add(method: str, name: str, talker: Talker, attention: float = 1.0) -> None:
        found, ran = made(talker, clips)
        rows.append(row(method, name, found, reference, forwards=ran / forwards, attention=attention))

    for method in methods:
        if method == "fewer steps":
            for steps in (9, 7, 5, 4, 3):
                add(method, f"{steps}", Talker(Setting(steps=steps)))
        elif method == "Radial Attention":
            sparse = Talker(Setting(attention="radial_sage_attention"))
            for name, (talker, share) in radial(sparse).items():
                add(method, name, talker, share)
        else:
            for name, cache in caches(method, dense).items():
                with caching(dense, cache):
                    add(method, name, dense)
    return rows


def row(
    method: str, setting: str, clips: Sequence[Clip], reference: Sequence[Clip], *, forwards: float, attention: float
) -> dict[str, object]:
    """Means over the clips, the shares that ran, and the share of 14B's time that follows from them."""
    return {
        "method": method,
        "setting": setting,
        "forwards": round(forwards, 3),
        "attention": round(attention, 3),
        "time_estimated": round(forwards * (1 - ATTENTION_SHARE * (1 - attention)), 3),
        "lip_sync": round(float(np.mean([lip_sync(c.mouth, c.case.levels[0]).correlation for c in clips])), 4),
        "psnr": round(float(np.mean([psnr(a.video, b.video) for a, b in zip(clips, reference, strict=True)])), 2),
        "clips": len(clips),
    }


def joined(paths: Sequence[Path]) -> list[dict[str, object]]:
    """The rows of several files, the dense one once."""
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
    return rows[:1] + [row for row in rows if row["setting"]]


def table(rows: Sequence[dict[str, object]]) -> str:
    """For the docs."""
    names = ("method", "setting", "forwards", "attention", "time_estimated", "lip_sync", "psnr")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Both measures over the estimated share of the time, a line a method; what left nothing out has no point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    dense, others = rows[0], [row for row in rows if row["time_estimated"] < 1]
    for axes, (name, label) in zip(figure.subplots(1, len(LINES)), LINES.items(), strict=True):
        for method in METHODS:
            mine = sorted((r["time_estimated"], r[name]) for r in others if r["method"] == method)
            if mine:
                axes.plot(*zip(*mine, strict=True), marker="o", markersize=4, linewidth=1, label=method)
        if name == "lip_sync":
            axes.axhline(dense[name], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="share of the time, estimated by what was computed", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--clips", type=int, default=2, help="of 57 frames each (default: 2)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="FILE", help="files written by --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG; needs matplotlib")
    options = parser.parse_args()
    if options.draw:
        rows = joined(options.draw)
    else:
        set_host(StandaloneHost(models=MODELS, device=options.device))
        rows = measure(options.methods, options.clips)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(rows, options.plot)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
