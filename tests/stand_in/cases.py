import torch
from contract import Case
from wanvideo_wrapper.stand_in.extension import FaceReference, StandIn

CASES = {"stand_in": Case(StandIn(rank=4), FaceReference(torch.randn(1, 16, 1, 4, 6)))}
