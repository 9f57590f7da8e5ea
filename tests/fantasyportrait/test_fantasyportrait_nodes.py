"""FantasyPortrait's nodes on tiny models and a detector of fixed answers: motion, files, runs, drawings, messages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fantasy_models import CONTEXT, PORTRAIT, portrait_module, stand_in_detector, talking_module
from published import relative
from tiny_runs import Runs, prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.fantasyportrait.extension import PortraitMotion
from wanvideo_wrapper.fantasyportrait.faces import FaceModels
from wanvideo_wrapper.fantasyportrait.motion import encode_motion, load_motion_encoder
from wanvideo_wrapper.fantasyportrait.nodes import _face, _pictures
from wanvideo_wrapper.fantasyportrait.projection import Strengths
from wanvideo_wrapper.fantasyportrait.tracking import landmarks_of
from wanvideo_wrapper.fantasytalking.frame_attention import cut
from wanvideo_wrapper.host import get_host
from wanvideo_wrapper.wanvideo.request import TextEmbeds


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fantasyportrait")
    portrait_module().save(folder / "diffusion_models/portrait.safetensors", torch.float32)
    portrait_module(motion=False).save(folder / "diffusion_models/still.safetensors", torch.float32)
    talking_module().save(folder / "diffusion_models/talk.safetensors", torch.float32)
    with Runs(folder) as runs:
        yield runs


def load_module(name="portrait"):
    return N["FantasyPortraitModelLoader"]().loadmodel(f"{name}.safetensors", "fp32")[0]


def load_model(**more):
    return N["WanVideoModelLoader"]().loadmodel("t2v.safetensors", "fp32", "offload_device", "disabled", **more)[0]


def video(frames=11, seed=0, size=(160, 150)):
    return torch.rand(frames, *size, 3, generator=torch.Generator().manual_seed(seed))


def detect(runs, monkeypatch, images, module=None, **more):
    stand_in_detector(monkeypatch, runs.folder)
    return N["FantasyPortraitFaceDetector"]().detect(images, module or load_module(), **more)


def motion(frames=3):
    return torch.randn(1, frames, 7, CONTEXT, generator=torch.Generator().manual_seed(3))


def test_motion_of_a_video(runs, monkeypatch):
    """The node is its parts in a row; 11 frames are read as 9."""
    module = load_module()
    embeds, boxes, points = detect(
        runs, monkeypatch, video(), module, adapter_scale=0.5, mouth_scale=2.0, emo_scale=3.0
    )
    pictures = _pictures(video()[:9])
    assert pictures[0].shape == (160, 150, 3) and pictures[0].dtype == np.uint8
    wanted_boxes, wanted = landmarks_of(FaceModels(runs.folder / "detection", "cpu"), pictures, lambda: None)
    assert np.array_equal(np.array(points), np.array(wanted)) and np.array_equal(
        np.array(boxes), np.array(wanted_boxes)
    )
    assert len(points) == 9 and points[0].shape == (222, 2)
    faces = torch.stack([_face(*pair) for pair in zip(pictures, wanted, strict=True)])
    features = encode_motion(load_motion_encoder(module.path, get_host()), faces)
    want, lengths = cut(module.project(features, Strengths(0.5, 2.0, 3.0)), 9)
    assert torch.equal(embeds, want) and embeds.shape == (1, 3, 37, CONTEXT)
    assert not embeds[0, 0, lengths[0, 0] :].any() and lengths[0, 0] < 37, "the first frame's context is filled up"


def test_detectors_see_blue_first_and_the_encoder_red():
    image = torch.zeros(1, 300, 300, 3)
    image[..., 0] = 1.0
    (picture,) = _pictures(image)
    assert picture[..., 2].min() == 255 and not picture[..., :2].any()
    points = np.zeros((222, 2))
    points[[182, 202, 36, 149, 133]] = np.array([[100, 100], [160, 100], [130, 130], [110, 160], [150, 160]])
    face = _face(picture, points)
    assert face.shape == (3, 224, 224) and torch.equal(face[:, 112, 112], torch.tensor([1.0, -1.0, -1.0]))


def test_what_does_not_fit_is_named(runs, monkeypatch):
    with pytest.raises(ValueError, match="got 4 images: give at least 5"):
        detect(runs, monkeypatch, video(4))
    with pytest.raises(ValueError, match="still.safetensors has no motion encoder"):
        detect(runs, monkeypatch, video(5), load_module("still"))
    with pytest.raises(ValueError, match="talk.safetensors is a FantasyTalking module, not a FantasyPortrait module"):
        load_module("talk")
    with pytest.raises(ValueError, match="connect FantasyPortraitModelLoader"):
        sampled(runs, load_model(), motion())


def sampled(runs, model, portrait, frames=9, cfg=1.0, **options):
    """A short run whose embeds have the motion."""
    text = TextEmbeds(positive=(prompt(1),), negative=(prompt(0),))
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(frames, 32, 32)
    if portrait is not None:
        (embeds,) = N["WanVideoAddFantasyPortrait"]().add(
            embeds, portrait, **{"strength": 1.0, **options.pop("add", {})}
        )
    settings = dict(steps=4, cfg=cfg, shift=5.0, seed=1, force_offload=True, scheduler="euler", riflex_freq_index=0)
    return N["WanVideoSampler"]().process(model, embeds, text_embeds=text, **settings, **options)[0]["samples"][0]


def test_a_run_moves(runs):
    model = load_model(fantasyportrait_model=load_module())
    assert not model.report.unused
    names = [type(e).__name__ for e in model.transformer.extensions]
    assert "FantasyPortrait" in names and "FantasyTalking" not in names
    plain, moved = sampled(runs, model, None), sampled(runs, model, motion())
    assert moved.isfinite().all() and relative(moved, plain) > 1e-3
    assert torch.equal(sampled(runs, model, motion(), add={"strength": 0.0}), plain)
    late = sampled(runs, model, motion(), add={"start_percent": 0.9})
    assert torch.equal(late, plain), "the last of four steps begins at 0.75"
    guided = sampled(runs, model, motion(), add={"portrait_cfg": 4.0})
    assert guided.isfinite().all() and relative(guided, moved) > 1e-3
    with pytest.raises(ValueError, match="motion for 2 latent frames, but the video has 3"):
        sampled(runs, model, motion(2))


def test_both_modules_join_one_model(runs):
    """Their projections have one name, and stay out of the transformer."""
    talk = N["FantasyTalkingModelLoader"]().loadmodel("talk.safetensors", "fp32")[0]
    model = load_model(fantasyportrait_model=load_module(), fantasytalking_model=talk)
    names = [type(e).__name__ for e in model.transformer.extensions]
    assert names.index("FantasyTalking") < names.index("FantasyPortrait") and not model.report.unused
    state, tensors = model.transformer.state_dict(), portrait_module().tensors
    own = {key: value for key, value in state.items() if PORTRAIT.owns(key)}
    assert len(own) == 6 and all(torch.equal(value, tensors[f"ip_adapter.{key}"]) for key, value in own.items())


def test_embeds_keep_what_they_have():
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(9, 32, 32)
    (added,) = N["WanVideoAddFantasyPortrait"]().add(embeds, motion(), 0.5, 0.1, 0.8, 3.0)
    (payload,) = (p for p in added.payloads if isinstance(p, PortraitMotion))
    assert (payload.strength, payload.start, payload.end, payload.cfg_scale) == (0.5, 0.1, 0.8, 3.0)
    assert added.latent_shape == embeds.latent_shape and len(added.payloads) == len(embeds.payloads) + 1


def test_landmarks_are_drawn():
    draw = N["LandmarksToImage"]().drawkeypoints
    points = [np.array([[5.9, 3.2], [-9.0, 1.0], [0.0, 7.0]]), np.zeros((0, 2))]
    (drawn,) = draw(points, 12, 8)
    lit = {(int(x), int(y)) for y, x in drawn[0, ..., 0].nonzero()}
    around = {
        (0, 0),
        (1, 0),
        (-1, 0),
        (2, 0),
        (-2, 0),
        (0, 1),
        (1, 1),
        (-1, 1),
        (0, -1),
        (1, -1),
        (-1, -1),
        (0, 2),
        (0, -2),
    }
    want = {(x + a, y + b) for x, y in ((5, 3), (0, 7)) for a, b in around}
    assert lit == {(x, y) for x, y in want if 0 <= x < 12 and 0 <= y < 8}
    assert drawn.shape == (2, 8, 12, 3) and not drawn[1].any() and drawn[0].unique().tolist() == [0.0, 1.0]
    pictures = video(2, size=(10, 14))
    (drawn,) = draw(points, 12, 8, pictures)
    assert drawn.shape == (2, 10, 14, 3) and torch.equal(drawn[0, 3, 5], torch.ones(3))
    changed = (drawn[0] != pictures[0]).any(-1)
    assert changed.sum() <= 2 * len(around) and not drawn[1].any()
    with pytest.raises(ValueError, match="landmarks of 2 frames but 1 images"):
        draw(points, 12, 8, pictures[:1])
    with pytest.raises(ValueError, match="no landmarks to draw"):
        draw([], 12, 8)


def test_landmarks_of_face_embeds():
    draw, pictures = N["DrawArcFaceLandmarks"]().draw, video(2, size=(10, 14))
    (drawn,) = draw({"landmarks": np.array([[6.0, 5.0]])}, pictures)
    assert drawn.shape == (1, 10, 14, 3) and torch.equal(drawn[0, 5, 9], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(drawn[0, 0], pictures[0, 0])
    for embeds in ({}, SimpleNamespace()):
        with pytest.raises(ValueError, match="have no landmarks"):
            draw(embeds, pictures)
