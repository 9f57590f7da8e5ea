import torch
from contract import Case
from wanvideo_wrapper.fun_control.extension import ControlSignal, FunControl

VIDEO, PICTURE = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 4, 4)
CASES = {
    "fun_control": Case(FunControl(), ControlSignal(VIDEO), joins=16),
    "fun_control_reference": Case(FunControl(reference_dim=16), ControlSignal(VIDEO, PICTURE), joins=16),
}
