import torch
from contract import Case
from wanvideo_wrapper.minimax_remover.extension import MaskedVideo, MiniMaxRemover

CASES = {
    "minimax_remover": Case(
        MiniMaxRemover(), MaskedVideo(torch.randn(1, 4, 3, 4, 4)), joins=4, sizes=(("text_dim", 0),)
    )
}
