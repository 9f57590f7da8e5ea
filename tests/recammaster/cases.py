import torch
from contract import Case
from wanvideo_wrapper.recammaster.extension import CameraChange, ReCamMaster

CASES = {
    "recammaster": Case(ReCamMaster(), CameraChange(torch.randn(1, 3, 12), torch.randn(1, 16, 3, 4, 4))),
}
