from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.fantasyportrait.extension import FantasyPortrait, PortraitMotion


def case(*shape):
    context = torch.randn(*shape, 10, generator=torch.Generator().manual_seed(4))
    motion = PortraitMotion(context=context, strength=0.7)
    return Case(
        FantasyPortrait(context_dim=10),
        motion,
        replace(motion, strength=0.0),
        changed=lambda step: replace(motion, strength=0.5 + 0.1 * step),
    )


CASES = {"fantasyportrait": case(1, 3, 5), "fantasyportrait_all_frames_alike": case(1, 9)}
