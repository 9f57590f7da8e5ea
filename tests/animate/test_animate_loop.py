"""Footage and the loop over windows: what each one sees, the frames that come out, and what is refused."""

from dataclasses import replace

import pytest
import torch
from contract import cases_of
from float64_wan import rand
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.animate import loop as module
from wanvideo_wrapper.animate.extension import Character
from wanvideo_wrapper.animate.footage import Footage, kept_background, mask_channels, there_and_back
from wanvideo_wrapper.animate.loop import CharacterLoop
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.uni3c.extension import Uni3CArgs
from wanvideo_wrapper.wanvideo.images import to_video
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.windows import ContextOptions

HOST = StandaloneHost(device="cpu")
SIZES = cases_of("animate")["animate"].extension
SIDE, FRAMES, WINDOW = 32, 20, 9
EIGHT_BITS = 1 / 255 + 1e-4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate")
    tiny.transformer(in_dim=36, extensions=(SIZES,)).save(folder / "animate.safetensors", torch.float32)
    tiny.vae(base_dim=4).save(folder / "vae.safetensors", torch.float32)
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=HOST)
    return load_wan_model(folder / "animate.safetensors", LoadOptions(base_dtype=torch.float32), HOST, SYSTEMS), vae


def video(frames, seed, side=SIDE, channels=3):
    return rand(channels, frames, side, side, seed=seed).tanh()


def request_of(parts, *, frames=FRAMES, colormatch="disabled", options=None, **footage):
    model, vae = parts
    fields = dict(
        reference=video(1, 1), poses=video(13, 2), faces=video(FRAMES, 3, 8), background=video(FRAMES, 4),
        kept=(rand(1, FRAMES, 4, 4, seed=5) > 0).float(), pose_strength=1.0, face_strength=1.0,
    )  # fmt: skip
    loop = CharacterLoop(
        footage=Footage(vae=vae, **{**fields, **footage}), frames=frames, window_frames=WINDOW, colormatch=colormatch
    )
    image = ImageEmbeds(latent_shape=(16, 6, 4, 4), num_frames=frames, leading_latents=1, loop=loop)
    text = TextEmbeds(positive=(rand(4, tiny.TEXT_DIM),), negative=(rand(4, tiny.TEXT_DIM, seed=1),))
    schedule = make_schedule(ScheduleSpec(name="euler", steps=2, shift=5.0))
    settings = {"model": model, "text": text, "image": image, "cfg": 2.0, "seed": 7, "schedule": schedule}
    return SampleRequest(**{**settings, **(options or {})})


@pytest.fixture
def seen(monkeypatch):
    """The character and the noise of each window."""
    windows, denoise = [], module.denoise

    def watching(denoiser, schedule, **options):
        windows.append((next(p for p in denoiser._conditions.payloads if isinstance(p, Character)), options["latents"]))
        return denoise(denoiser, schedule, **options)

    monkeypatch.setattr(module, "denoise", watching)
    return windows


def close(got, want, atol=1e-4):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


def test_each_window_begins_with_the_last_frame_of_the_one_before(parts, seen):
    request = request_of(parts)
    result, _ = sample(request, HOST)
    made, vae, footage = result["video"].movedim(-1, 0), parts[1], request.image.loop.footage
    assert made.shape == (3, FRAMES, SIDE, SIDE) and made.isfinite().all() and len(seen) == 3
    generator = torch.Generator().manual_seed(7)
    # A seed's first noise, of the whole video, is no window's.
    torch.randn(request.image.latent_shape, generator=generator)
    back = [*range(20), *range(18, 0, -1)]
    for index, (part, noise) in enumerate(seen):
        places = [back[place] for place in range(8 * index, 8 * index + WINDOW)]
        assert torch.equal(noise, torch.randn(16, 4, 4, 4, generator=generator))
        assert torch.equal(part.faces[0], footage.faces[:, places])
        poses = [*range(13), *range(11, 0, -1), *range(13)]
        close(part.pose[0], vae.encode(footage.poses[:, poses[8 * index : 8 * index + WINDOW]], quiet=True))
        background, kept = footage.background[:, places].clone(), footage.kept[:, places].clone()
        if index:
            background[:, 0], kept[:, 0] = made[:, 8 * index], 1
        close(part.cond[0, 4:, :1], vae.encode(footage.reference, quiet=True))
        # The frames of the result have 8 bits; the one that a window begins with has not been rounded.
        close(part.cond[0, 4:, 1:], vae.encode(background, quiet=True), atol=2e-2 if index else 1e-4)
        assert part.cond[0, :4, 0].eq(1).all()
        assert part.cond[0, :4, 1].eq(kept[0, :1]).all() and torch.equal(part.cond[0, :4, 2], kept[0, 1:5])
    assert result["samples"].shape == (1, 16, 4, 4, 4)


