import torch
from contract import Case
from wanvideo_wrapper.unianimate.extension import Poses, UniAnimate

VIDEO = torch.rand(1, 3, 9, 32, 32)

CASES = {
    "unianimate": Case(
        UniAnimate(),
        Poses(VIDEO, strength=2.0),
        absent=Poses(VIDEO, strength=0.0),
        changed=lambda step: Poses(VIDEO, strength=0.5 * step),
    ),
}
