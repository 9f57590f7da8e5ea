from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk

FEATURES = dict(features=2 * 6, intermediate_dim=10, context_tokens=4, output_dim=12)


def case(voiced, speakers=1, **more):
    speech = AudioWindow(torch.randn(1, speakers, 9, 5, 2, 6), torch.tensor(0.7))
    return Case(
        MultiTalk(**{**FEATURES, **more}, voiced=voiced),
        speech,
        replace(speech, scale=torch.tensor(0.0)),
        changed=lambda step: replace(speech, scale=torch.tensor(0.5 + 0.1 * step)),
        video=MultiTalkEmbeds(features=tuple(torch.randn(speakers, 9, 2, 6)), scale=0.7),
    )


CASES = {
    "multitalk": case((0, 1, 2)),
    # Few enough audio tokens for folded products.
    "multitalk_folded": case((1,), context_tokens=1),
    "multitalk_two_speakers": case((0, 1, 2), speakers=2),
}
