"""`wanvideo doctor`: every quantization and attention option, whether it runs here, why not, and how to get it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from . import attention
from .attention import AttentionSpec
from .attention_backends import probe
from .attention_backends.third_party import ThirdParty
from .quantized.fp8 import runs_fp8
from .quantized.nvfp4 import runs_fp4
from .wanvideo.quantization import NVFP4, QUANTIZATIONS, Option

# Wan 14B's heads.
HEADS, HEAD_DIM = 40, 128


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An option of a widget. what: what it runs; reason: why it cannot run, None where it can; get: how to get it."""

    widget: str
    option: str
    what: str
    reason: str | None = None
    get: str = ""

    @property
    def runs(self) -> bool:
        """Whether it runs here."""
        return self.reason is None


def examine(device: torch.device, tokens: int = 0) -> list[Finding]:
    """Every option on this device, for heads of Wan 14B. tokens: try third-party kernels on so many; 0: do not."""
    spec = AttentionSpec(device=device, heads=HEADS, head_dim=HEAD_DIM)
    quantizations = [_quantization(name, option, device) for name, option in QUANTIZATIONS.items()]
    return [*quantizations, *(_attention(name, spec, tokens) for name in attention.ATTENTION_MODES)]


def _quantization(name: str, option: Option, device: torch.device) -> Finding:
    reason = runs_fp8(device) if option.fast else None
    return Finding(
        widget="quantization",
        option=name,
        what=_what(option, device),
        reason=reason,
        get="a GPU of compute capability 8.9 or newer, and Triton" if option.fast else "",
    )


def _what(option: Option, device: torch.device) -> str:
    if option.storage is None:
        return "what the file holds"
    stored = "NVFP4" if option.storage == NVFP4 else option.storage.upper().replace("_", " ", 1)
    scaled = ", with the file's scales" if option.scaled else ""
    if not option.fast:
        product = "products in base precision"
    elif option.storage == NVFP4:
        product = "FP4 products" if runs_fp4(device) else "FP8 products (FP4 ones need Blackwell)"
    else:
        product = "FP8 products"
    return f"{stored} weights{scaled}; {product}"


def _attention(name: str, spec: AttentionSpec, tokens: int) -> Finding:
    row = attention.BACKENDS[name]
    reason = attention.reason(name, spec)
    if reason is None and tokens:
        backend = attention.resolve(name, spec)
        if isinstance(backend, ThirdParty):
            reason = probe.verdict(backend.kernel, spec, tokens)
    return Finding(widget="attention_mode", option=name, what=row.runs, reason=reason, get=row.get)


def machine(device: torch.device) -> str:
    """The device and torch in words."""
    if device.type != "cuda":
        return f"{device}, torch {torch.__version__}"
    version = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    return f"{torch.cuda.get_device_name(device)} (compute capability {version}), torch {torch.__version__}"


def as_json(findings: Sequence[Finding], device: torch.device) -> str:
    """One JSON object: machine, options."""
    options = [{**asdict(finding), "runs": finding.runs} for finding in findings]
    return json.dumps({"machine": machine(device), "options": options}, indent=2)


def as_table(findings: Sequence[Finding], device: torch.device) -> str:
    """A table for people: what runs and, below each option that does not, why not and how to get it."""
    width = max(len(finding.option) for finding in findings)
    lines = [machine(device)]
    widget = ""
    for finding in findings:
        if finding.widget != widget:
            widget = finding.widget
            lines += ["", widget]
        lines.append(f"  {'runs' if finding.runs else 'no  '}  {finding.option:{width}}  {finding.what}")
        indent = " " * (width + 10)
        if not finding.runs:
            lines.append(f"{indent}why not: {finding.reason}")
            if finding.get:
                lines.append(f"{indent}to get it: {finding.get}")
    return "\n".join(lines)
