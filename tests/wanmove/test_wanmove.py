"""Wan-Move against loops over tracks and frames, as its authors describe it, and its nodes."""

import json

import pytest
import torch
from contract import build, inputs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.wanmove.drawing import COLOURS, draw_tracks
from wanvideo_wrapper.wanmove.trajectories import MovedPart, MovedPicture, latent_positions, moved
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import whole_window


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_positions_are_those_of_every_fourth_frame():
    tracks = rand(12, 5, 2, seed=1) * 30 + torch.tensor((24.0, 16.0))
    visible = rand(12, 5, seed=2) > -0.8
    got = latent_positions(tracks, visible, (48, 32))
    assert got.shape == (5, 3, 2) and got.dtype == torch.long
    states = set()
    for n in range(5):
        for latent in range(3):
            x, y = tracks[4 * latent, n].tolist()
            inside = 0 <= x < 48 and 0 <= y < 32 and bool(visible[4 * latent, n])
            states.add(inside)
            assert got[n, latent].tolist() == ([int(y / 8), int(x / 8)] if inside else [-1, -1])
    assert states == {True, False}


def looped(cond, positions, strength):
    want = cond.double().clone()
    for row in range(cond.shape[0]):
        for track in positions[row].tolist():
            (top, left), *later = track
            for frame, (y, x) in enumerate(later, start=1):
                if y >= 0 and x >= 0:
                    source, before = cond[row, :, 0, top, left].double(), cond[row, :, frame, y, x].double()
                    want[row, :, frame, y, x] = before + (source - before) * strength
    return want


@pytest.mark.parametrize("strength", [1.0, 0.4, 3.0])
def test_features_of_the_start_are_where_the_track_is(strength):
    cond = rand(2, 5, 3, 4, 6)
    positions = torch.stack((torch.randint(-1, 4, (2, 9, 3)), torch.randint(-1, 6, (2, 9, 3))), dim=-1)
    positions[0, 3, 1:] = positions[0, 8, 1:] = torch.tensor((2, 3))
    before = cond.clone()
    got = moved(cond, positions, strength)
    torch.testing.assert_close(got.double(), looped(cond, positions, strength), rtol=1e-5, atol=1e-6)
    assert torch.equal(cond, before) and not torch.equal(got, cond)


def picture(frames=3, seed=0):
    return rand(1, 16, frames, 4, 4, seed=seed), rand(1, 4, frames, 4, 4, seed=seed + 1)


POSITIONS = torch.tensor([[[0, 1], [2, 2], [3, 0]], [[3, 3], [-1, -1], [1, 1]]])[None]


def moved_by_hand(cond, mask, positions, strength=1.0):
    both = looped(torch.cat((mask, cond), dim=1), positions, strength).float()
    return ImageCondition(both[:, 4:], both[:, :4])


