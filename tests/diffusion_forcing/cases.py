import torch
from contract import Case
from wanvideo_wrapper.diffusion_forcing.extension import FrameRate, FrameRateEmbedding

CASES = {
    "diffusion_forcing": Case(
        FrameRateEmbedding(), FrameRate.of(24.0), changed=lambda step: FrameRate(torch.tensor([step % 2]))
    ),
}
