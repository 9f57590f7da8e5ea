import torch
from contract import Case
from wanvideo_wrapper.one_to_all.extension import Animation, OneToAll

SYSTEM = OneToAll(control_layers=1, reference_layers=1, channels=32, pose_dim=24)
REFERENCE, EMPTY = torch.randn(1, 32, 1, 4, 4), torch.randn(1, 32, 1, 4, 4)
POSES, PREFIX = torch.randn(1, 3, 9, 32, 32), torch.randn(1, 3, 1, 32, 32)


def shown(strength, **more):
    return Animation(reference=REFERENCE, empty=EMPTY, ref_strength=torch.tensor(strength), **more)


def posed(strength):
    return Animation(poses=POSES, prefix=PREFIX, pose_strength=strength)


CASES = {
    "one_to_all": Case(
        SYSTEM, shown(0.8, poses=POSES, prefix=PREFIX),
        changed=lambda step: shown(0.3 + 0.1 * step, poses=POSES, prefix=PREFIX, pose_strength=0.5 + 0.1 * step),
    ),
    "one_to_all_poses": Case(SYSTEM, posed(0.8), posed(0.0), changed=lambda step: posed(0.3 + 0.1 * step)),
}  # fmt: skip
