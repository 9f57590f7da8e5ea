from pathlib import Path

import torch
from contract import Case
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.uni3c.controlnet import Uni3CControlnet, Uni3CModel, Uni3CSizes
from wanvideo_wrapper.uni3c.extension import Uni3C, Uni3CArgs
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.own_model import in_turns


def controlnet(dim=24, extra=7, layers=2, render=16):
    """A tiny controlnet for a transformer of `dim` channels."""
    config = WanConfig(dim=32, ffn_dim=48, num_heads=4, num_layers=layers, in_dim=20 + render)
    sizes = Uni3CSizes(config=config, wide=40, time_dim=dim, out_dim=dim, extra=extra, middle=16)
    module = Uni3CControlnet(sizes, sdpa()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return Uni3CModel(Path("tiny_uni3c.safetensors"), (), *in_turns(module, StandaloneHost(device="cpu")))


NET = controlnet()
RENDER = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(7))
CASES = {
    "uni3c": Case(
        Uni3C(),
        Uni3CArgs(NET, RENDER),
        Uni3CArgs(NET, RENDER, 0.0),
        lambda step: Uni3CArgs(NET, RENDER, 0.5 + 0.1 * step),
    )
}
