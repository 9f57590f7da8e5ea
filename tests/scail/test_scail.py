"""SCAIL against the authors' order of operations in float64: picture, video, poses; and its nodes."""

import pytest
import torch
import torch.nn.functional as F
from contract import build
from float64_wan import Exact, places, rand, relative
from published_keys import keys_of
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.scail.extension import PosedCharacter, Scail
from wanvideo_wrapper.scail.nodes import WanVideoAddSCAILPoseEmbeds, WanVideoAddSCAILReferenceEmbeds
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 8
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=5, in_dim=20)
PICTURE, SMALL, LARGE = (
    rand(1, 16, 1, HEIGHT, WIDTH, seed=5),
    rand(1, 16, FRAMES, HEIGHT // 2, WIDTH // 2, seed=6),
    rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=7),
)
PROMPT, OTHER = rand(4, 8, seed=2), rand(3, 8, seed=3)


@pytest.fixture(scope="module")
def model():
    return build(Scail(channels=20), config=CONFIG)[1]


def character(picture=PICTURE, poses=SMALL, strength=0.7, pose_strength=1.3, **fields):
    return PosedCharacter(
        reference=picture, reference_strength=torch.tensor([strength]), poses=poses, pose_strength=pose_strength,
        **fields,
    )  # fmt: skip


