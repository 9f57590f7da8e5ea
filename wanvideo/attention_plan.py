"""Which attention backend runs in which step and block.

A plan is one backend and the exceptions to it. It is read once a forward, outside of compiled graphs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .. import attention
from ..attention import Attention, AttentionSpec, GridAttention
from ..attention_backends import probe
from ..attention_backends.radial import RadialAttention
from ..attention_backends.third_party import DTYPES, ThirdParty
from ..attention_backends.ultravico import UltraVico
from .conditioning import Step

log = logging.getLogger("wanvideo")

ALL_STEPS = (0, 2**31)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An exception: `plan` runs instead in these steps and blocks.

    steps: [start, stop) counted in the sampler's run; ends: only the first and the last step of the whole schedule;
    blocks: their indices, None for all; verbose: log each step where it applies; radial: it belongs to the settings of
    Radial Attention, and goes when those are set anew.
    """

    plan: AttentionPlan
    steps: tuple[int, int] = ALL_STEPS
    ends: bool = False
    blocks: frozenset[int] | None = None
    verbose: bool = False
    radial: bool = False

    def applies(self, step: Step) -> bool:
        """Whether it concerns any block in this step."""
        if self.ends and step.index not in (0, step.total - 1):
            return False
        return self.steps[0] <= step.in_run < self.steps[1]


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """A backend for self-attention and the exceptions, of which the first that applies counts."""

    main: Attention
    rules: tuple[Rule, ...] = ()

    def at(self, step: Step, grid: tuple[int, int, int], blocks: int) -> tuple[Attention, ...]:
        """The backend of each of the `blocks` blocks in this step, for this token grid."""
        main = self.main.on_grid(grid) if isinstance(self.main, GridAttention) else self.main
        chosen = [main] * blocks
        for rule in reversed(self.rules):
            if not rule.applies(step):
                continue
            instead = rule.plan.at(step, grid, blocks)
            concerned = [i for i in range(blocks) if rule.blocks is None or i in rule.blocks]
            for index in concerned:
                chosen[index] = instead[index]
            if rule.verbose:
                log.info("Step %d: '%s' in blocks %s.", step.in_run + 1, rule.plan.main.name, concerned)
        return tuple(chosen)

    def backends(self) -> tuple[Attention, ...]:
        """Every backend that may run."""
        return self.main, *(backend for rule in self.rules for backend in rule.plan.backends())

    def try_out(self, spec: AttentionSpec, tokens: int, batch: int = 1, *, kept: Path | None = None) -> None:
        """Try every third-party kernel of the plan on so many videos of so many tokens, in processes of their own.

        kept: the file of what ran before, which is not tried again. Raises ValueError that says what went wrong with
        the first that fails.
        """
        kernels = [backend for backend in self.backends() if isinstance(backend, ThirdParty)]
        for backend in dict.fromkeys(kernels):
            why = probe.verdict(backend.kernel, spec, tokens, batch, kept=kept)
            if why is not None:
                raise ValueError(
                    f"attention_mode '{backend.name}' cannot run on {tokens} tokens: {why}. Choose another "
                    "attention_mode, or install another build of its package."
                )

    def identity(self) -> tuple[object, ...]:
        """What tells this plan from others, in plain values: backends, their settings, and where they run."""
        settings = {field.name: getattr(self.main, field.name) for field in fields(self.main)}
        plain = {name: value for name, value in settings.items() if isinstance(value, (str, int, float, bool))}
        rules = tuple(
            (rule.plan.identity(), rule.steps, rule.ends, None if rule.blocks is None else sorted(rule.blocks))
            for rule in self.rules
        )
        return self.main.name, plain, rules

    def before(self, rule: Rule) -> AttentionPlan:
        """The same with an exception that counts before the others."""
        return replace(self, rules=(rule, *self.rules))


def plan_for(name: str, spec: AttentionSpec) -> AttentionPlan:
    """The plan behind an option of the widget. Raises ValueError, with every backend's reason, if it cannot run."""
    main, row = attention.resolve(name, spec), attention.BACKENDS[name]
    rules = () if row.ends is None else (Rule(plan=plan_for(row.ends, spec), ends=True),)
    log.info("Self-attention, '%s': %s. Cross-attention: sdpa.", name, row.runs)
    if spec.device.type == "cuda" and not row.any_dtype and spec.dtype not in DTYPES:
        log.info("Its kernel computes in bfloat16; base_precision is float32.")
    return AttentionPlan(main=main, rules=rules)


@dataclass(frozen=True, kw_only=True)
class RadialSettings:
    """Settings of WanVideoSetRadialAttention. dense: the option of these blocks and of the first steps of a run."""

    dense: str
    dense_blocks: frozenset[int]
    dense_steps: int
    decay: float
    block: int


def with_radial(plan: AttentionPlan, settings: RadialSettings, spec: AttentionSpec) -> AttentionPlan:
    """The same plan with these settings wherever Radial Attention runs, in the place of earlier ones.

    Raises ValueError where it runs nowhere or the dense option cannot run.
    """
    if not _runs(plan, RadialAttention):
        raise ValueError(
            "WanVideo Set Radial Attention needs a model with attention_mode 'radial_sage_attention': choose that in "
            "WanVideo Model Loader, or in an override before this node."
        )
    rules = tuple(
        replace(rule, plan=with_radial(rule.plan, settings, spec)) if _runs(rule.plan, RadialAttention) else rule
        for rule in plan.rules
        if not rule.radial
    )
    if not isinstance(plan.main, RadialAttention):
        return AttentionPlan(main=plan.main, rules=rules)
    sparse = replace(plan.main, decay=settings.decay, block=settings.block)
    if settings.dense == "sparse_sage_attention":
        dense = AttentionPlan(main=replace(sparse, everything=True))
    else:
        dense = plan_for(settings.dense, spec)
    blocks = Rule(plan=dense, blocks=settings.dense_blocks, radial=True)
    steps = Rule(plan=dense, steps=(0, settings.dense_steps), radial=True)
    return AttentionPlan(main=sparse, rules=(*rules, blocks, steps))


def with_ultravico(plan: AttentionPlan, alpha: float) -> AttentionPlan:
    """The same plan with this alpha wherever UltraViCo runs. Raises ValueError where it runs nowhere."""
    if not _runs(plan, UltraVico):
        raise ValueError(
            "WanVideo UltraVico Settings needs a model with attention_mode 'sageattn_ultravico': choose that in "
            "WanVideo Model Loader, or in an override before this node."
        )
    main = replace(plan.main, alpha=alpha) if isinstance(plan.main, UltraVico) else plan.main
    rules = tuple(
        replace(rule, plan=with_ultravico(rule.plan, alpha)) if _runs(rule.plan, UltraVico) else rule
        for rule in plan.rules
    )
    return AttentionPlan(main=main, rules=rules)


def _runs(plan: AttentionPlan, kind: type) -> bool:
    return any(isinstance(backend, kind) for backend in plan.backends())
