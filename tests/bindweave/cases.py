import torch
from contract import Case
from wanvideo_wrapper.bindweave.extension import BindWeave, SubjectFrames

# A size of its own: its frames have all condition channels of the model, none here.
CASES = {
    "bindweave": Case(
        BindWeave(6), SubjectFrames(torch.zeros(1, 0, 2, 4, 4), torch.randn(1, 3, 6)), sizes=(("text_len", 5),)
    )
}
