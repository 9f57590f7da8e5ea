from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.s2v.extension import SpeechInjection, SpeechToVideo

SIZES = SpeechInjection(layers=3, audio_dim=5, tokens=2, pose_dim=16)
SPEECH, REFERENCE, POSE = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(1, 3, 5, 9), (1, 16, 1, 4, 4), (1, 16, 3, 4, 4)])
)
HEARD = SpeechToVideo(audio=SPEECH, scale=torch.tensor(0.7))
SEEN = replace(HEARD, reference=REFERENCE, pose=POSE)


def louder(payload):
    return lambda step: replace(payload, scale=torch.tensor(0.5 + 0.1 * step))


CASES = {
    "s2v": Case(SIZES, SEEN, changed=louder(SEEN)),
    "s2v_speech": Case(SIZES, HEARD, changed=louder(HEARD)),
    "s2v_silent": Case(SIZES, replace(SEEN, audio=None)),
}
