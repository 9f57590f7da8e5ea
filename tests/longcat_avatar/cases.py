from dataclasses import replace

import torch
from contract import SIZES, Case
from wanvideo_wrapper.longcat_avatar.extension import LongCatAvatar
from wanvideo_wrapper.longcat_avatar.speech import LongCatSpeech
from wanvideo_wrapper.multitalk.extension import AudioWindow

SPEECH = dict(features=2 * 6, intermediate_dim=10, context_tokens=4, output_dim=12)


def case(speakers=1):
    speech = AudioWindow(torch.randn(1, speakers, 9, 5, 2, 6), torch.tensor(0.7))
    return Case(
        # In a Wan model the time embedding is as wide as the model.
        LongCatAvatar(**SPEECH, voiced=(0, 1, 2), width=SIZES["dim"]),
        speech,
        replace(speech, scale=torch.tensor(0.0)),
        changed=lambda step: replace(speech, scale=torch.tensor(0.5 + 0.1 * step)),
        video=LongCatSpeech(features=tuple(torch.randn(speakers, 20, 2, 6)), start=0, frames=9),
    )


CASES = {"longcat_avatar": case(), "longcat_avatar_two_speakers": case(speakers=2)}
