"""When two runs made the same video."""

import numpy as np

# In levels of 256, on average. The same frames coded twice were seen to differ by 0.41, a video and itself a frame
# later by 2.3.
CODING = 1.0


def alike(video, other):
    """Decoded frames [F, H, W, 3] uint8 that differ by their coding at most.

    x264 as PyAV ships it codes the same frames otherwise when its heap held something else: the result follows
    MALLOC_PERTURB_, and does not with `mbtree=0` or `no-asm=1`.
    """
    return video.shape == other.shape and np.abs(video.astype(np.int16) - other).mean() < CODING
