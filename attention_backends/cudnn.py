"""Self-attention in FP8 by cuDNN's fused kernel, through the package `nvidia-cudnn-frontend`.

q, k, v, the probabilities and the result are E4M3, sums are float32. Nothing is kept from one call to the next but
compiled graphs. On Hopper cuDNN gives the result in FP8 only: an output projection in FP8 reads it as it is, anything
else gets it expanded.

Source of the calls: the samples and `docs/operations/Attention.md` of NVIDIA/cudnn-frontend.
"""

from __future__ import annotations

import atexit
import functools
import threading
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import op_name
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.norm_rope_fp8 import expand_fp8
from ..tensor_layout import check_entry, kernel_ready
from . import packages
from .contract import Backend, capability, dotted
from .fp8 import Fp8Attention, Quantized, first_run, rotation_reason

PACKAGE = "cudnn"
LEAST_CAPABILITY = (9, 0)
# Older ones give wrong results for token counts that are no multiple of 128 (pytorch/pytorch issue 169849).
LEAST_CUDNN = 91501
# Probabilities before they are normalized are at most 1; a power of two below 448 leaves their digits alone.
PROBABILITY_SCALE = 256.0
# Keys of its tile. Where they do not fill the last one, the kernel takes an eighth longer.
TILE = 256
# Zeros may be one key in so many. Keys are shifted by their mean, so that the score of a zero is a query's mean score,
# and by Jensen's inequality zeros together weigh no more than their share: here less than bfloat16 rounds off.
LEAST_KEYS = 256
GRAPHS = 64
INPUTS = ("q", "k", "v", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
OUTPUTS = ("o", "amax_s", "amax_o")


@dataclass(frozen=True)
class CudnnFp8(Fp8Attention[Quantized]):
    """cuDNN's FP8 attention; its result is E4M3 with v's scale, which fits: no result is larger than the largest of
    v, which it averages."""

    name: str = "cudnn_fp8"

    def room(self, keys: int) -> int:
        """Up to a multiple of the kernel's tile, where the zeros weigh nothing."""
        filled = -(-keys // TILE) * TILE
        return filled if (filled - keys) * LEAST_KEYS <= keys else keys

    def attend(self, q: Quantized, k: Quantized, v: Quantized) -> Quantized:
        """The kernel's call."""
        return _sdpa_fp8(q[0], k[0], v[0], q[1], k[1], v[1]), v[1]

    def wide(self, result: Quantized, dtype: torch.dtype) -> Tensor:
        """Expanded."""
        return expand_fp8(*result, dtype)

    def rows(self, result: Quantized, dtype: torch.dtype) -> Fp8Rows:
        """As it is."""
        values, scale = result[0].flatten(2), result[1]
        return Fp8Rows(values, scale.expand(*values.shape[:2], 1).contiguous(), values.shape[-1], dtype)


def why_not(device: torch.device, head_dim: int) -> str | None:
    """Why it cannot run there with heads of that size; None where it can.

    On a GPU a small one is run, and waited for.
    """
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    have = capability(device)
    if have is None:
        return "it needs an NVIDIA GPU, and this is one of another maker"
    if have < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {dotted(have)}, and it needs 9.0 (Hopper) or newer"
    return rotation_reason(head_dim) or _package_reason() or first_run(CudnnFp8(), device, head_dim)


CUDNN_FP8 = Backend(
    runs="cuDNN's FP8 attention, with norm, position and rounding of q and k in one pass",
    make=lambda spec: CudnnFp8(),
    any_dtype=True,
    fused=True,
    extra=lambda spec: why_not(spec.device, spec.head_dim),
    get="pip install nvidia-cudnn-frontend, on Hopper or newer",
)


def _package_reason() -> str | None:
    # In a process of its own first: a package that does not fit this Python, driver or cuDNN may crash.
    why = packages.trouble((PACKAGE, "pygraph"))
    if why == packages.NOT_INSTALLED:
        return "the package 'nvidia-cudnn-frontend' is not installed; pip install nvidia-cudnn-frontend"
    if why is not None:
        return f"the package 'nvidia-cudnn-frontend' cannot be imported: {why}"
    try:
        version = _cudnn().backend_version()
    # Whatever else it does here (another copy of the library is loaded already) is the reason.
    except Exception as error:
        return f"the package 'nvidia-cudnn-frontend' cannot be imported: {type(error).__name__}: {error}"
    if version < LEAST_CUDNN:
        return (
            f"cuDNN {version} is too old, it needs {LEAST_CUDNN} (9.15.1); use a newer PyTorch, or pip "
            "install -U nvidia-cudnn-cu13 (nvidia-cudnn-cu12 for CUDA 12)"
        )
    return None


def _cudnn() -> ModuleType:
    import cudnn

    return cudnn


@torch.library.custom_op(op_name("sdpa_fp8"), mutates_args=())
def _sdpa_fp8(q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor, scale_v: Tensor) -> Tensor:
    """q, k, v [B, L, H, D] E4M3 with scales [1] that multiply them -> [B, Lq, H, D] E4M3, with v's scale."""
    q, k, v, scale_q, scale_k, scale_v = (kernel_ready(t, strided=False) for t in (q, k, v, scale_q, scale_k, scale_v))
    check_entry("sdpa_fp8", strided=False, q=q, k=k, v=v, scale_q=scale_q, scale_k=scale_k, scale_v=scale_v)
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    descale_s, scale_s = _probability_scales(q.device)
    amax_s, amax_o = torch.empty(2, 4, device=q.device)
    tensors = (q, k, v, scale_q, scale_k, scale_v, descale_s, scale_s, scale_v.reciprocal(), out, amax_s, amax_o)
    with torch.cuda.device(q.device):
        graph = compiled_graph(q.device, tuple(q.shape), k.shape[1], threading.get_ident())
        graph.run(dict(zip(INPUTS + OUTPUTS, tensors, strict=True)))
    return out


@_sdpa_fp8.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor, scale_v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=16)
def _probability_scales(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((1,), 1 / PROBABILITY_SCALE, device=device), torch.full((1,), PROBABILITY_SCALE, device=device)


@dataclass(frozen=True)
class Graph:
    """A compiled cuDNN graph of one shape on one device, and the handle that it was built with."""

    cudnn: ModuleType
    graph: object
    handle: object
    workspace_bytes: int
    device: torch.device

    def run(self, tensors: dict[str, Tensor]) -> None:
        """Launch on torch's current stream; the workspace is torch's and free for whatever follows on that stream."""
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        workspace = torch.empty(max(self.workspace_bytes, 1), dtype=torch.uint8, device=self.device)
        identified = {uid(name): t for name, t in tensors.items()}
        self.graph.execute(identified, workspace, handle=self.handle)


def uid(name: str) -> int:
    """The number of a tensor in the graph."""
    return (INPUTS + OUTPUTS).index(name) + 1


@functools.lru_cache(maxsize=16)
def _handle(device: torch.device, thread: int) -> object:
    """cuDNN's handles belong to one device, and to one thread at a time."""
    return _cudnn().create_handle()


@functools.lru_cache(maxsize=GRAPHS)
def compiled_graph(device: torch.device, shape: tuple[int, int, int, int], keys: int, thread: int) -> Graph:
    """The graph for q of `shape` [B, Lq, H, D] and `keys` keys, all contiguous; `device` must be the current one.

    Raises ValueError where cuDNN has no kernel for it.
    """
    cudnn, handle = _cudnn(), _handle(device, thread)
    try:
        graph = declared_graph(cudnn, shape, keys, handle)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except torch.OutOfMemoryError:
        raise
    # Its errors have no common class.
    except Exception as error:
        raise ValueError(
            f"attention_mode 'cudnn_fp8' has no kernel for queries {shape} and {keys} keys on this GPU: {error}; "
            "choose another attention_mode."
        ) from error
    return Graph(cudnn, graph, handle, graph.get_workspace_size(), device)


# The package's bindings list every graph that outlives the interpreter, in a hundred lines behind a run's last one.
atexit.register(compiled_graph.cache_clear)


def declared_graph(cudnn: ModuleType, shape: tuple[int, int, int, int], keys: int, handle: object) -> object:
    """cuDNN's description of the attention; it names dimensions [B, H, L, D] and reads them where [B, L, H, D] lies."""
    batch, tokens, heads, size = shape
    number, fp8 = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=number, compute_data_type=number, handle=handle)

    def heads_of(length: int) -> dict[str, tuple[int, ...]]:
        return {"dim": (batch, heads, length, size), "stride": (length * heads * size, size, heads * size, 1)}

    one = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    lengths = {"q": tokens, "k": keys, "v": keys}
    inputs = {
        name: graph.tensor(
            uid=uid(name), data_type=fp8 if name in lengths else number,
            **(heads_of(lengths[name]) if name in lengths else one),
        )
        for name in INPUTS
    }  # fmt: skip
    out, _, *largest = graph.sdpa_fp8(**inputs, generate_stats=False, attn_scale=size**-0.5)
    layout = heads_of(tokens)
    out.set_uid(uid("o")).set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(fp8)
    for name, t in zip(OUTPUTS[1:], largest, strict=True):
        t.set_uid(uid(name)).set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(number)
    return graph
