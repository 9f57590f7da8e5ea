"""Pictures: sizes, frames, backgrounds."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.wanvideo.images import centered


def lanczos(images, size):
    frames = []
    for image in images:
        planes = [Image.fromarray((p * 255).round().byte().numpy()).resize(size, Image.Resampling.LANCZOS)
                  for p in image.unbind(-1)]  # fmt: skip
        frames.append(torch.stack([torch.from_numpy(np.array(p)) for p in planes], -1) / 255)
    return torch.stack(frames)


@pytest.mark.parametrize(
    ("sides", "how", "size", "box"),
    [
        ((100, 60), "keep_input", (128, 80), (0, 0, 100, 60)),
        ((60, 100), "keep_input", (80, 128), (0, 0, 60, 100)),
        ((100, 60), "stretch_to_new", (128, 96), (0, 0, 100, 60)),
        ((100, 60), "crop_to_new", (128, 96), (10, 0, 90, 60)),
        ((60, 100), "crop_to_new", (128, 96), (0, 28, 60, 72)),
    ],
)
def test_resize_to_closest(sides, how, size, box):
    images = torch.rand(2, sides[1], sides[0], 3)
    got, width, height = N["WanVideoImageResizeToClosest"]().process(images, 128, 96, how)
    assert (width, height) == size and width * height <= 128 * 96
    left, top, right, bottom = box
    torch.testing.assert_close(got, lanczos(images[:, top:bottom, left:right], size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(832, 480), (1280, 720), (480, 832), (624, 624), (1000, 333)])
def test_sizes_are_those_of_wans_own_code(size):
    (width, height), area = size, 832 * 480
    got = N["WanVideoImageResizeToClosest"]().process(torch.rand(1, height, width, 3), 832, 480, "keep_input")[1:]
    aspect = height / width
    assert got == tuple(
        int(round(math.sqrt(part) // 8 // 2 * 2)) * 8 for part in (area / aspect, area * aspect)
    )


def test_the_middle_has_the_proportions():
    assert centered(torch.rand(1, 40, 90, 3), 20, 20).shape == (1, 40, 40, 3)
    picture = torch.rand(1, 90, 40, 3)
    assert torch.equal(centered(picture, 8, 4), picture[:, 35:55])


@pytest.mark.parametrize(
    ("sides", "wanted", "cut"), [((33, 30), (64, 96), 7), ((37, 35), (64, 112), 9), ((121, 100), (512, 512), 10)]
)
def test_half_pixels_are_cut_where_comfyui_cuts_them(sides, wanted, cut):
    """Measured with its common_upscale, crop center, of 0.33.0."""
    picture = torch.rand(1, sides[1], sides[0], 3)
    assert torch.equal(centered(picture, *wanted), picture[:, :, cut : sides[0] - cut])


def test_start_frames(caplog):
    video = torch.rand(5, 4, 6, 3, dtype=torch.float64)
    take = N["ExtractStartFramesForContinuations"]().get_start_frames
    (start,) = take(video, 3)
    assert start.dtype == torch.float32 and torch.equal(start, video[:3].float())
    with caplog.at_level(logging.WARNING):
        assert len(take(video, 9)[0]) == 5
    assert "9 frames are asked for, and all 5 of the video taken" in caplog.text


def test_noise_has_the_colors_of_the_subject():
    images, mask = torch.rand(3, 64, 48, 3) * 0.3 + 0.2, torch.zeros(2, 32, 24)
    mask[0, 8:20, 4:16], mask[1, :, 12:] = 1, 1
    (drawn,) = N["DrawGaussianNoiseOnImage"]().apply(images, mask, "cpu", 7)
    again = N["DrawGaussianNoiseOnImage"]().apply(images, mask, "cpu", 7)[0]
    assert torch.equal(drawn, again) and not torch.equal(drawn, N["DrawGaussianNoiseOnImage"]().apply(images, mask)[0])
    generator = torch.Generator().manual_seed(7)
    for index in range(3):
        subject = mask[index % 2].repeat_interleave(2, 0).repeat_interleave(2, 1)[..., None] > 0.5
        for channel in range(3):
            plane = images[index, ..., channel : channel + 1]
            inside = plane[subject].double()
            mean, deviation = inside.mean().item(), inside.std().item()
            noise = torch.normal(mean, deviation, (64, 48), generator=generator)[..., None].clamp(0, 1)
            want = torch.where(subject, plane, noise)
            torch.testing.assert_close(drawn[index, ..., channel : channel + 1], want, atol=1e-5, rtol=0)


def test_a_soft_mask_blends_and_one_without_subject_gives_black(caplog):
    picture, mask = torch.rand(1, 20, 20, 3), torch.full((1, 20, 20), 0.25)
    with caplog.at_level(logging.WARNING):
        (dark,) = N["DrawGaussianNoiseOnImage"]().apply(picture, mask)
    torch.testing.assert_close(dark, picture * 0.25)
    assert "no subject" in caplog.text
    mask[0, 3, 4] = 0.75
    (single,) = N["DrawGaussianNoiseOnImage"]().apply(picture, mask)
    color = picture[0, 3, 4]
    torch.testing.assert_close(single[0, 0, 0], picture[0, 0, 0] * 0.25 + color * 0.75)
    torch.testing.assert_close(single[0, 3, 4], color)
