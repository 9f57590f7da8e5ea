from pathlib import Path

import torch
from contract import Case
from wanvideo_wrapper.controlnet.controlnet import ControlnetModel, ControlnetSizes, WanControlnet
from wanvideo_wrapper.controlnet.extension import ControlArgs, Controlnet
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.own_model import in_turns


def controlnet(dim=24, layers=2, channels=16):
    """A tiny controlnet for a transformer of `dim` channels."""
    sizes = dict(dim=32, ffn_dim=48, num_heads=4, num_layers=layers, text_dim=8)
    config = WanConfig(**sizes, in_dim=channels + 6, out_dim=channels)
    module = WanControlnet(ControlnetSizes(config=config, encoder=(3, 8, 4, 6), stride=8, out_dim=dim))
    module = module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return ControlnetModel(Path("tiny_controlnet.safetensors"), (), *in_turns(module, StandaloneHost(device="cpu")))


NET = controlnet()
VIDEO = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(8)) * 2 - 1


def args(strength):
    return ControlArgs(NET, VIDEO, strength, stride=2)


CASES = {"controlnet": Case(Controlnet(), args(1.0), args(0.0), lambda step: args(0.5 + 0.1 * step))}
