import torch
from contract import Case
from wanvideo_wrapper.echoshot.extension import EchoShot, ShotPrompts

CASES = {"echoshot": Case(EchoShot(), ShotPrompts((torch.randn(2, 8), torch.randn(3, 8)), 2))}
