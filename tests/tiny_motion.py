"""A small motion tokenizer, its file, and poses of a body that moves."""

import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.mtv_crafter.joints import deviation, mean
from wanvideo_wrapper.mtv_crafter.vqvae import MotionVqVae, VqSizes

SIZES = VqSizes(outer=32, inner=64, code=20, codes=50)


def tokenizer(seed=3):
    torch.manual_seed(seed)
    model = MotionVqVae(SIZES).eval().requires_grad_(False)
    torch.nn.init.normal_(model.vq.codebook)
    return model


def save_tokenizer(path):
    tiny.Tiny(tensors=dict(tokenizer().state_dict())).save(path, torch.float32)


def body(frames, seed=5):
    """[frames, 24, 3] in mm."""
    generator = torch.Generator().manual_seed(seed)
    return mean() + 0.2 * deviation() * torch.randn(frames, 24, 3, generator=generator).cumsum(0) / frames**0.5


def poses(frames):
    return {"joints3d_nonparam": [[torch.stack((joints, joints + 300)) for joints in body(frames)]]}
