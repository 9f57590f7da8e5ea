import torch
from contract import Case
from wanvideo_wrapper.flashvsr.extension import FlashVsr, LowQuality

FRAMES = torch.rand(1, 3, 12, 32, 32) * 2 - 1


def restored(strength):
    return LowQuality(FRAMES, torch.tensor(strength))


CASES = {
    "flashvsr": Case(
        FlashVsr(hidden=(8, 12), layers=2),
        restored(0.8),
        restored(0.0),
        changed=lambda step: restored(0.1 * step + 0.3),
    )
}
