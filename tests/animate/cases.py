from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.animate.extension import Animate, Character

SIZES = Animate(channels=(4, 6), style_dim=8, motion_dim=3, hidden_dim=5, tokens=2, blocks=1, pose_dim=16)
COND, POSE, FACES = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(1, 20, 3, 4, 4), (1, 16, 2, 4, 4), (1, 3, 5, 8, 8)])
)
ONE = torch.tensor(1.0)
SEEN = Character(cond=COND, pose=POSE, faces=FACES, pose_strength=ONE, face_strength=ONE)
STRENGTHS = ("pose_strength", "face_strength")


def stronger(step):
    return replace(SEEN, **dict.fromkeys(STRENGTHS, torch.tensor(0.5 + 0.1 * step)))


# One model reads one image condition: the text length, which is the usual one, keeps HuMo from being paired with it.
OWN_CHANNELS = (("in_dim", 36), ("text_len", 4))
CASES = {
    "animate": Case(SIZES, SEEN, changed=stronger, sizes=OWN_CHANNELS, leading=1),
    "animate_poses": Case(SIZES, replace(SEEN, faces=None), sizes=OWN_CHANNELS, leading=1),
}
