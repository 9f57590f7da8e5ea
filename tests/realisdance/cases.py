import torch
from contract import Case
from wanvideo_wrapper.realisdance.extension import DancePoses, RealisDance

POSES = DancePoses(reference=torch.randn(1, 4, 1, 4, 4), poses=torch.randn(1, 6, 3, 4, 4))
CASES = {"realisdance": Case(RealisDance(6, 4), POSES)}
