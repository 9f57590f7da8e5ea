"""What the processes of `several.py` have before they are forked: modules, and solvers of diffusers, slow to load."""

import ranked  # noqa: F401
import ranked_runs  # noqa: F401
import torch
from wanvideo_wrapper.wanvideo.schedulers.methods import method_of

method_of("euler").solver(torch.tensor([1.0, 0.0]), torch.tensor([1000.0]), 0)
