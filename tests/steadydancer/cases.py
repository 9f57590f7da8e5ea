import torch
from contract import Case
from wanvideo_wrapper.steadydancer.extension import DancePoses, SteadyDancer

CASES = {
    "steadydancer": Case(SteadyDancer(), DancePoses(torch.randn(1, 16, 3, 4, 4))),
}