def test_a_schedule_that_begins_below_noise_alone_scales_it(parts, seen):
    rcm = {"schedule": make_schedule(ScheduleSpec(name="rcm", steps=1, shift=5.0))}
    request = request_of(parts, frames=9, options=rcm)
    sample(request, HOST)
    ((_, noise),) = seen
    generator = torch.Generator().manual_seed(7)
    torch.randn(request.image.latent_shape, generator=generator)
    torch.testing.assert_close(noise, torch.randn(16, 4, 4, 4, generator=generator) * 120 / 121)


def test_finished_windows_outlive_a_run_without_memory(parts, tmp_path, monkeypatch):
    sampled = module.WindowMaker._sample

    def full(self, index, *rest):
        if index == 2:
            raise torch.OutOfMemoryError("no memory")
        return sampled(self, index, *rest)

    monkeypatch.setattr(module.WindowMaker, "_sample", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^Window 3 of 3 \(frames 16-24\): .*The 17 frames before are in"):
        sample(request_of(parts), StandaloneHost(device="cpu", outputs=tmp_path))
    assert len(list(tmp_path.glob("*_unfinished/frame_*.png"))) == 17


def test_without_a_background_there_is_grey_and_nothing_is_given(parts, seen):
    made, _ = sample(request_of(parts, background=None, kept=None, faces=None, poses=None, frames=9), HOST)
    (part, _), vae = seen[0], parts[1]
    assert part.faces is None and part.pose is None and made["video"].shape == (9, SIDE, SIDE, 3)
    close(part.cond[0, 4:, 1:], vae.encode(torch.zeros(3, 9, SIDE, SIDE), quiet=True))
    assert part.cond[0, :4, 1:].eq(0).all()
    close(made["video"].movedim(-1, 0), vae.decode(made["samples"][0, :, 1:], quiet=True).clamp(-1, 1), EIGHT_BITS)


def test_colors_are_those_of_the_reference(parts):
    reference = video(1, 1) * 0.1 + 0.6
    plain, matched = (
        sample(request_of(parts, frames=9, reference=reference, colormatch=method), HOST)[0]["video"]
        for method in ("disabled", "mkl")
    )
    want = reference[:, 0].movedim(0, -1).mean((0, 1))
    assert (matched.mean((0, 1, 2)) - want).abs().max() < 0.05 < (plain.mean((0, 1, 2)) - want).abs().max()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": None}, "no prompt"),
        ({"text": TextEmbeds(positive=(torch.ones(4, 64),))}, "no negative prompt"),
        ({"context": ContextOptions()}, "two ways to make a long video"),
        ({"samples": {"samples": rand(1, 16, 4, 4, 4)}}, "takes no samples"),
        ({"schedule": make_schedule(ScheduleSpec(name="multitalk", steps=2, shift=5.0))}, "is not for a frame"),
        ({"schedule": make_schedule(ScheduleSpec(name="euler", steps=3, shift=5.0, end_step=2))}, "of the 3 steps"),
        ({"samples": {"samples": rand(1, 16, 4, 4, 4), "video": rand(9, 32, 32, 3)}}, "in windows; of its latents"),
        ({"payloads": (Uni3CArgs(None, rand(1, 16, 2, 4, 4)),)}, "render_latent of Uni3C has 2 frames"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(options, says, parts, seen):
    with pytest.raises(ValueError, match=says):
        sample(request_of(parts, options=options), HOST)
    assert not seen


def test_the_vae_of_another_model_is_refused_before_work(parts, seen, monkeypatch):
    monkeypatch.setattr(type(parts[1]), "latent_channels", 48)
    with pytest.raises(ValueError, match="^The VAE makes latents of 48 channels but the model predicts 16"):
        sample(request_of(parts), HOST)
    assert not seen


def test_the_last_window_may_reach_behind_what_a_system_brings(parts):
    """20 frames in three windows of 9: of five latents and the reference, seven would be read."""
    render = Uni3CArgs(None, rand(1, 16, 6, 4, 4))
    module.WindowMaker(request_of(parts, options={"payloads": (render,)}), HOST).check()


def test_videos_that_end_early_run_back_and_forth():
    places = torch.arange(3.0)[None, :, None, None]
    assert there_and_back(places, 8).flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert there_and_back(places[:, :1], 3).flatten().tolist() == [0, 0, 0]
    assert there_and_back(places, 2).flatten().tolist() == [0, 1]


def test_masks_of_frames_are_channels_of_latents():
    frames = torch.arange(9.0)[None, :, None, None]
    assert mask_channels(frames).flatten(1).T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    mask = torch.zeros(2, 16, 16)
    mask[0, :8] = 1
    assert kept_background(mask, 2, 2).tolist() == [[[[0, 0], [1, 1]], [[1, 1], [1, 1]]]]


def test_the_node_makes_a_short_video_or_a_loop(parts):
    _, vae = parts
    process = N["WanVideoAnimateEmbeds"]().process
    picture, clip = torch.rand(1, 40, 40, 3), torch.rand(5, 40, 40, 3)
    sizes = (vae, SIDE, SIDE, 13, True, 77, "disabled", 0.5, 0.25)
    (embeds,) = process(*sizes, ref_images=picture, pose_images=clip, bg_images=clip, mask=torch.ones(5, 40, 40))
    (character,) = embeds.payloads
    assert embeds.latent_shape == (16, 5, 4, 4) and (embeds.num_frames, embeds.leading_latents) == (13, 1)
    assert character.cond.shape == (1, 20, 5, 4, 4) and character.pose.shape == (1, 16, 4, 4, 4)
    assert character.faces.shape == (1, 3, 13, 512, 512) and not character.faces.any()
    assert character.cond[0, :4, 0].eq(1).all() and character.cond[0, :4, 1:].eq(0).all()
    assert (float(character.pose_strength), float(character.face_strength)) == (0.5, 0.25) and embeds.loop is None
    wide = torch.rand(5, 40, 61, 3)
    (embeds,) = process(vae, SIDE, SIDE, 13, True, 9, "mkl", 1.0, 1.0, ref_images=picture, face_images=wide)
    assert embeds.loop.windows == 2 and embeds.loop.colormatch == "mkl" and not embeds.payloads
    assert embeds.loop.footage.faces.shape == (3, 5, 512, 512)
    torch.testing.assert_close(embeds.loop.footage.faces, to_video(wide[:, :, 10:51], 512, 512))
    for options, says in (({}, "connect ref_images"), ({"ref_images": clip}, "ref_images has 5")):
        with pytest.raises(ValueError, match=says):
            process(*sizes, **options)
    with pytest.raises(ValueError, match="5 or more"):
        process(vae, SIDE, SIDE, 13, True, 3, "mkl", 1.0, 1.0, ref_images=picture)


def test_videos_that_end_before_the_new_one_are_told(parts, caplog):
    sizes = (parts[1], SIDE, SIDE, 9, True, 77, "disabled", 1.0, 1.0)
    still, short, whole = (torch.rand(count, 32, 32, 3) for count in (1, 5, 9))
    given = {"pose_images": short, "bg_images": still, "face_images": whole}
    N["WanVideoAnimateEmbeds"]().process(*sizes, ref_images=still, **given)
    (line,) = caplog.messages
    assert line.startswith("pose_images has 5 frames, and the video 9: it runs back and forth.")


def test_a_short_video_is_sampled_and_decoded_without_its_reference(parts):
    model, vae = parts
    (embeds,) = N["WanVideoAnimateEmbeds"]().process(
        vae, SIDE, SIDE, 9, True, 77, "disabled", 1.0, 1.0, ref_images=torch.rand(1, 32, 32, 3),
        pose_images=torch.rand(9, 32, 32, 3),
    )  # fmt: skip
    request = replace(request_of(parts), image=embeds)
    result, _ = sample(request, HOST)
    assert result["samples"].shape == (1, 16, 4, 4, 4)
    (images,) = N["WanVideoDecode"]().decode(vae, result, False, 272, 272, 144, 128)
    assert images.shape == (9, SIDE, SIDE, 3)
