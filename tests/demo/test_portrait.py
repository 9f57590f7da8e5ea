"""Which pictures the demo takes: drawn faces like those of its training, and nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from wanvideo_wrapper.demo import INPUT
from wanvideo_wrapper.demo.faces import Dice, draw_characters, draw_motions, render
from wanvideo_wrapper.demo.portrait import FARTHEST, check, distance, draw

FACES = draw(11, 120)


def two_people(count):
    dice = Dice(5)
    characters = draw_characters(dice, count, torch.tensor([[-0.5, 0.0], [0.5, 0.0]]))
    poses, _ = draw_motions(dice, torch.zeros(count, 2, 1))
    return render(characters, poses)[:, 0]


def saved(path, picture):
    Image.fromarray((picture.movedim(0, -1) * 255).byte().numpy()).save(path)
    return path


def test_new_faces_are_known():
    assert (distance(FACES) < FARTHEST).all()


@pytest.mark.parametrize(
    "strange",
    [
        torch.rand(20, 3, 128, 128),
        F.interpolate(torch.rand(20, 3, 8, 8), 128, mode="bilinear"),
        torch.rand(20, 3, 1, 1).expand(-1, -1, 128, 128),
        FACES.roll(20, 3),
        FACES.transpose(2, 3),
        F.pad(F.interpolate(FACES, 64, mode="area"), (32, 32, 32, 32), mode="replicate"),
        two_people(20),
    ],
    ids=["noise", "clouds", "flat", "off the middle", "lying", "small", "two people"],
)
def test_other_pictures_are_not(strange):
    assert (distance(strange) > FARTHEST).all()


def test_another_hand_may_draw_them(tmp_path):
    """A face of the same proportions, drawn without the project's renderer."""
    picture = Image.new("RGB", (512, 512), (140, 170, 160))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((70, 400, 442, 660), fill=(60, 90, 140))
    pen.rectangle((215, 360, 297, 440), fill=(205, 160, 130))
    pen.ellipse((142, 95, 370, 395), fill=(232, 186, 150))
    pen.chord((132, 70, 380, 330), 185, 355, fill=(80, 50, 30))
    for x in (206, 306):
        pen.ellipse((x - 24, 195, x + 24, 225), fill=(250, 250, 248))
        pen.ellipse((x - 10, 199, x + 10, 221), fill=(60, 80, 40))
    pen.ellipse((244, 250, 268, 285), fill=(200, 150, 120))
    pen.ellipse((212, 312, 300, 334), fill=(190, 90, 90))
    picture.save(tmp_path / "drawn.png")
    check(tmp_path / "drawn.png")


def test_the_demos_own_is_known():
    check(INPUT / "portrait.png")


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"noise.png is no picture that the demo's tiny models know"):
        check(saved(tmp_path / "noise.png", torch.rand(3, 200, 200)))
    with pytest.raises(ValueError, match="about square"):
        check(saved(tmp_path / "wide.png", torch.rand(3, 128, 300)))
    with pytest.raises(ValueError, match="at least 128x128"):
        check(saved(tmp_path / "little.png", FACES[0][:, ::2, ::2]))
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        check(tmp_path / "words.png")


def test_transparency_is_left_out_as_by_the_loader(tmp_path):
    pixels = (FACES[0].movedim(0, -1) * 255).byte().numpy()
    alpha = np.full((128, 128, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate((pixels, alpha), axis=2)).save(tmp_path / "alpha.png")
    check(tmp_path / "alpha.png")
