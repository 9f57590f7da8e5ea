import torch
from contract import Case
from wanvideo_wrapper.mocha.extension import MoCha, SubjectReplacement

FRAMES = [torch.randn(1, 16, frames, 4, 4) for frames in (3, 1, 2)]
CASES = {"mocha": Case(MoCha(), SubjectReplacement(*FRAMES))}
