"""The condition of SVI Pro, frame by frame."""

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import ImageCondition


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(anchor=1, frames=17, previous=None, count=1):
    given = {} if previous is None else {"prev_samples": {"samples": previous}, "motion_latent_count": count}
    return N["WanVideoSVIProEmbeds"]().add({"samples": rand(1, 16, anchor, 4, 6)}, frames, **given)[0]


@pytest.mark.parametrize(("anchor", "count"), [(1, 1), (2, 3), (1, 0), (1, None)])
def test_anchor_then_motion_then_nothing(anchor, count):
    previous = None if count is None else rand(1, 16, 5, 4, 6, seed=1)
    made = embeds(anchor, previous=previous, count=count)
    (picture,) = made.payloads
    assert type(picture) is ImageCondition and made.latent_shape == (16, 5, 4, 6) and made.num_frames == 17
    want = [*rand(1, 16, anchor, 4, 6)[0].unbind(1), *(previous[0].unbind(1)[5 - count :] if count else ())]
    for frame in range(5):
        expected = want[frame] if frame < len(want) else torch.zeros(16, 4, 6)
        assert torch.equal(picture.cond[0, :, frame], expected)
        assert picture.mask[0, :, frame].unique().tolist() == [float(frame == 0)]
    assert picture.mask.shape == (1, 4, 5, 4, 6)


def test_what_does_not_fit_is_named():
    assert embeds(frames=19).num_frames == 17
    with pytest.raises(ValueError, match="7 latent frames, but 17 frames of video are 5"):
        embeds(3, previous=rand(1, 16, 5, 4, 6), count=4)
    with pytest.raises(ValueError, match="encode the anchor at the width and height"):
        embeds(previous=rand(1, 16, 5, 6, 6))
