import torch
from contract import Case
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension

CASES = {
    "clip_image": Case(ClipImageExtension(clip_dim=16), ClipImage(torch.randn(1, 7, 16))),
    "clip_image_flf2v": Case(ClipImageExtension(clip_dim=16, positions=14), ClipImage(torch.randn(1, 14, 16))),
}
