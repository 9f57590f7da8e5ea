"""Fun Control against diffusers' transformer on the channels, and with the frame in front, that its authors give it."""

from dataclasses import replace

import contract
import pytest
import torch
from contract import ALL_CASES
from published import config, latents_of_tokens, published, randomized, relative, velocity
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fun_control.extension import ControlSignal, FunControl
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.phantom.extension import Phantom, SubjectReferences
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import overrides
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.rope import rope_table
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6
PLACES = HEIGHT * WIDTH // 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VIDEO, COND, MASK = (rand(1, c, FRAMES, HEIGHT, WIDTH, seed=s) for s, c in ((5, 16), (6, 16), (7, 4)))
PICTURE = rand(1, 16, HEIGHT, WIDTH, seed=8)
NOTHING = torch.zeros_like(VIDEO)
FIRST_ONLY = torch.cat((COND[:, :, :1], torch.zeros_like(COND[:, :, 1:])), dim=2)


def build(in_dim, reference_dim=0):
    model = randomized(WanModel(config(in_dim), (FunControl(reference_dim), ImageToVideo())))
    return model, published(model, "ref_conv.")


def inputs(*payloads, batch=1, **more):
    fields = dict(
        latents=rand(batch, 16, FRAMES, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip
    return ModelInputs(**{**fields, **more})


def joined(latents, *parts):
    return torch.cat((latents, *(part.expand(latents.shape[0], -1, -1, -1, -1) for part in parts)), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("in_dim", "picture", "behind"),
    [
        (32, None, (VIDEO,)),
        (48, None, (VIDEO, NOTHING)),
        (48, ImageCondition(COND, MASK), (VIDEO, FIRST_ONLY)),
        (52, None, (VIDEO, torch.zeros_like(MASK), NOTHING)),
        (52, ImageCondition(COND, MASK), (VIDEO, MASK, COND)),
    ],
)
def test_control_comes_before_the_picture(in_dim, picture, behind, batch):
    model, reference = build(in_dim)
    asked = inputs(*(p for p in (picture, ControlSignal(VIDEO)) if p is not None), batch=batch)
    assert relative(model(asked), velocity(reference, joined(asked.latents, *behind), asked)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("in_dim", [32, 48, 52])
def test_references_of_another_system_are_no_picture(in_dim):
    """They are tokens: the channels of a picture that is not connected stay empty, as without them."""
    model = randomized(WanModel(config(in_dim), (FunControl(), ImageToVideo(), Phantom())))
    references = rand(1, in_dim, 2, HEIGHT, WIDTH, seed=9)
    references[:, 16:] = 0
    asked = inputs(ControlSignal(VIDEO), SubjectReferences(references[:, :16]))
    empty = torch.zeros(1, in_dim - 32, FRAMES, HEIGHT, WIDTH)
    frames = torch.cat((joined(asked.latents, VIDEO, empty), references), dim=2)
    want = velocity(published(model), frames, asked)[:, :, :FRAMES]
    assert relative(model(asked), want) < 1e-5


def is_no_channels(case):
    return case.payload.encoded and not overrides(case.extension, "latents") and case.extension.layout is None


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, case in ALL_CASES.items() if is_no_channels(case)])
def test_no_system_whose_pictures_are_no_channels_stands_for_one(name):
    case = ALL_CASES[name]
    sizes = WanConfig(**{**case.config.__dict__, "in_dim": 48})
    model = contract.randomize(WanModel(sizes, (FunControl(), case.extension)))
    control = ControlSignal(torch.randn(1, 16, contract.FRAMES, contract.HEIGHT, contract.WIDTH))
    asked = contract.inputs(control, case.payload)
    assert model(asked).isfinite().all()
    assert not torch.equal(model(asked), model(replace(asked, payloads=(control,))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 1.0, True), (0.0, 0.3, True), (0.31, 1.0, False)]
)
def test_control_is_empty_outside_its_steps_and_the_reference_stays(start, end, acts):
    model, _ = build(48, reference_dim=16)
    got = model(inputs(ControlSignal(VIDEO, PICTURE, start, end)))
    want = model(inputs(ControlSignal(VIDEO if acts else NOTHING, PICTURE)))
    assert torch.equal(got, want)
    assert torch.equal(got, model(inputs(ControlSignal(None, PICTURE)))) != acts


