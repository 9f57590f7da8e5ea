from dataclasses import replace

import torch
from contract import Case
from wanvideo_wrapper.humo.conditions import HuMoConditions
from wanvideo_wrapper.humo.extension import HuMo, HuMoWindow

SIZES = HuMo(features=8 * 5 * 3, hidden_dim=10, context_tokens=4, output_dim=12)
COND, EMPTY = torch.randn(2, 1, 20, 3, 4, 4, generator=torch.Generator().manual_seed(4))


def window(references, scale=0.7):
    audio = torch.randn(1, 3, 8, 5, 3, generator=torch.Generator().manual_seed(3))
    return HuMoWindow(audio, torch.tensor(scale), COND, COND, EMPTY, references)


VIDEO = HuMoConditions(features=torch.randn(9, 5, 3), cond=COND, empty=EMPTY, references=0)


def changed(references):
    return lambda step: replace(window(references), scale=torch.tensor(0.5 + 0.1 * step))


# One model reads one image condition, so the form with channels is of other sizes than the systems that bring some.
CASES = {
    "humo_17B": Case(SIZES, window(1), changed=changed(1), sizes=(("in_dim", 36),), video=VIDEO),
    "humo_1_7B": Case(SIZES, window(1), changed=changed(1), video=VIDEO),
    "humo_without_pictures": Case(SIZES, window(0), window(0, scale=0.0), changed=changed(0), video=VIDEO),
}
