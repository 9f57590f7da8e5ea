"""What image embeds hold, as latents and as a mask."""

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import ImageCondition
from wanvideo_wrapper.wanvideo.request import ImageEmbeds


def test_preview():
    cond, mask = torch.randn(1, 16, 3, 4, 6), torch.rand(1, 4, 3, 4, 6)
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9, payloads=(ImageCondition(cond, mask),))
    latents, shown = N["WanVideoPreviewEmbeds"]().get(embeds)
    assert torch.equal(latents["samples"], cond) and torch.equal(shown, mask[0, 0])
    with pytest.raises(ValueError, match="hold no encoded pictures"):
        N["WanVideoPreviewEmbeds"]().get(ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9))
