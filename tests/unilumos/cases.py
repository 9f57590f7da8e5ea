import torch
from contract import Case
from wanvideo_wrapper.unilumos.extension import RelitVideo, UniLumos

CASES = {"unilumos": Case(UniLumos(), RelitVideo(torch.randn(1, 32, 3, 4, 4)), joins=32)}
