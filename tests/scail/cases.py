import torch
from contract import Case
from wanvideo_wrapper.scail.extension import PosedCharacter, Scail

POSES, PICTURE = torch.randn(1, 16, 3, 2, 2), torch.randn(1, 16, 1, 4, 4)


def character(strength=1.0):
    return PosedCharacter(
        reference=PICTURE, reference_strength=torch.tensor([strength]), poses=POSES, pose_strength=strength
    )


CASES = {
    "scail": Case(Scail(channels=20), character(), changed=lambda step: character(0.2 * step), joins=4),
    "scail_large_poses": Case(Scail(channels=20), PosedCharacter(poses=torch.randn(1, 16, 3, 4, 4)), joins=4),
}
