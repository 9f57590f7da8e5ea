"""ATI against loops over places and frames in float64, and its nodes."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from contract import ALL_CASES, build, inputs
from sampler_stand_in import FakeModel, request
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.ati.drawing import age_colour, draw_tracks
from wanvideo_wrapper.ati.extension import AnyTrajectory, MotionTracks, TrackedPicture, painted
from wanvideo_wrapper.ati.tracks import latent_tracks, padded, parse_tracks
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.request import ImageEmbeds

TRACKED = ALL_CASES["ati"].payload
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4, in_dim=36)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(count, length=121, seed=0):
    """Tracks as a user draws them, as lists of dicts."""
    points = (rand(count, length, 2, seed=seed).cumsum(1) * 3 + 40).tolist()
    return [[{"x": x, "y": y} for x, y in track] for track in points]


def frames_of(track):
    """The 81 frames of a track: x, y, seen (0 or 1)."""
    whole = [(p["x"], p["y"], 1.0) for p in track][:121]
    whole += [(0.0, 0.0, 0.0)] * (121 - len(whole))
    twice = [point for point in whole[1:] for _ in range(2)]
    return [whole[0], *twice[1::3]]


@pytest.mark.parametrize("lengths", [(121, 121), (121, 50), (130, 3)])
def test_tracks_of_latent_frames(lengths):
    tracks = [track[:length] for track, length in zip(walk(2, 130), lengths, strict=True)]
    starts, points = latent_tracks(padded(parse_tracks(json.dumps(tracks))), (96, 64))
    for number, track in enumerate(tracks):
        frames = [((x - 48) / 32, (y - 32) / 32, seen) for x, y, seen in frames_of(track)]
        assert len(frames) == 81
        torch.testing.assert_close(starts[number].double(), torch.tensor(frames[0][:2]).double(), atol=1e-6, rtol=1e-6)
        for latent in range(1, 21):
            four = frames[4 * latent - 3 : 4 * latent + 1]
            seen = sum(f[2] for f in four)
            want = [sum(f[axis] * f[2] for f in four) / (seen + 1e-5) for axis in (0, 1)] + [min(seen, 1.0)]
            torch.testing.assert_close(points[latent, number], torch.tensor(want), atol=1e-5, rtol=1e-5)


def bilinear(picture, x, y):
    """picture [C, H, W] at -1..1, zero outside, where -1 and 1 are the outer edges."""
    height, width = picture.shape[1:]
    at = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    total = torch.zeros(picture.shape[0], dtype=torch.float64)
    for column in (math.floor(at[0]), math.floor(at[0]) + 1):
        for row in (math.floor(at[1]), math.floor(at[1]) + 1):
            if 0 <= column < width and 0 <= row < height:
                share = (1 - abs(at[0] - column)) * (1 - abs(at[1] - row))
                total += share * picture[:, row, column]
    return total


@pytest.mark.parametrize("topk", [1, 2, 9])
def test_painting_is_that_of_its_loops(topk):
    cond, starts, points = rand(1, 3, 4, 4, 6), rand(1, 5, 2, seed=1) * 0.8, rand(1, 4, 5, 3, seed=2) * 0.6
    points[..., 2] = (points[..., 2] > -0.3).float()
    got, mask = painted(cond, starts, points, temperature=7.0, topk=topk)
    want, covered = cond[0].double().clone(), torch.ones(4, 4, 6, dtype=torch.float64)
    for frame in range(1, 4):
        for row in range(4):
            for column in range(6):
                x, y = -1.5 + 3.0 * column / 5, -1 + 2 * row / 3
                weights = []
                for n in range(5):
                    px, py, seen = points[0, frame, n].double().tolist()
                    weights.append((math.exp(-7.0 * ((px - x) ** 2 + (py - y) ** 2)) * seen, n))
                best = sorted(weights, reverse=True)[:topk]
                covered[frame, row, column] = cover = sum(w for w, _ in best)
                pixel = want[:, frame, row, column] * (1 - min(cover, 1.0))
                for weight, n in best:
                    at = max(min(float(starts[0, n, 0]) / 1.5, 1), -1), max(min(float(starts[0, n, 1]), 1), -1)
                    pixel = pixel + weight * bilinear(cond[0, :, 0].double(), *at)
                want[:, frame, row, column] = pixel
    torch.testing.assert_close(got[0].double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mask[0].double(), covered, atol=1e-5, rtol=1e-5)
    assert covered.max() > 1 or topk == 1, "overlapping tracks are tested"


@pytest.mark.parametrize(("index", "acts"), [(0, False), (2, True), (6, True), (7, False)])
def test_the_model_reads_the_painted_condition_in_its_steps(index, acts):
    _, plain = build(ImageToVideo(), config=CONFIG)
    _, model = build(AnyTrajectory(), config=CONFIG)
    cond, mask = painted(TRACKED.cond, TRACKED.starts, TRACKED.points, temperature=5.0, topk=2)
    want = (cond, mask[:, None].expand(-1, 4, -1, -1, -1)) if acts else (TRACKED.cond, TRACKED.mask)
    got = model(inputs(replace(TRACKED, start=0.25, end=0.75), step=index))
    torch.testing.assert_close(got, plain(inputs(ImageCondition(*want), step=index)), rtol=1e-5, atol=1e-6)


def test_a_window_follows_the_tracks_of_its_frames():
    cond, mask, starts = rand(1, 16, 6, 4, 4), rand(1, 4, 6, 4, 4, seed=1), rand(1, 2, 2, seed=2)
    points = torch.cat((rand(1, 6, 2, 2, seed=3), torch.ones(1, 6, 2, 1)), dim=-1)
    whole = TrackedPicture(cond, mask, starts=starts, points=points)
    places = (3, 4, 5)
    part = whole.window(Window(places, tuple(range(9)), total=6)).painted()
    sliced = cond[:, :, [0, 4, 5]], starts, points[:, list(places)]
    want, covered = painted(*sliced, temperature=220.0, topk=2)
    assert torch.equal(part.cond, want) and torch.equal(part.mask, covered[:, None].expand(-1, 4, -1, -1, -1))


def test_with_another_system():
    config = replace(CONFIG, num_layers=3)
    _, model = build(AnyTrajectory(), EnhanceAVideo(), config=config)
    alone = model(inputs(TRACKED))
    both = model(inputs(TRACKED, EnhanceArgs(torch.tensor(3.0))))
    assert both.isfinite().all() and not torch.equal(both, alone)


def test_a_model_without_a_mask_is_refused():
    _, model = build(AnyTrajectory(), config=replace(CONFIG, in_dim=32))
    with pytest.raises(ValueError, match="36 channels"):
        model(inputs(TRACKED))


@dataclass(frozen=True)
class Model:
    payloads: tuple = ()


def node(tracks, model=None, **options):
    settings = dict(width=96, height=64, temperature=100.0, topk=3, start_percent=0.1, end_percent=0.9)
    return N["WanVideoATITracks"]().patchmodel(model or Model(), tracks, **(settings | options))[0]


def test_node_gives_tracks_that_meet_the_picture_of_the_run():
    model = node(json.dumps(walk(2)))
    (motion,) = model.payloads
    assert motion.points.shape == (1, 21, 2, 3) and (motion.temperature, motion.topk) == (100.0, 3)
    picture = ImageCondition(rand(1, 16, 21, 4, 6), rand(1, 4, 21, 4, 6))
    (tracked,) = motion.joined((picture, motion))
    assert type(tracked) is TrackedPicture and tracked.cond is picture.cond and tracked.points is motion.points
    assert (tracked.start, tracked.end, tracked.topk, tracked.temperature) == (0.1, 0.9, 3, 100.0)
    runner = FakeModel()
    runner.payloads = (motion,)
    embeds = ImageEmbeds(latent_shape=(16, 21, 4, 6), num_frames=81, payloads=(picture,))
    assert [type(p) for p in request(runner, image=embeds).all_payloads] == [TrackedPicture]
    with pytest.raises(ValueError, match="already"):
        node(json.dumps(walk(1)), model)
    with pytest.raises(ValueError, match="connect WanVideoImageToVideoEncode"):
        motion.joined((motion,))
    with pytest.raises(ValueError, match="with 20 latent frames in the place of 21: set num_frames to 81"):
        motion.joined((ImageCondition(rand(1, 16, 20, 4, 6), rand(1, 4, 20, 4, 6)), motion))


def test_tracks_are_read_as_graphs_save_them():
    one, two = walk(2)
    both = parse_tracks(json.dumps([one, two]))
    assert len(both) == 2 and both[0].shape == (121, 2)
    for form in (json.dumps(one), json.dumps(one).replace('"', "'"), [json.dumps(one)]):
        (track,) = parse_tracks(form)
        assert torch.equal(track, both[0])
    for wrong in ("nothing", "[]", "[[]]", '[{"x": 1}]', "5", "[[1, 2]]", []):
        with pytest.raises(ValueError, match="track"):
            parse_tracks(wrong)


def test_drawing():
    assert [age_colour(r) for r in (0, 1 / 3, 2 / 3, 1)] == [
        pytest.approx(c, abs=1e-9) for c in ((0, 0, 1), (0, 1, 0), (1, 1, 0), (1, 0, 0))
    ]
    frames, tracks = torch.rand(3, 9, 12, 3), torch.tensor([[[4.0, 3.2, 1], [9.0, 5.0, 1], [0.0, 0.0, 0]]])
    drawn = draw_tracks(frames, tracks, smallest=0, largest=2, retain=1)
    red, old = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])
    for y in range(9):
        for x in range(12):
            inside = (x - 9) ** 2 + (y - 5) ** 2 <= 4
            want = red if inside else old if (x, y) == (4, 3) else frames[1, y, x]
            assert torch.equal(drawn[1, y, x], want)
    assert torch.equal(drawn[2, 5, 9], old) and torch.equal(drawn[2, 3, 4], frames[2, 3, 4])
    (images,) = N["WanVideoATITracksVisualize"]().patchmodel(torch.rand(2, 20, 20, 3), json.dumps(walk(1)), 1, 3, 4)
    assert images.shape == (81, 20, 20, 3) and images.min() >= 0 and images.max() <= 1


def test_models_of_comfyui():
    cond, patches = rand(2, 20, 21, 4, 6), {}
    model = SimpleNamespace(get_model_object=lambda name: lambda **kwargs: kwargs["cond"])
    model.clone = lambda: SimpleNamespace(add_object_patch=patches.__setitem__)
    tracks = json.dumps(walk(3))
    N["WanVideoATI_comfy"]().patchcond(model, tracks, 96, 64, 50.0, 2)
    got = patches["concat_cond"](cond=cond)
    starts, points = latent_tracks(padded(parse_tracks(tracks)), (96, 64))
    for row in range(2):
        want, mask = painted(cond[row : row + 1, 4:], starts[None], points[None], temperature=50.0, topk=2)
        torch.testing.assert_close(got[row, 4:], want[0])
        torch.testing.assert_close(got[row, :4], mask.expand(4, -1, -1, -1))
    for other in (None, cond[:, :16]):
        with pytest.raises(ValueError, match="reads no picture of 20 channels"):
            patches["concat_cond"](cond=other)
    with pytest.raises(ValueError, match="81 frames long"):
        patches["concat_cond"](cond=cond[:, :, :5])


def test_the_payload_alone_says_what_it_needs():
    assert "image-to-video" in MotionTracks.needs
