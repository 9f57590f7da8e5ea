"""The trained models still do what MODEL_CARD.md says: floors for the bench's default setting, on two short clips."""

import numpy as np
import pytest
from wanvideo_wrapper.demo import MODELS
from wanvideo_wrapper.demo.quality import heldout
from wanvideo_wrapper.demo.quality.bench import make_clip
from wanvideo_wrapper.demo.quality.metrics import lip_sync, psnr
from wanvideo_wrapper.demo.quality.talker import MOTION_FRAMES, WINDOW_FRAMES, Setting, Talker
from wanvideo_wrapper.demo.sounds import FRAME
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

pytestmark = pytest.mark.slow

# Two windows with one join; a short clip has few syllables to follow, so that the floor is under the bench's mean.
FRAMES = 2 * WINDOW_FRAMES - MOTION_FRAMES
LIP_SYNC, FIRST_FRAME, RECONSTRUCTION = 0.75, 25.0, 27.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    before = get_host()
    set_host(StandaloneHost(models=MODELS, outputs=tmp_path_factory.mktemp("trained"), device="cpu"))
    talker = Talker(Setting())
    made = []
    for number in (1, 2):
        whole = heldout.single(number)
        made.append(make_clip(talker, heldout.case(whole.name, (whole.sounds[0][: FRAMES * FRAME],), number)))
    yield talker, made
    set_host(before)


def test_mouths_follow_the_voices(clips):
    found = [lip_sync(clip.mouth, clip.case.levels[0]).correlation for clip in clips[1]]
    assert np.mean(found) >= LIP_SYNC, found


def test_the_first_frame_is_the_portrait(clips):
    found = [psnr(clip.video[0], clip.case.portrait.numpy()) for clip in clips[1]]
    assert min(found) >= FIRST_FRAME, found


def test_the_vae_gives_a_clip_back(clips):
    talker, made = clips
    truth = made[0].case.truth[: FRAMES // 4 * 4 - 3]
    back = talker.reconstruct(truth)
    assert psnr(back, truth) >= RECONSTRUCTION and psnr(back[0], truth[0]) >= RECONSTRUCTION
