"""What the processes of `several.py` have before they are forked: modules, and solvers of diffusers, slow to load."""

import ranked  # noqa: F401
import ranked_runs  # noqa: F401
from wanvideo_wrapper.wanvideo.schedulers.methods import method_of

method_of("euler").solver()
