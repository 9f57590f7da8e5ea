import torch
from contract import Case
from wanvideo_wrapper.lynx.extension import Lynx, LynxFace


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IP = {"tokens": rand(1, 5, 10, seed=1), "without_tokens": rand(1, 5, 10, seed=2)}
PICTURE = {
    "picture": rand(1, 16, 1, 4, 4, seed=3), "without_picture": rand(1, 16, 1, 4, 4, seed=4),
    "prompt": rand(1, 3, 8, seed=5),
}  # fmt: skip


def scales(ip, ref):
    return {"ip_scale": torch.tensor(ip), "ref_scale": torch.tensor(ref)}


CASES = {
    "lynx_lite": Case(
        Lynx(ip_blocks=(0, 2), context_dim=10, bias=False), LynxFace(**IP, **scales(0.7, 1.0)),
        LynxFace(**IP, **scales(0.0, 1.0)), lambda step: LynxFace(**IP, **scales(0.5 + 0.1 * step, 1.0)),
    ),
    "lynx_full": Case(
        Lynx(ip_blocks=(0, 1, 2), context_dim=10, registers=3, ref_blocks=(0, 1, 2)),
        LynxFace(**IP, **PICTURE, **scales(0.7, 0.6)),
        changed=lambda step: LynxFace(**IP, **PICTURE, **scales(0.7, 0.1 + 0.1 * step)),
    ),
}  # fmt: skip
