from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.fantasytalking.extension import FantasyTalking, FantasyTalkingEmbeds


def case(*shape, lengths):
    context = torch.randn(*shape, 10, generator=torch.Generator().manual_seed(3))
    speech = FantasyTalkingEmbeds(context=context, lengths=torch.tensor(lengths), scale=0.7)
    return Case(
        FantasyTalking(context_dim=10),
        speech,
        replace(speech, scale=0.0),
        changed=lambda step: replace(speech, scale=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)[step]),
    )


CASES = {
    "fantasytalking": case(1, 3, 5, lengths=[[3, 5, 4]]),
    "fantasytalking_all_frames_alike": case(1, 9, lengths=[7]),
}
