"""The nodes of VACE: contexts against the published formulas, pixel by pixel; frames and masks from pictures."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.vace.encoding import fold_mask, reference_frame
from wanvideo_wrapper.vace.extension import Vace
from wanvideo_wrapper.vace.nodes import (
    WanVideoExtraModelSelect,
    WanVideoVACEEncode,
    WanVideoVACEModelSelect,
    WanVideoVACEStartToEndFrame,
)
from wanvideo_wrapper.wanvideo.request import ImageEmbeds

FRAMES, HEIGHT, WIDTH = 9, 32, 48


class Vae:
    """Encodes by fixed random weights over each latent's pixels."""

    spatial_factor = 8

    def __init__(self, channels=16):
        self.latent_channels, self.released, self.tiles = channels, 0, []
        self.managed = SimpleNamespace(release=self.release)

    def release(self):
        self.released += 1

    def encode(self, video, *, tile=None):
        assert video.shape[1] % 4 == 1
        self.tiles.append(tile)
        weights = torch.randn(16, 3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        return F.conv3d(video[None, :, ::4], weights, stride=(1, 8, 8))[0]


def encode(vae=None, **inputs):
    given = dict(
        width=WIDTH, height=HEIGHT, num_frames=FRAMES, strength=1.0, vace_start_percent=0.0, vace_end_percent=1.0
    )
    return WanVideoVACEEncode().process(vae or Vae(), **{**given, **inputs})[0]


def pictures(count=FRAMES, height=HEIGHT, width=WIDTH, channels=3):
    return torch.randint(0, 256, (count, height, width, channels)) / 255


def only(embeds):
    (payload,) = embeds.payloads
    assert isinstance(payload, Vace)
    return payload.contexts


def test_video_and_masks():
    images, masks = pictures(channels=4), torch.rand(FRAMES, HEIGHT, WIDTH)
    embeds = encode(input_frames=images, input_masks=masks)
    (context,) = only(embeds)
    vae, video = Vae(), (images[..., :3] * 2 - 1).movedim(-1, 0)
    stays, anew = vae.encode(video * (1 - masks)), vae.encode(video * masks)
    torch.testing.assert_close(context.latents[0, :32], torch.cat((stays, anew)))
    for frame, source in enumerate((1, 4, 7)):  # the middle of each third, as 'nearest-exact' takes it
        for y, x in ((0, 0), (3, 5), (2, 1)):
            cell = masks[source, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            assert torch.equal(context.latents[0, 32:, frame, y, x], cell.flatten())
    assert context.references == 0 and (context.start, context.end, context.strengths) == (0.0, 1.0, (1.0,))
    assert embeds.latent_shape == (16, 3, 4, 6) and embeds.num_frames == FRAMES and embeds.leading_latents == 0


def test_behind_a_short_video_all_is_made_anew(caplog):
    images, masks = pictures(5), torch.rand(5, HEIGHT, WIDTH)
    filled = torch.cat((images, torch.full((4, HEIGHT, WIDTH, 3), 0.5)))
    (got,) = only(encode(input_frames=images, input_masks=masks))
    (want,) = only(encode(input_frames=filled, input_masks=torch.cat((masks, torch.ones(4, HEIGHT, WIDTH)))))
    torch.testing.assert_close(got.latents, want.latents)
    (told,) = caplog.messages
    assert told.startswith("input_frames has 5 frames, and the video 9: what comes behind them is made anew.")


def test_one_mask_stands_for_all_frames():
    images, mask = pictures(), torch.rand(1, HEIGHT, WIDTH)
    (got,), (want,) = (only(encode(input_frames=images, input_masks=m)) for m in (mask, mask.repeat(FRAMES, 1, 1)))
    assert torch.equal(got.latents, want.latents)


def test_without_video_all_is_made_anew_from_grey():
    (context,) = only(encode(strength=[0.5, 0.25], vace_start_percent=0.1, vace_end_percent=0.6))
    grey = Vae().encode(torch.zeros(3, FRAMES, HEIGHT, WIDTH))
    torch.testing.assert_close(context.latents[0, :32], torch.cat((grey, grey)))
    assert torch.equal(context.latents[0, 32:], torch.ones(64, 3, 4, 6))
    assert (context.start, context.end, context.strengths) == (0.1, 0.6, (0.5, 0.25))


def test_frames_beyond_four_n_plus_one_count_for_the_mask_alone():
    masks = torch.rand(10, HEIGHT, WIDTH)
    images = pictures(10)
    (context,) = only(encode(num_frames=10, input_frames=images, input_masks=masks))
    want = F.interpolate(F.pixel_unshuffle(masks[:, None], 8).movedim(1, 0)[None], (3, 4, 6), mode="nearest-exact")[0]
    assert torch.equal(context.latents[0, 32:], want)
    video = (images[:9] * 2 - 1).movedim(-1, 0)
    torch.testing.assert_close(context.latents[0, :16], Vae().encode(video * (1 - masks[:9])))


def test_a_reference_is_a_frame_in_front():
    vae, picture = Vae(), pictures(1)
    embeds = encode(vae, ref_images=picture, tiled_vae=True)
    (context,) = only(embeds)
    assert context.latents.shape == (1, 96, 4, 4, 6) and context.references == 1
    torch.testing.assert_close(context.latents[0, :16, :1], Vae().encode((picture * 2 - 1).movedim(-1, 0)))
    assert not context.latents[0, 16:, 0].any()
    assert embeds.latent_shape == (16, 4, 4, 6) and embeds.leading_latents == 1
    assert len(vae.tiles) == 3 and all(vae.tiles) and vae.released == 1


def test_references_are_put_side_by_side_on_white():
    two = torch.stack((torch.zeros(24, 24, 3), torch.full((24, 24, 3), 0.5)))
    frame = reference_frame(two, 48, 32)
    assert frame.shape == (3, 1, 32, 48)
    assert (frame[:, 0, :2] == 1).all() and (frame[:, 0, -2:] == 1).all()
    assert (frame[:, 0, 8:24, 2:22] == -1).all() and (frame[:, 0, 8:24, 26:46] - 1 / 255).abs().max() < 1e-2
    tall = reference_frame(torch.zeros(1, 64, 16, 3), 48, 32)
    white, black = torch.cat((tall[:, 0, :, :17], tall[:, 0, :, 31:]), dim=2), tall[:, 0, :, 23:25]
    assert white.min() > 0.95 and black.max() < -0.95


def test_a_reference_is_resized_as_pillow_does():
    picture = pictures(1, 50, 100)
    canvas = torch.ones(66, 100, 3)  # 100 / (48 / 32) rows; less than half a pixel too wide
    canvas[8:58] = picture[0]
    image = Image.fromarray((canvas * 255).round().byte().numpy()).resize((48, 32), Image.Resampling.LANCZOS)
    want = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 48, 3) / 255
    got = (reference_frame(picture, 48, 32)[:, 0].movedim(0, -1) + 1) / 2
    assert (got - want).abs().max() < 1.5 / 255


def test_masks_fold_every_pixel_once():
    mask = torch.arange(5 * 16 * 16).float().view(5, 16, 16)
    folded = fold_mask(mask)
    assert folded.shape == (64, 2, 2, 2)
    assert torch.equal(folded[:, 0].flatten().sort().values, mask[1].flatten())
    assert torch.equal(folded[:, 1].flatten().sort().values, mask[3].flatten())


def test_embeds_in_a_chain():
    first = encode(ref_images=pictures(1), strength=0.5)
    second = encode(input_frames=pictures(), prev_vace_embeds=first)
    third = encode(prev_vace_embeds=second)
    assert [c.references for c in only(third)] == [0, 0, 1]
    assert only(third)[2].strengths == (0.5,) and torch.equal(only(third)[1].latents, only(second)[0].latents)
    assert third.latent_shape == (16, 4, 4, 6) and third.leading_latents == 1


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (dict(input_masks=torch.rand(2, HEIGHT, WIDTH)), "input_masks has 2 masks for 9 frames"),
        (dict(vae=Vae(channels=48)), "Wan 2.1 VAE"),
        (dict(prev_vace_embeds=ImageEmbeds(latent_shape=(16, 3, 4, 6), num_frames=9)), "no VACE embeds"),
        (dict(strength=[]), "list of cfg values is empty|empty"),
    ],
)
def test_wrong_inputs_are_named(inputs, says):
    with pytest.raises(ValueError, match=says):
        encode(**inputs)


