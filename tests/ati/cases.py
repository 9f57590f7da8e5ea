import torch
from contract import Case
from wanvideo_wrapper.ati.extension import AnyTrajectory, TrackedPicture

POINTS = torch.cat((torch.rand(1, 3, 3, 2) * 2 - 1, torch.ones(1, 3, 3, 1)), dim=-1)
TRACKED = TrackedPicture(
    torch.randn(1, 16, 3, 4, 4), torch.rand(1, 4, 3, 4, 4), starts=torch.rand(1, 3, 2) * 2 - 1, points=POINTS,
    temperature=5.0,
)  # fmt: skip
# A size of its own: it stands in the place of the plain picture, so that the two cannot share one model's channels.
CASES = {"ati": Case(AnyTrajectory(), TRACKED, sizes=(("in_dim", 36), ("text_len", 5)))}
