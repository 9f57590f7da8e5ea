"""Small networks that recognize faces for Lynx, with random weights, and their files."""

import torch
from torch import nn
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.lynx.arcface import NAME, ArcFace
from wanvideo_wrapper.lynx.resampler import Resampler, ResamplerSizes

EMBEDDING = 24


def resampler(out, seed=3):
    torch.manual_seed(seed)
    model = Resampler(ResamplerSizes(queries=4, dim=16, inner=32, heads=2, hidden=40, layers=2, embedding=EMBEDDING,
                                     out=out))  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(False)


def save_resampler(path, out):
    tiny.Tiny(tensors=dict(resampler(out).state_dict()), metadata={"wanvideo.num_heads": "2"}).save(path, torch.float32)


def arcface(seed=4):
    torch.manual_seed(seed)
    model = ArcFace(16, EMBEDDING).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def save_arcface(folder):
    state = {key: value for key, value in arcface().state_dict().items() if value.is_floating_point()}
    tiny.Tiny(tensors=state).save(folder / NAME, torch.float32)