def asked(*payloads, frames=FRAMES, **more):
    fields = dict(
        latents=rand(1, 16, frames, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([431.0]), text=(PROMPT,),
        payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip
    return ModelInputs(**{**fields, **more})


def marked(latents, mask):
    return torch.cat((latents, torch.full_like(latents[:, :4], mask)), dim=1)


def expected(model, given, picture=None, poses=None, strength=0.7, pose_strength=1.3, prompt=PROMPT):
    """The picture's frame, the video's frames behind it, then the poses from column 120 on."""
    exact, frames = Exact(model), given.latents.shape[2]
    rows, columns = range(HEIGHT // 2), range(WIDTH // 2)
    whole, first = marked(given.latents, 0.0), 0
    if picture is not None:
        whole, first = torch.cat((marked(picture, 1.0) * strength, whole), dim=2), 1
    x, turns = exact.patches(whole), exact.turns_at(places(range(first + frames), rows, columns))
    if poses is not None:
        w = exact.weights
        seen = F.conv3d(
            marked(poses, 1.0).double(), w["patch_embedding_pose.weight"], w["patch_embedding_pose.bias"],
            stride=(1, 2, 2),
        )  # fmt: skip
        x = torch.cat((x, seen.flatten(2).mT * pose_strength), dim=1)
        across, down = LARGE.shape[4] // poses.shape[4], LARGE.shape[3] // poses.shape[3]
        for time, row, column in places(range(first, first + frames), rows[::down], columns[::across]):
            near = places([time], range(row, row + down), range(120 + column, 120 + column + across))
            turns = torch.cat((turns, exact.turns_at(near).mean(dim=0, keepdim=True)))
    (time, now), text = exact.times(given.timestep), exact.text([prompt])
    for i in exact.blocks:
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = exact.modulated(i, now)
        q, k, v = exact.self_qkv(i, exact.norm(x) * (1 + gain) + shift, turns)
        x = x + exact.linear(f"blocks.{i}.self_attn.o", exact.attention(q, k, v)) * gate
        x = x + exact.cross(i, x, text)
        x = x + exact.feed_forward(i, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_gate
    grid = (first + frames, HEIGHT // 2, WIDTH // 2)
    return exact.velocity(x[:, : grid[0] * grid[1] * grid[2]], time, grid)[:, :, first:]


@torch.no_grad()
@pytest.mark.parametrize("picture", [None, PICTURE])
@pytest.mark.parametrize("poses", [None, SMALL, LARGE])
def test_picture_and_poses_are_tokens_beside_the_video(model, picture, poses):
    given, read = asked(character(picture, poses)), []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: read.append(args[0].is_contiguous()))
    got = model(given)
    handle.remove()
    assert read == [True] and got.shape == given.latents.shape
    assert relative(got, expected(model, given, picture, poses)) < 1e-5
    if picture is not None or poses is not None:
        assert relative(got, expected(model, given)) > 1e-2


@torch.no_grad()
def test_each_is_there_in_its_steps(model):
    fields = {"picture": PICTURE, "poses": SMALL}
    for spans, there in (
        ({"reference_steps": (0.31, 1.0)}, {"poses"}), ({"pose_steps": (0.0, 0.29)}, {"picture"}),
        ({"reference_steps": (0.3, 1.0), "pose_steps": (0.0, 0.3)}, {"picture", "poses"}),
        ({"reference_steps": (0.4, 1.0), "pose_steps": (0.0, 0.2)}, set()),
    ):  # fmt: skip
        given = asked(character(**spans))
        want = expected(model, given, **{name: value for name, value in fields.items() if name in there})
        assert relative(model(given), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
def test_passes_without_the_prompt_see_an_empty_picture(model, batched):
    payload = character()
    denoiser = Denoiser(
        model, Conditions(positive=PROMPT, negative=OTHER, payloads=(payload,)),
        guidance=Guidance(cfg=(3.0,), payloads=(payload,), batched=batched), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    given = asked()
    got = denoiser(given.latents[0], torch.tensor(431.0), given.step)
    seen = expected(model, given, PICTURE, SMALL)
    empty = expected(model, given, PICTURE, SMALL, strength=0.0, prompt=OTHER)
    assert relative(got, (empty + 3.0 * (seen - empty))[0]) < 1e-5


@torch.no_grad()
def test_windows_take_their_poses(model):
    window = Window(latents=(1, 2), pixels=tuple(range(5)))
    given = asked(character().window(window), frames=2)
    assert relative(model(given), expected(model, given, PICTURE, SMALL[:, :, 1:])) < 1e-5
    assert character(poses=None).window(window).poses is None
    with pytest.raises(ValueError, match="SCAIL pose video has 3 latent frames but the video has 4"):
        character().window(whole_window(4))


def test_what_does_not_fit_is_said(model):
    with pytest.raises(ValueError, match=r"ref_image are \(1, 4, 6\).*video's \(3, 4, 8\): resize the picture"):
        model(asked(character(PICTURE[..., :6])))
    for poses in (SMALL[..., :2], SMALL[:, :, :2], rand(1, 16, FRAMES, HEIGHT, WIDTH // 2)):
        with pytest.raises(ValueError, match="pose_images are .* render them at half of its width and height"):
            model(asked(character(poses=poses)))
    wide = rand(1, 16, FRAMES, 6, WIDTH)
    with pytest.raises(ValueError, match="must divide by 32"):
        model(asked(character(None, rand(1, 16, FRAMES, 3, WIDTH // 2)), latents=wide))


def test_keys_and_shapes_are_the_published_ones():
    shapes = keys_of("scail_extra")
    (system,) = [e for e in SYSTEMS.detect(shapes) if isinstance(e, Scail)]
    with torch.device("meta"):
        model = WanModel(WanConfig(dim=5120, ffn_dim=64, num_heads=40, num_layers=1, in_dim=20), (system,))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if system.owns(k)} == shapes


@torch.no_grad()
def test_nodes(tmp_path):
    tiny.vae(base_dim=4).save(tmp_path / "vae.safetensors")
    vae = load_vae(tmp_path / "vae.safetensors", dtype=torch.float32, host=StandaloneHost(device="cpu"))
    pictures, drawn = torch.rand(2, 32, 64, 4), torch.rand(10, 16, 32, 3)
    old, new = ClipImage(rand(1, 5, 4)), ClipImage(rand(1, 5, 4, seed=8))
    empty = ImageEmbeds(latent_shape=(16, 3, 4, 8), num_frames=9, payloads=(old,))
    posed = WanVideoAddSCAILPoseEmbeds().add(empty, vae, drawn, 0.5, 0.1, 0.9)[0]
    embeds = WanVideoAddSCAILReferenceEmbeds().add(posed, vae, pictures, 2.0, 0.2, 0.8, clip_embeds=new)[0]
    kept, clip = embeds.payloads
    assert clip is new and posed.payloads[0] is old and len(empty.payloads) == 1
    assert torch.equal(kept.reference[0], vae.encode(pictures[:1, ..., :3].permute(3, 0, 1, 2) * 2 - 1))
    assert torch.equal(kept.poses[0], vae.encode(drawn[:9].permute(3, 0, 1, 2) * 2 - 1))
    assert kept.reference_strength.tolist() == [2.0] and kept.reference_steps == (0.2, 0.8)
    assert (kept.pose_strength, kept.pose_steps) == (0.5, (0.1, 0.9))
    again = WanVideoAddSCAILPoseEmbeds().add(embeds, vae, drawn, 1.0)[0]
    latest = again.payloads[1]
    assert len(again.payloads) == 2 and latest.reference is kept.reference
    assert (latest.pose_strength, latest.pose_steps, latest.reference_steps) == (1.0, (0.0, 1.0), (0.2, 0.8))
