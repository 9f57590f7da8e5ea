import torch
from contract import Case
from wanvideo_wrapper.nag.extension import NegativeText, NormalizedAttentionGuidance

PROMPT = torch.randn(4, 8)


def negative(alpha, *, inplace=True):
    return NegativeText((PROMPT,), torch.tensor(8.0), torch.tensor(2.5), torch.tensor(alpha), inplace)


CASES = {
    f"nag_{name}": Case(
        NormalizedAttentionGuidance(),
        negative(0.5, inplace=inplace),
        negative(0.0, inplace=inplace),
        changed=lambda step, inplace=inplace: negative(0.1 + 0.1 * step, inplace=inplace),
    )
    for name, inplace in (("inplace", True), ("copied", False))
}
