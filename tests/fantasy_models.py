"""A tiny FantasyTalking module for the tiny transformers."""

import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fantasytalking.extension import FantasyTalking

CONTEXT = 48
TALKING = FantasyTalking(context_dim=CONTEXT)


def talking_module(layers=3, features=tiny.SPEECH_DIM):
    """Keys and values of every block, and the projection of features of the tiny speech encoder."""
    whole = tiny.transformer(in_dim=16, layers=layers, extensions=(TALKING,), seed=8).tensors
    # Large enough that speech shows in the result.
    tensors = {key: value * 4 for key, value in whole.items() if TALKING.owns(key)}
    generator = torch.Generator().manual_seed(9)
    tensors["proj_model.proj.weight"] = torch.randn(CONTEXT, features, generator=generator) / features**0.5
    tensors["proj_model.norm.weight"] = 1 + 0.1 * torch.randn(CONTEXT, generator=generator)
    tensors["proj_model.norm.bias"] = 0.1 * torch.randn(CONTEXT, generator=generator)
    return tiny.Tiny(tensors=tensors)
