"""torch.compile of the transformer's blocks, in place, so that checkpoint keys never change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class CompileArgs:
    """Settings of WanVideoTorchCompileSettings (socket WANCOMPILEARGS), as torch.compile names them."""

    backend: str = "inductor"
    fullgraph: bool = False
    mode: str = "default"
    dynamic: bool = False
    dynamo_cache_size_limit: int = 64
    dynamo_recompile_limit: int = 128
    compile_transformer_blocks_only: bool = True
    force_parameter_static_shapes: bool = False
    allow_unmerged_lora_compile: bool = False


@contextmanager
def compiled(stacks: Iterable[nn.ModuleList], args: CompileArgs | None) -> Iterator[None]:
    """Blocks run compiled inside the context and plain after it; compiled code is kept for the next time."""
    if args is None:
        yield
        return
    blocks = [block for stack in stacks for block in stack]
    mode = None if args.backend != "inductor" or args.mode == "default" else args.mode
    limits = {
        "recompile_limit": args.dynamo_recompile_limit,
        "accumulated_recompile_limit": max(args.dynamo_cache_size_limit * len(blocks), 256),
        "force_parameter_static_shapes": args.force_parameter_static_shapes,
    }
    with torch._dynamo.config.patch(limits):
        for block in blocks:
            if getattr(block, "_wan_compile_args", None) != args:
                block.compile(backend=args.backend, fullgraph=args.fullgraph, mode=mode, dynamic=args.dynamic)
                block._wan_compile_args, block._wan_compiled = args, block._compiled_call_impl
            block._compiled_call_impl = block._wan_compiled
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
