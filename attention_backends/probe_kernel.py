"""Import a package, or run one of its attention kernels on random tensors, in a process of its own.

`python probe_kernel.py '<json>'`: {"module": name} prints the names in the module; anything else is a kernel (`main`).

Imports nothing of this project, so that it runs wherever the pack is installed. Ends with 0 if the kernel gave finite
numbers near to torch's, with `OUT_OF_MEMORY` if it could not be tried, else with a sentence behind `REASON` on stderr.
"""

import importlib
import json
import sys
from collections.abc import Callable

import torch

OUT_OF_MEMORY = 75
# Packages write to stderr, too, some of them at exit.
REASON = "reason: "
# CUDA's own words, and those of cuBLAS and cuDNN for a device without room for their handles.
NO_ROOM = ("out of memory", "ALLOC_FAILED", "STATUS_NOT_INITIALIZED")
# Far above the error of 4-bit attention on random tensors, far below that of noise.
LARGEST_ERROR = 0.5
ROWS = 64


def load(exports: list[tuple[str, str]]) -> Callable:
    """The first of the functions that is there; else the process ends with what went wrong with each."""
    why = []
    for module, name in exports:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            why.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    sys.exit(REASON + "; ".join(why))


def names(module: str) -> None:
    """Print what is in the module; end with what its import raised, in one line."""
    try:
        found = importlib.import_module(module)
    # Packages end processes, too.
    except BaseException as error:
        sys.exit(f"\n{REASON}{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}")
    sys.stdout.write("\n".join(dir(found)))


def main(asked: dict) -> None:
    """Run the kernel as `asked`: exports, heads_first, packed, options, shape [B, L, H, D], dtype, device."""
    function = load(asked["exports"])
    batch, tokens, heads, size = asked["shape"]
    dtype = getattr(torch, asked["dtype"])
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, size, dtype=dtype, device=asked["device"]) for _ in range(3))
    if q.is_cuda:
        torch.cuda.set_device(q.device)
    first, all_k, all_v = q[:, :ROWS].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(first, all_k, all_v).transpose(1, 2).float()
    if asked["packed"]:
        starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = function(q, k, v, starts, starts, tokens, tokens, **asked["options"]).unflatten(0, (batch, tokens))
    else:
        if asked["heads_first"]:
            q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        out = function(q, k, v, **asked["options"])
        out = out[0] if isinstance(out, tuple) else out
        out = out.transpose(1, 2) if asked["heads_first"] else out
    if not bool(torch.isfinite(out).all()):
        sys.exit(f"{REASON}it gave NaN or infinite values")
    error = ((out[:, :ROWS].float() - want).norm() / want.norm()).item()
    if not error < LARGEST_ERROR:
        sys.exit(f"{REASON}its result was wrong by {error:.0%}")


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    try:
        if "module" in request:
            names(request["module"])
        else:
            main(request)
    except RuntimeError as error:
        # A device too full for this process's context, or for Triton, raises an error of another class.
        if isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in NO_ROOM):
            sys.exit(OUT_OF_MEMORY)
        raise