def test_passes_with_the_prompt_see_the_motion_and_others_the_picture():
    _, model = build(ImageToVideo(), config=WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8,
                                                      text_len=4, in_dim=36))  # fmt: skip
    cond, mask = picture()
    part = MovedPicture(cond, mask, positions=POSITIONS, strength=0.7).window(whole_window(3))
    positive, negative, latents = rand(4, 8, seed=3), rand(3, 8, seed=4), inputs().latents[0]
    for batched in (False, True):
        denoiser = Denoiser(
            model, Conditions(positive=positive, negative=negative, payloads=(part,)),
            guidance=Guidance(cfg=(4.0,), payloads=(part,), batched=batched), device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        got = denoiser(latents, torch.tensor(500.0), inputs().step)

        def run(text, condition):
            asked = inputs(condition)
            return model(type(asked)(**{**asked.__dict__, "text": (text,)}))[0]

        with_all = run(positive, moved_by_hand(cond, mask, POSITIONS, 0.7))
        without = run(negative, ImageCondition(cond, mask))
        torch.testing.assert_close(got, without + 4.0 * (with_all - without), rtol=1e-4, atol=1e-5)
    assert part.without(frozenset({"audio"})) is part


def test_a_window_goes_on_from_where_tracks_are_in_its_first_frame():
    cond, mask = picture(5)
    positions = torch.randint(0, 4, (1, 3, 4, 2), generator=torch.Generator().manual_seed(2))
    part = MovedPicture(cond, mask, positions=positions).window(Window((2, 3, 4), tuple(range(9)), total=5))
    sliced = cond[:, :, [0, 3, 4]], mask[:, :, [0, 3, 4]]
    want = moved_by_hand(*sliced, positions[:, :, 2:])
    torch.testing.assert_close(part.cond, want.cond)
    torch.testing.assert_close(part.mask, want.mask)
    assert torch.equal(part.without(frozenset({"text"})).cond, sliced[0])
    last = MovedPicture(cond, mask, positions=positions[:, :, :2]).window(Window((3, 4), tuple(range(5)), total=5))
    assert type(last) is MovedPart and torch.equal(last.cond, cond[:, :, [0, 4]])


def coords(count=2, frames=9):
    walk = rand(frames, count, 2, seed=5).cumsum(0) * 3 + 16
    tracks = [[{"x": x, "y": y} for x, y in walk[:, n].tolist()] for n in range(count)]
    return json.dumps(tracks), walk


def embeds(**more):
    payloads = (ImageCondition(*picture()),)
    return ImageEmbeds(**{"latent_shape": (16, 3, 4, 4), "num_frames": 9, "payloads": payloads, **more})


def test_node():
    text, walk = coords(frames=12)
    add = N["WanVideoAddWanMoveTracks"]().add
    made, tracks = add(embeds(), text, strength=0.5)
    torch.testing.assert_close(tracks["track_path"], walk[:9])
    assert tracks["track_visibility"].shape == (9, 2) and tracks["track_visibility"].all()
    (payload,) = made.payloads
    assert payload.strength == 0.5 and payload.cond is not None
    assert torch.equal(payload.positions[0], latent_positions(walk[:9], torch.ones(9, 2), (32, 32)))
    seen = torch.rand(9, 2) > 0.5
    again, out = add(embeds(), tracks={"track_path": walk[:9], "track_visibility": seen})
    assert torch.equal(out["track_visibility"], seen)
    assert torch.equal(again.payloads[0].positions[0], latent_positions(walk[:9], seen, (32, 32)))
    mask = torch.zeros(9, 5, 5)
    mask[[0, 8], 2, 2] = 0.1
    masked, out = add(embeds(), tracks={"track_path": walk[:9], "track_visibility": seen}, track_mask=mask)
    assert out["track_visibility"][:, 1].nonzero().flatten().tolist() == [0, 8]
    assert (masked.payloads[0].positions[0, :, 1] == -1).all()


@pytest.mark.parametrize(
    ("image", "given", "message"),
    [
        (embeds(), {}, "no tracks"),
        (embeds(), {"tracks": {}}, "no 'track_path'"),
        (embeds(payloads=()), {"track_coords": coords()[0]}, "there is none"),
        (embeds(leading_latents=1), {"track_coords": coords()[0]}, "extra_latents"),
        (embeds(), {"track_coords": json.dumps([[{"x": 1, "y": 2}], [{"x": 1, "y": 2}] * 2])}, "1 and 2 points"),
        (embeds(), {"track_coords": coords()[0], "track_mask": torch.ones(4, 5, 5)}, r"\(9, 2\).*\(4, 2\)"),
    ],
)
def test_what_cannot_be_moved_is_named(image, given, message):
    with pytest.raises(ValueError, match=message):
        N["WanVideoAddWanMoveTracks"]().add(image, **given)


def test_conditioning_of_comfyui():
    text, walk = coords()
    latent = rand(1, 16, 3, 4, 4)
    positive = [[rand(1, 4, 8), {"concat_latent_image": latent, "more": 1}], [rand(1, 4, 8), {}]]
    conditioning, tracks = N["WanMove_native"]().patchcond(positive, text)
    want = looped(latent, latent_positions(walk, torch.ones(9, 2), (32, 32))[None], 1.0).float()
    for (one, options), (other, _) in zip(conditioning, positive, strict=True):
        assert one is other and torch.equal(options["concat_latent_image"], want)
    assert conditioning[0][1]["more"] == 1 and positive[1][1] == {} and tracks["track_path"].shape == (9, 2, 2)
    with pytest.raises(ValueError, match="no start picture"):
        N["WanMove_native"]().patchcond([[rand(1, 4, 8), {}]], text)


def test_drawing():
    # Far from the colour: the share of the colour in what is drawn is a quotient of differences.
    far = (torch.tensor(COLOURS[0]) < 128).float() * 0.7
    frames, path = torch.rand(1, 20, 40, 3) * 0.3 + far, torch.tensor([[[5.0, 10.0]], [[5.0, 10.0]], [[25.0, 10.0]]])
    seen = torch.tensor([[True], [False], [True]])
    drawn = draw_tracks(frames.expand(3, -1, -1, -1), path, seen, trail=2, radius=3, opacity=1.0, line_width=2)
    before, colour = (frames[0] * 255).byte().float() / 255, torch.tensor(COLOURS[0]) / 255
    torch.testing.assert_close(drawn[1], before)
    for y, x in ((10, 5), (8, 5), (10, 7)):
        torch.testing.assert_close(drawn[0, y, x], colour)
    assert torch.equal(drawn[0, 10, 9], before[10, 9]) and torch.equal(drawn[2, 3, 15], before[3, 15])
    halfway = (drawn[2, 10, 15] - before[10, 15]) / (colour - before[10, 15])
    torch.testing.assert_close(halfway, torch.full((3,), 0.5), atol=0.08, rtol=0)
    node = N["WanVideoWanDrawWanMoveTracks"]().execute
    (images,) = node(torch.rand(2, 20, 40, 3), {"track_path": path})
    assert images.shape == (3, 20, 40, 3) and images.isfinite().all()
    with pytest.raises(ValueError, match="track_path"):
        node(torch.rand(2, 20, 40, 3), {})
