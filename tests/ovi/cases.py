import torch
from contract import Case
from wanvideo_wrapper.ovi.extension import Ovi
from wanvideo_wrapper.ovi.stream import OviSound, SoundStream

CASES = {"ovi": Case(Ovi(channels=20, hidden=8, kernel=7), OviSound(SoundStream(torch.randn(5, 20))))}
