"""torch.compile of the transformer's blocks, in place, so that checkpoint keys never change."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..kernels import in_a_line

WAY_OUT = "disconnect compile_args, or repair what is missing (on Windows the package triton-windows)"


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


def refuse_unless_it_compiles(args: CompileArgs | None, device: torch.device) -> None:
    """Compile something small and run it, so that a missing compiler is told before the models are loaded.

    Raises ValueError, with the reason, where that fails.
    """
    reason = None if args is None else _trouble(args.backend, device)
    if reason is not None:
        raise ValueError(f"torch.compile cannot run here: {reason.rstrip('.')}. Please {WAY_OUT}.")


@functools.cache
def _trouble(backend: str, device: torch.device) -> str | None:
    try:
        fused = torch.compile(lambda x: (x * 2).sin().sum(dim=-1), backend=backend, fullgraph=True)
        fused(torch.ones(4, 4, device=device)).tolist()
    # Whatever stops it (no Triton, no C++ compiler, a folder that cannot be written) is the reason.
    except Exception as error:
        cause = _cause(error)
        # A full device says nothing of compilers.
        return None if isinstance(cause, torch.OutOfMemoryError) else in_a_line(cause)
    return None


def _cause(error: Exception) -> Exception:
    """What stopped a backend; Dynamo's own error around it says so only in some versions."""
    return getattr(error, "inner_exception", error)


@contextmanager
def compiled(stacks: Iterable[nn.ModuleList], args: CompileArgs | None) -> Iterator[None]:
    """Blocks run compiled inside the context and plain after it; compiled code is kept for the next time.

    Raises ValueError where a block cannot be compiled, and OutOfMemoryError where that needs more memory than there is.
    """
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
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = _cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = in_a_line(cause).rstrip(".")
            raise ValueError(f"The blocks cannot be compiled here: {reason}. Please {WAY_OUT}.") from error
        finally:
            for block in blocks:
                block._compiled_call_impl = None