def test_earlier_embeds_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"of \(2, 4, 6\) latents.*but these are of \(3, 4, 6\)"):
        encode(prev_vace_embeds=encode(num_frames=5))


def test_modules(tmp_path):
    (tmp_path / "diffusion_models").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "diffusion_models" / name).touch()
    before = get_host()
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    try:
        (vace,) = WanVideoVACEModelSelect().getvacepath("a.safetensors")
        (more,) = WanVideoExtraModelSelect().getmodelpath("b.safetensors", vace)
        (alone,) = WanVideoExtraModelSelect().getmodelpath("b.safetensors")
        (three,) = WanVideoExtraModelSelect().getmodelpath("a.safetensors", more)
    finally:
        set_host(before)
    assert vace.path.name == "a.safetensors" and vace.kind.name == "VACE module"
    assert more[0] is vace and [file.path.name for file in more] == ["a.safetensors", "b.safetensors"]
    assert [file.path.name for file in three] == ["a.safetensors", "b.safetensors", "a.safetensors"]
    assert len(alone) == 1 and alone[0].kind is None


def placed(frames=8, level=0.25, **inputs):
    return WanVideoVACEStartToEndFrame().process(frames, level, **inputs)


def test_start_and_end_pictures():
    start, end = pictures(2, 16, 24), pictures(3, 16, 24)
    frames, masks = placed(start_image=start, end_image=end)
    assert torch.equal(frames[:2], start) and torch.equal(frames[-3:], end)
    assert (frames[2:5] == 0.25).all() and frames.shape == (8, 16, 24, 3)
    assert [m.unique().tolist() for m in masks] == [[0.0]] * 2 + [[1.0]] * 3 + [[0.0]] * 3


