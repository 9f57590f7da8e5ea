"""Diffusers' Wan transformer with the weights of a model of ours: the reference for systems that change its inputs."""

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel

TEXT_DIM, TEXT_LEN = 20, 6


def config(in_dim=16, **changes):
    """Two blocks whose patch embedding has more inputs than outputs, so that any token can be made of latents."""
    sizes = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=TEXT_DIM, text_len=TEXT_LEN)
    return WanConfig(**{**sizes, "in_dim": in_dim, **changes})


def randomized(model, seed=0):
    """The model with random weights, those of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near_one = float("norm" in name and name.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + near_one)
    return model.eval().requires_grad_(False)


def published(model: WanModel, *systems: str) -> WanTransformer3DModel:
    """Diffusers' form of the base model; systems: beginnings of keys that it does not have."""
    sizes = model.config
    reference = WanTransformer3DModel(
        num_attention_heads=sizes.num_heads, attention_head_dim=sizes.head_dim, in_channels=sizes.in_dim,
        out_channels=sizes.out_dim, text_dim=sizes.text_dim, freq_dim=sizes.freq_dim, ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
    ).eval().requires_grad_(False)  # fmt: skip
    own = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(systems or ("-",))}
    reference.load_state_dict(convert_wan_transformer_to_diffusers(own))
    return reference


def velocity(reference, latents, inputs, timestep=None):
    """Of latents [B, in_dim, F, H, W] under the prompts of `inputs`, and its timesteps or others, one a token."""
    text = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, TEXT_LEN - t.shape[0])) for t in inputs.text])
    return reference(latents, inputs.timestep if timestep is None else timestep, text, return_dict=False)[0]


def latents_of_tokens(model, tokens, grid):
    """Latents [1, in_dim, F, H, W] whose patches the model embeds as these tokens [1, L, C]."""
    weight = model.patch_embedding.weight.flatten(1).double()
    assert torch.linalg.matrix_rank(weight) == weight.shape[0]
    patches = (tokens[0].double() - model.patch_embedding.bias) @ torch.linalg.pinv(weight).T
    cells = patches.reshape(*grid, model.config.in_dim, 2, 2).permute(3, 0, 1, 4, 2, 5)
    return cells.reshape(1, model.config.in_dim, grid[0], 2 * grid[1], 2 * grid[2]).float()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()
