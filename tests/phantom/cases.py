import torch
from contract import Case
from wanvideo_wrapper.phantom.extension import Phantom, SubjectReferences

CASES = {
    "phantom": Case(Phantom(), SubjectReferences(torch.randn(1, 16, 2, 4, 4))),
}
