"""CLIP features in tiles, against an encoder whose features are the mean colors of a grid."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.clip_image.tiles import tiled_features

SIDE = 4


def colors(images):
    """Features [n, 1 + 16, 3]: mean color of the picture, and of each of its 4x4 parts."""
    planes = images.movedim(-1, 1).double()
    grid = F.adaptive_avg_pool2d(planes, SIDE).flatten(2).mT
    return torch.cat((planes.mean(dim=(2, 3))[:, None], grid), dim=1)


@pytest.mark.parametrize("tiles", [2, 4])
def test_tiles_of_mean_colors_give_the_mean_colors_of_the_picture(tiles):
    images = torch.rand(2, 32, 32, 3)
    torch.testing.assert_close(tiled_features(colors, images, tiles, 0.0, crop=True), colors(images))


def test_every_tile_is_seen_at_full_size_and_keeps_its_place():
    image = torch.rand(1, 32, 64, 3)
    seen = []

    def encode(images):
        seen.append(images)
        return colors(images) + len(seen)

    tiled_features(encode, image, 2, 0.5, crop=False)
    whole, parts = seen
    assert torch.equal(whole, image) and parts.shape == (4, 16, 32, 3)
    for number, part in enumerate(parts):
        row, column = divmod(number, 2)
        assert torch.equal(part, image[0, row * 16 : row * 16 + 16, column * 32 : column * 32 + 32])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_ratio_is_that_of_the_whole_picture(ratio):
    images = torch.rand(3, 16, 16, 3)

    def encode(pictures):
        return colors(pictures) * (1.0 if pictures.shape[1] == 16 else 3.0)

    torch.testing.assert_close(
        tiled_features(encode, images, 2, ratio, crop=True), colors(images) * (ratio + 3 * (1 - ratio))
    )


def test_the_middle_square_is_cut_out_before_the_tiles():
    images = torch.rand(1, 16, 40, 3)
    torch.testing.assert_close(
        tiled_features(colors, images, 2, 0.0, crop=True), colors(images[:, :, 12:28])
    )
    with pytest.raises(ValueError, match="no 8x8 tiles"):
        tiled_features(colors, torch.rand(1, 4, 9, 3), 8, 0.5, crop=True)


def test_the_node_takes_tiles():
    clip = SimpleNamespace(encode_image=lambda images, crop: SimpleNamespace(penultimate_hidden_states=colors(images)))
    image = torch.rand(1, 16, 16, 3)
    asked = (clip, image, 1.0, 1.0, True, "center", "average")
    (plain,) = N["WanVideoClipVisionEncode"]().process(*asked)
    (tiled,) = N["WanVideoClipVisionEncode"]().process(*asked, negative_image=image, tiles=2, ratio=0.5)
    torch.testing.assert_close(tiled.positive, plain.positive)
    torch.testing.assert_close(tiled.negative, plain.positive)
