import torch
from contract import Case
from wanvideo_wrapper.mtv_crafter.extension import Motion, MtvCrafter

TOKENS = torch.randn(1, 3 * 24, 20, generator=torch.Generator().manual_seed(4))
CASES = {
    "mtv_crafter": Case(
        MtvCrafter(blocks=(0, 2)), Motion(TOKENS), Motion(TOKENS, strengths=(0.0,)),
        lambda step: Motion(TOKENS, strengths=(0.5 + 0.1 * step,)),
    )
}  # fmt: skip
