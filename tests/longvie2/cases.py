import torch
from contract import Case
from wanvideo_wrapper.longvie2.extension import DualControl, LongVie2

SYSTEM = LongVie2(layers=2, dim=12, ffn_dim=16, model_dim=24)
DENSE, SPARSE, HISTORY = (torch.randn(1, 16, frames, 4, 4) for frames in (3, 3, 2))


def controlled(strength, history=None):
    return DualControl(strength=torch.tensor(strength), dense=DENSE, sparse=SPARSE, history=history)


CASES = {
    "longvie2": Case(SYSTEM, controlled(0.8), controlled(0.0), changed=lambda step: controlled(0.3 + 0.1 * step)),
    "longvie2_history": Case(SYSTEM, controlled(0.8, HISTORY)),
}
