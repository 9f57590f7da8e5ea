"""Counts the bytes of live tensors, of models in their true sizes: the tensors have shapes but no values."""

import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.attention_backends.cudnn import CudnnFp8
from wanvideo_wrapper.attention_backends.flash_fp8 import Flash3Fp8
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.controlnet.controlnet import ControlnetModel, ControlnetSizes, WanControlnet
from wanvideo_wrapper.controlnet.extension import ControlArgs, Controlnet
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.uni3c.controlnet import Uni3CControlnet, Uni3CModel, Uni3CSizes
from wanvideo_wrapper.uni3c.extension import Uni3C, Uni3CArgs
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.memory import Precision
from wanvideo_wrapper.wanvideo.modules import layers
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

GIB = 2**30
# Two blocks of the 14B model.
SIZES = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2)
AT_ONCE = 8192


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators return, from when they are made to when nobody holds them.

    now, peak: in bytes. largest: sizes of what was there at the peak.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.largest = []
        self._sizes = {}

    def ignore(self, tensors):
        """Of these nothing is counted: weights."""
        self._sizes |= {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        weakref.finalize(storage, self._forget, key).atexit = False
        if self.now > self.peak:
            self.peak, self.largest = self.now, sorted(self._sizes.values(), reverse=True)[:16]

    def _forget(self, key):
        self.now -= self._sizes.pop(key)


@contextmanager
def weightless(monkeypatch):
    """Inside, tensors have no values, gradients are off, and the model runs the kernels that it runs on a GPU."""
    monkeypatch.setattr(layers, "_runs_fused", lambda x: not torch.compiler.is_compiling())
    monkeypatch.setattr(layers, "triton_runs", lambda device: True)
    # A table from before would not be counted, and one from inside has no values.
    rope_table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
    rope_table.cache_clear()


def quantize_blocks(model):
    """FP8 weights and products in every linear layer of the block lists that a loader would quantize."""
    for stack in model.stacks().values():
        for name, layer in list(stack.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                bias = None if layer.bias is None else layer.bias.detach()
                made = Fp8MatmulLinear.quantize(layer.weight.detach(), bias, torch.float8_e4m3fn)
                setattr(stack.get_submodule(parent), leaf, made)


def shapes_of(config, extensions=(), *, attention=None, fp8=True):
    """A model of meta tensors in bfloat16; its blocks in FP8."""
    with torch.device("meta"):
        model = WanModel(config, extensions, attention).bfloat16()
        model.patch_embedding.float()
        if fp8:
            quantize_blocks(model)
    return model


def give_fake_weights(model):
    """Its parameters as tensors of the FakeTensorMode that is on; returns them."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False))
    return list(model.parameters())


def peaks(
    monkeypatch, size, *, extensions=(), payloads=lambda: (), in_dim=16, attention=None, fp8=True, spare=True,
    sizes=SIZES,
):  # fmt: skip
    """Bytes of activations at the peak, and of all parameters that are outside blocks, and of one block."""
    model = shapes_of(WanConfig(**sizes, in_dim=in_dim), extensions, attention=attention, fp8=fp8)
    block = sum(-(-p.nbytes // 256) * 256 for p in model.blocks[0].parameters())
    with weightless(monkeypatch), LiveBytes() as live:
        live.ignore(give_fake_weights(model))
        frames, height, width = 21, size[0] // 8, size[1] // 8
        given = ModelInputs(
            latents=torch.empty(1, 16, frames, height, width), timestep=torch.empty(1),
            text=(torch.empty(200, 4096, dtype=torch.bfloat16),), payloads=payloads(),
        )  # fmt: skip
        start = live.now
        with model.sparing(AT_ONCE if spare else 0):
            model(given)
    blocks = sum(p.nbytes for stack in model.stacks().values() for p in stack.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - blocks
    return live.peak - start, outside, block, frames * height * width // 4 * sizes["dim"] * 2


def talking(size):
    frames, height, width = 21, size[0] // 8, size[1] // 8
    return lambda: (
        ImageCondition(
            torch.empty(1, 16, frames, height, width, dtype=torch.bfloat16),
            torch.empty(1, 4, frames, height, width, dtype=torch.bfloat16),
        ),
        ClipImage(torch.empty(1, 257, 1280, dtype=torch.bfloat16)),
        AudioWindow(torch.empty(1, 1, 81, 5, 12, 768, dtype=torch.bfloat16), torch.empty(())),
    )


SPEECH = (
    ImageToVideo(),
    ClipImageExtension(clip_dim=1280),
    MultiTalk(features=12 * 768, intermediate_dim=512, context_tokens=32, output_dim=768, voiced=(0, 1)),
)
GOALS = {
    "480p": ((480, 832), {}, 3.2),
    "720p": ((720, 1280), {}, 4.6),
    "infinitetalk": ((768, 768), dict(extensions=SPEECH, payloads=talking((768, 768)), in_dim=36), 4.0),
}


ROUTES = {
    "fp8": (CudnnFp8(), Precision(fp8_rows=True, fused=True)),
    "fp8_flash": (Flash3Fp8(), Precision(fp8_rows=True, fused=True)),
    "fp8_sdpa": (sdpa(), Precision(fp8_rows=True)),
    "bf16": (sdpa(), Precision()),
}


def beside(model, module):
    """A model of a system's own, of two blocks, whose parts are all there; its weights are the mode's."""

    class There(model):
        def turn(self, place, device):
            return nullcontext()

    return There(Path("published.safetensors"), (), SimpleNamespace(module=module), None)


def uni3c(size):
    """As published, two blocks deep: its extension, what makes its payload, and its largest turn's bytes."""
    config = WanConfig(dim=1024, ffn_dim=8192, num_heads=16, num_layers=2, in_dim=36)
    sizes = Uni3CSizes(config=config, wide=5120, time_dim=5120, out_dim=5120, extra=7, middle=256)
    with torch.device("meta"):
        module = Uni3CControlnet(sizes, sdpa()).half()
        module.controlnet_patch_embedding.float()

    def payloads():
        give_fake_weights(module)
        return (Uni3CArgs(beside(Uni3CModel, module), torch.empty(1, 16, 21, size[0] // 8, size[1] // 8)),)

    return Uni3C(), payloads, largest_turn(module)


def controlnet(size):
    """The same of the Wan controlnet of the 14B model."""
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, in_dim=64, text_dim=4096)
    with torch.device("meta"):
        sizes = ControlnetSizes(config=config, encoder=(3, 192, 96, 48), stride=8, out_dim=5120)
        module = WanControlnet(sizes).bfloat16()

    def payloads():
        give_fake_weights(module)
        video = torch.empty(1, 3, 81, *size, dtype=torch.bfloat16)
        return (ControlArgs(beside(ControlnetModel, module), video, stride=1),)

    return Controlnet(), payloads, largest_turn(module)


def largest_turn(module):
    return max(sum(-(-p.nbytes // 256) * 256 for part in parts for p in part.parameters()) for parts in module.turns())