def reference_tokens(model):
    """[1, places, C] float64: each patch of 2 x 2 latents by the kernel."""
    patches = PICTURE[0].double().reshape(16, HEIGHT // 2, 2, WIDTH // 2, 2)
    kernel, bias = model.ref_conv.weight.double(), model.ref_conv.bias.double()
    return (torch.einsum("chpwq,dcpq->hwd", patches, kernel) + bias).flatten(0, 1)[None]


@torch.no_grad()
@pytest.mark.parametrize("times", [None, (0.0, 310.5, 731.0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_reference_is_a_frame_in_front(times, batch):
    model, reference = build(52, reference_dim=16)
    asked = inputs(ImageCondition(COND, MASK), ControlSignal(VIDEO, PICTURE), batch=batch)
    per_token = None
    if times is not None:
        asked = inputs(*asked.payloads, timestep=torch.tensor([times]).expand(batch, -1), batch=batch)
        per_token = torch.tensor([[times[-1], *times]]).expand(batch, -1).repeat_interleave(PLACES, dim=1)
    front = latents_of_tokens(model, reference_tokens(model), (1, HEIGHT // 2, WIDTH // 2))
    video = joined(asked.latents, VIDEO, MASK, COND)
    want = velocity(reference, torch.cat((front.expand(batch, -1, -1, -1, -1), video), dim=2), asked, per_token)
    got = model(asked)
    assert relative(got, want[:, :, 1:]) < 2e-5
    assert relative(model(inputs(*asked.payloads[:1], ControlSignal(VIDEO), batch=batch)), got) > 1e-3


@torch.no_grad()
def test_positions_begin_with_the_reference_under_riflex_too():
    model, _ = build(48, reference_dim=16)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.extend((args[1].rope, args[0])))
    model(inputs(ControlSignal(VIDEO, PICTURE), riflex_index=2))
    assert seen[1].is_contiguous()
    whole = rope_table((FRAMES + 1, HEIGHT // 2, WIDTH // 2), 24, riflex_index=2, riflex_frames=FRAMES)
    assert torch.equal(seen[0], torch.cat((whole[PLACES:], whole[:PLACES])))


def test_windows_have_their_own_control_and_the_whole_reference():
    signal = ControlSignal(rand(1, 16, 8, HEIGHT, WIDTH), PICTURE)
    part = signal.window(Window(latents=(2, 4, 7), pixels=tuple(range(9))))
    assert torch.equal(part.video, signal.video[:, :, [2, 4, 7]]) and part.reference is PICTURE
    assert ControlSignal(None, PICTURE).window(whole_window(3)).video is None
    for window, says in [
        (whole_window(9), "has 8 latent frames but the video has 9:"),
        (whole_window(7), "has 8 latent frames but the video has 7:"),
        (Window(latents=(7, 8), pixels=tuple(range(5))), "has 8 latent frames but the video has 9 or more"),
    ]:
        with pytest.raises(ValueError, match=says):
            signal.window(window)


def test_detected_by_the_channels_that_are_read():
    def found(in_dim, out_dim=16, **more):
        shapes = {"patch_embedding.weight": (48, in_dim, 1, 2, 2), "head.head.weight": (4 * out_dim, 48), **more}
        return next((e for e in SYSTEMS.detect(shapes) if isinstance(e, FunControl)), None)

    assert [found(n) for n in (16, 36, 20)] == [None] * 3 and found(48, 48) is None and found(100, 48) is None
    assert [found(n) for n in (32, 48, 52)] == [FunControl()] * 3 and found(148, 48) == FunControl()
    assert found(52, **{"ref_conv.weight": (48, 16, 2, 2)}) == FunControl(16)
    assert found(32, **{"control_adapter.conv.weight": (48, 1536, 2, 2)}) is None


def test_what_does_not_fit_is_named():
    model, _ = build(48)
    with pytest.raises(ValueError, match=r"latents \(16, 3, 4, 4\) but the video has \(16, 3, 4, 6\)"):
        model(inputs(ControlSignal(VIDEO[..., :4])))
    with pytest.raises(ValueError, match="no ref_conv.weight"):
        model(inputs(ControlSignal(VIDEO, PICTURE)))
    model, _ = build(48, reference_dim=16)
    for bad in (PICTURE[:, :8], PICTURE[..., :4]):
        with pytest.raises(ValueError, match="fun_ref_image has latents"):
            model(inputs(ControlSignal(VIDEO, bad)))


def test_nodes():
    video, picture = {"samples": rand(1, 16, 6, 4, 4)}, {"samples": rand(1, 16, 2, 4, 4)}
    (embeds,) = N["WanVideoControlEmbeds"]().process(video, 0.1, 0.9, picture)
    assert (embeds.latent_shape, embeds.num_frames) == ((16, 6, 4, 4), 21)
    (signal,) = embeds.payloads
    assert torch.equal(signal.video, video["samples"]) and torch.equal(signal.reference, picture["samples"][:, :, 0])
    assert (signal.start, signal.end) == (0.1, 0.9)
    clip = ClipImage(rand(1, 7, 16))
    given = ImageEmbeds(latent_shape=(16, 6, 4, 4), num_frames=21, payloads=(signal, clip), leading_latents=1)
    (added,) = N["WanVideoAddControlEmbeds"]().process(given, 0.2, 0.7, fun_ref_image=picture)
    assert added.payloads[0] is clip and added.leading_latents == 1
    assert len(added.payloads) == 2 and added.payloads[1].video is None and added.payloads[1].start == 0.2


@pytest.fixture
def models(tmp_path):
    before = get_host()
    for in_dim in (48, 52):
        path = tmp_path / f"diffusion_models/control_{in_dim}.safetensors"
        tiny.transformer(in_dim=in_dim, extensions=(FunControl(16),)).save(path)
    tiny.transformer(in_dim=16).save(tmp_path / "diffusion_models/t2v.safetensors")
    tiny.text_encoder().save(tmp_path / "text_encoders/t5.safetensors")
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield
    set_host(before)


def test_sampler(models):
    def run(name, embeds, **options):
        model = N["WanVideoModelLoader"]().loadmodel(name, "fp32", "offload_device", "disabled")[0]
        encode = N["WanVideoTextEncodeCached"]().process
        text = encode("t5.safetensors", "fp32", "a person", "bad", use_disk_cache=False)[0]
        settings = dict(steps=2, cfg=2.0, shift=5.0, seed=1, force_offload=True, scheduler="euler", riflex_freq_index=0)
        return N["WanVideoSampler"]().process(model, embeds, text_embeds=text, **settings, **options)[0]["samples"]

    video, picture = {"samples": rand(1, 16, 6, 4, 4)}, {"samples": rand(1, 16, 1, 4, 4)}
    (control,) = N["WanVideoControlEmbeds"]().process(video, 0.0, 1.0, picture)
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(21, 32, 32, control)
    (windows,) = N["WanVideoContextOptions"]().process("static_standard", 13, 4, 4, True, False)
    for name in ("control_48.safetensors", "control_52.safetensors"):
        whole = run(name, embeds)
        assert whole.shape == (1, 16, 6, 4, 4) and torch.equal(whole, run(name, control))
        parts = run(name, embeds, context_options=windows)
        assert parts.isfinite().all() and not torch.equal(parts, whole)
    with pytest.raises(ValueError, match="no channels for a control video"):
        run("t2v.safetensors", embeds)
