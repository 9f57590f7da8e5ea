import torch
from contract import Case
from wanvideo_wrapper.vace.extension import Vace, VaceContext, VaceExtension

WHOLE, SHORT = torch.randn(1, 96, 3, 4, 4), torch.randn(1, 96, 2, 4, 4)


def contexts(*strengths):
    return Vace(
        (
            VaceContext(latents=WHOLE, strengths=strengths),
            VaceContext(latents=SHORT, strengths=(0.5 * strengths[0],)),
        )
    )


CASES = {
    "vace": Case(
        VaceExtension(blocks=2), contexts(0.8), contexts(0.0), changed=lambda step: contexts(0.3 + 0.1 * step)
    ),
}