def test_places_by_index():
    start, end = pictures(3, 16, 24), pictures(3, 16, 24)
    frames, masks = placed(start_image=start, end_image=end, start_index=6, end_index=1)
    assert torch.equal(frames[6:], start[:2]) and torch.equal(frames[:2], end[1:])
    assert masks.mean(dim=(1, 2)).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    _, masks = placed(end_image=end, end_index=-3)
    assert masks.mean(dim=(1, 2)).tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    _, masks = placed(start_image=start, start_index=20)
    assert masks.all()
    _, masks = placed(end_image=end, end_index=-30)
    assert masks.all()


def test_control_fills_what_is_free_and_inpaint_masks_it():
    start, control = pictures(1, 16, 24), pictures(5, 16, 24)
    inpaint = torch.rand(2, 16, 24)
    frames, masks = placed(start_image=start, control_images=control, inpaint_mask=inpaint)
    assert torch.equal(frames[1:5], control[1:]) and torch.equal(frames[0], start[0]) and (frames[5:] == 0.25).all()
    assert not masks[0].any() and torch.equal(masks[1], inpaint[1]) and torch.equal(masks[6], inpaint[0])


def test_control_alone_is_left_as_it_is():
    control = pictures(3, 16, 24)
    frames, masks = placed(control_images=control)
    assert torch.equal(frames[:3], control) and (frames[3:] == 0.25).all() and not masks.any() and len(masks) == 8
    assert len(placed(frames=2, control_images=control)[0]) == 2
    inpaint = torch.rand(2, 16, 24)
    frames, masks = placed(control_images=control, inpaint_mask=inpaint)
    assert torch.equal(frames[:3], control) and torch.equal(masks, inpaint.repeat(4, 1, 1))


def test_other_sizes_are_resized_to_the_start_pictures():
    frames, _ = placed(start_image=pictures(1, 16, 24), end_image=pictures(1, 32, 24), control_images=pictures(8, 8, 8),
                       inpaint_mask=torch.rand(8, 4, 4))  # fmt: skip
    assert frames.shape == (8, 16, 24, 3) and frames.isfinite().all()


def test_no_pictures_at_all():
    with pytest.raises(ValueError, match="connect start_image, end_image or control_images"):
        placed()
