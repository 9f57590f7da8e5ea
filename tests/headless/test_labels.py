"""Labels and borders of pictures (KJNodes)."""

import pytest
import torch
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES


def label(image, direction, **changes):
    values = {
        "text_x": 4, "text_y": 2, "height": 20, "font_size": 14, "font_color": "#ff0000", "label_color": "blue",
        "font": "FreeMono.ttf", "text": "input", "direction": direction,
    }  # fmt: skip
    return NODES["AddLabel"]().addlabel(image, **values | changes)[0]


@pytest.mark.parametrize(
    ("direction", "place"),
    [
        ("up", (slice(20, None), slice(None))), ("down", (slice(None, 30), slice(None))),
        ("left", (slice(None), slice(20, None))), ("right", (slice(None), slice(None, 60))),
    ],
)  # fmt: skip
def test_a_bar_with_words_lies_beside_the_pictures(direction, place):
    image = torch.rand(2, 30, 60, 3)
    made = label(image, direction)
    lies = direction in ("up", "down")
    assert made.shape == ((2, 50, 60, 3) if lies else (2, 30, 80, 3))
    assert torch.equal(made[(slice(None), *place)], image)
    outside = torch.ones(made.shape[1:3], dtype=torch.bool)
    outside[place] = False
    bar = made[:, outside]
    assert not bar[..., 1].any() and torch.allclose(bar[..., 0] + bar[..., 2], torch.ones(()), atol=1e-5)
    assert 0.01 < bar[..., 0].mean() < 0.6, "words in red on blue"


def test_words_upon_the_pictures_and_captions():
    image = torch.rand(1, 30, 60, 3)
    made = label(image, "overlay")
    changed = (made != image).any(dim=-1)
    assert 0 < changed.float().mean() < 0.5 and made.shape == image.shape
    assert torch.equal(label(image, "up", caption="input", text="other"), label(image, "up"))
    assert label(image, "up", height=-1).shape[1] == 30 + 14 + 4


def test_no_color_is_refused():
    with pytest.raises(ValueError, match="'nonsense' is no color"):
        NODES["AddLabel"].VALIDATE_INPUTS("white", "nonsense")


def test_edge_borders_have_the_mean_of_the_line_beside_them():
    image = torch.rand(2, 8, 10, 3)
    made, masks = NODES["ImagePadKJ"]().pad(image, 1, 2, 3, 4, 0, "edge", "0")
    assert torch.equal(made[:, 3:11, 1:11], image) and masks[:, 3:11, 1:11].sum() == 0
    torch.testing.assert_close(made[1, 5, 0], image[1, :, 0].double().mean(dim=0).float())
    torch.testing.assert_close(made[1, 5, 12], image[1, :, -1].double().mean(dim=0).float())
    torch.testing.assert_close(made[0, 1, 5], image[0, 0].double().mean(dim=0).float())
    torch.testing.assert_close(made[0, 14, 5], image[0, -1].double().mean(dim=0).float())
