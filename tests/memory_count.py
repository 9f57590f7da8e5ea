"""Counts the bytes of live tensors, of models in their true sizes: the tensors have shapes but no values."""

import weakref
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wanvideo_wrapper.quantized.fp8 import Fp8MatmulLinear
from wanvideo_wrapper.wanvideo.modules import layers
from wanvideo_wrapper.wanvideo.modules.model import WanModel

GIB = 2**30


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
            if isinstance(leaf, torch.Tensor):
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
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def quantize_blocks(model):
    """FP8 weights and products in every linear layer of the block lists that a loader would quantize."""
    for stack in model.stacks().values():
        for name, layer in list(stack.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                made = Fp8MatmulLinear.quantize(layer.weight.detach(), layer.bias.detach(), torch.float8_e4m3fn)
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
