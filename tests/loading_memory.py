"""What loading takes of main memory, in a process that has done nothing else: `loading_memory.py FIRST FILE`.

In one that has run other tests, what these left in the allocator would hide as much, or count. FIRST: a small model,
loaded before for what is made once. FILE: the model that is measured. Prints JSON: bytes that loading it takes at most
beside what is kept ("loading"), and that reading its mapped layers leaves behind ("mapped").
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from limits import forget_peak, memory
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model


def held(model):
    """Bytes of a model's weights, each storage once."""
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}.values())


def loading(first, file):
    """Weights that are used as the file has them are mapped, and no memory before they are read."""
    options, host = LoadOptions(base_dtype=torch.bfloat16, quantization="fp8_e4m3fn"), StandaloneHost(device="cpu")
    load_wan_model(first, options, host, SYSTEMS)
    gc.collect()
    forget_peak()
    before = memory("VmRSS")
    model = load_wan_model(file, options, host, SYSTEMS)
    return memory("VmHWM") - before - held(model.transformer)


def mapped(file):
    """Of all layers of a kind, after the first has been read."""
    checkpoint = open_checkpoint(file)
    names = [name for name in checkpoint.shapes if name.endswith("ffn.0.weight")]
    checkpoint.tensor(names[0], mapped=True).sum()
    before = memory("VmRSS")
    for name in names:
        checkpoint.tensor(name, mapped=True).float().sum()
    return memory("VmRSS") - before


if __name__ == "__main__":
    # Large memory goes back to the system as it is freed.
    ctypes.CDLL(None).mallopt(-3, 2**17)
    first, file = map(Path, sys.argv[1:])
    sys.stdout.write(json.dumps({"loading": loading(first, file), "mapped": mapped(file)}))
