"""Fun Camera: rays against projection, the adapter and the whole model against their definition in float64."""

import pytest
import torch
from published import config, latents_of_tokens, published, randomized, relative, velocity
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fun_camera.extension import CameraAdapter, CameraPath, FunCamera
from wanvideo_wrapper.fun_camera.plucker import by_latent_frame, rays
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH, FACTOR = 3, 4, 6, 2


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def camera(seed):
    """World to camera, [4, 4] float64: a random rotation and shift."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.linalg.qr(rand(3, 3, seed=seed).double()).Q
    matrix[:3, 3] = rand(3, seed=seed + 50).double()
    return matrix


def pose(matrix, fx=0.6, fy=1.1, cx=0.48, cy=0.53):
    return [0.0, fx, fy, cx, cy, 0.0, 0.0, *matrix[:3].flatten().tolist()]


@pytest.mark.parametrize(("width", "height"), [(12, 20), (40, 10), (16, 9)])
def test_points_of_a_ray_are_seen_at_its_pixel(width, height):
    """The line of direction d and moment m passes through d x m; every point of it projects to the pixel's center."""
    cameras = [camera(seed) for seed in range(3)]
    found = rays([pose(matrix) for matrix in cameras], width, height)
    assert found.shape == (3, 6, height, width) and found.dtype == torch.float32
    fx, fy = 0.6 * width, 1.1 * height
    shape = width / height
    if shape < 16 / 9:
        fx *= height * 16 / 9 / width
    else:
        fy *= width / (16 / 9) / height
    for index, matrix in enumerate(cameras):
        first_to_camera = matrix @ torch.linalg.inv(cameras[0])
        place = torch.linalg.inv(first_to_camera)[:3, 3]
        moment, direction = found[index].double().permute(1, 2, 0).split(3, dim=-1)
        torch.testing.assert_close(direction.norm(dim=-1), torch.ones(height, width).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.linalg.cross(place.expand_as(direction), direction), moment, rtol=0, atol=1e-5)
        point = torch.linalg.cross(direction, moment) + 7.0 * direction
        seen = point @ first_to_camera[:3, :3].T + first_to_camera[:3, 3]
        assert (seen[..., 2] > 0).all()
        across, down = fx * seen[..., 0] / seen[..., 2] + 0.48 * width, fy * seen[..., 1] / seen[..., 2] + 0.53 * height
        columns = (torch.arange(width).double() + 0.5).expand(height, width)
        rows = (torch.arange(height).double() + 0.5)[:, None].expand(height, width)
        torch.testing.assert_close(torch.stack((across, down)), torch.stack((columns, rows)), rtol=0, atol=1e-3)


def test_four_frames_lie_behind_each_latent_one():
    embedding = rand(9, 6, 2, 3)
    found = by_latent_frame(embedding)
    assert found.shape == (1, 24, 3, 2, 3)
    for latent in range(3):
        for slot in range(4):
            frame = 0 if latent == 0 else 4 * latent - 3 + slot
            for channel in range(6):
                assert torch.equal(found[0, 4 * channel + slot, latent], embedding[frame, channel])


def convolved(x, conv):
    """3 x 3 convolution of [C, h, w], one shift after the other, in float64."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    _, height, width = x.shape
    out = conv.bias.double()[:, None, None].expand(-1, height, width).clone()
    for dy in range(3):
        for dx in range(3):
            part = padded[:, dy : dy + height, dx : dx + width]
            out += torch.einsum("chw,dc->dhw", part, conv.weight[:, :, dy, dx].double())
    return out


def adapted(adapter, given, factor):
    """[1, F * places, C] float64, frame by frame from the definition."""
    frames = []
    for frame in given[0].double().unbind(1):
        cells = frame.unflatten(2, (-1, 2, factor)).unflatten(1, (-1, 2, factor))
        kernel = adapter.conv.weight.double().unflatten(1, (24, factor, factor))
        x = torch.einsum("chpywqx,dcyxpq->dhw", cells, kernel) + adapter.conv.bias.double()[:, None, None]
        for block in adapter.residual_blocks:
            x = x + convolved(convolved(x, block.conv1).clamp(min=0), block.conv2)
        frames.append(x.flatten(1).T)
    return torch.cat(frames)[None]


@torch.no_grad()
@pytest.mark.parametrize(("factor", "blocks"), [(2, 1), (4, 2)])
def test_adapter(factor, blocks):
    adapter = randomized(CameraAdapter(20, factor, (2, 2), blocks))
    given = rand(1, 24, 3, 4 * factor, 6 * factor)
    got = adapter(given)
    assert got.shape == (1, 20, 3, 2, 3)
    assert relative(got.flatten(2).transpose(1, 2), adapted(adapter, given, factor)) < 1e-5


COND, MASK = rand(1, 16, FRAMES, HEIGHT, WIDTH, seed=6), rand(1, 4, FRAMES, HEIGHT, WIDTH, seed=7)
RAYS = rand(1, 24, FRAMES, HEIGHT * FACTOR, WIDTH * FACTOR, seed=4)


def build(in_dim):
    model = randomized(WanModel(config(in_dim), (ImageToVideo(), FunCamera(FACTOR, 1))))
    return model, published(model, "control_adapter.")


def inputs(*payloads, batch=1, **more):
    fields = dict(
        latents=rand(batch, 16, FRAMES, HEIGHT, WIDTH, seed=1), timestep=torch.tensor([731.0, 402.5])[:batch],
        text=tuple(rand(5, 20, seed=2 + row) for row in range(batch)), payloads=payloads, step=Step(index=3, total=10),
    )  # fmt: skip
    return ModelInputs(**{**fields, **more})


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("in_dim", "picture", "behind"),
    [
        (32, ImageCondition(COND, MASK), torch.cat((COND[:, :, :1], torch.zeros_like(COND[:, :, 1:])), dim=2)),
        (36, ImageCondition(COND, MASK), torch.cat((MASK, COND), dim=1)),
        (36, None, torch.zeros(1, 20, FRAMES, HEIGHT, WIDTH)),
        (16, None, torch.zeros(1, 0, FRAMES, HEIGHT, WIDTH)),
    ],
)
def test_the_path_is_added_to_the_patches(in_dim, picture, behind, batch):
    """Diffusers' transformer on latents to which those of the embedded path are added."""
    model, reference = build(in_dim)
    asked = inputs(*(p for p in (picture, CameraPath(RAYS)) if p is not None), batch=batch)
    tokens = adapted(model.control_adapter, RAYS, FACTOR) + model.patch_embedding.bias
    path = latents_of_tokens(model, tokens, (FRAMES, HEIGHT // 2, WIDTH // 2))
    latents = torch.cat((asked.latents, behind.expand(batch, -1, -1, -1, -1)), dim=1)
    model.blocks[0].register_forward_pre_hook(lambda block, args: dense.append(args[0].is_contiguous()))
    dense = []
    got = model(asked)
    assert dense == [True]
    assert relative(got, velocity(reference, latents + path, asked)) < 2e-5
    assert relative(got, velocity(reference, latents, asked)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0.0, 0.29, False), (0.3, 1.0, True), (0.0, 0.3, True), (0.31, 1.0, False)]
)
def test_the_camera_moves_in_its_steps_only(start, end, acts):
    model, _ = build(36)
    picture = ImageCondition(COND, MASK)
    got, plain = model(inputs(picture, CameraPath(RAYS, start, end))), model(inputs(picture))
    assert torch.equal(got, plain) != acts


def test_windows_have_their_own_part_of_the_path():
    path = CameraPath(rand(1, 24, 8, 8, 8), 0.2, 0.8)
    part = path.window(Window(latents=(2, 4, 7), pixels=tuple(range(9))))
    assert torch.equal(part.rays, path.rays[:, :, [2, 4, 7]]) and (part.start, part.end) == (0.2, 0.8)
    with pytest.raises(ValueError, match="The camera path has 8 latent frames but the video has 9"):
        path.window(Window(latents=(7, 8), pixels=tuple(range(5))))


def test_what_does_not_fit_is_named():
    model, _ = build(16)
    with pytest.raises(ValueError, match=r"camera path gives \(3, 2, 2\).*video has \(3, 2, 3\)"):
        model(inputs(CameraPath(RAYS[..., :8])))
    with pytest.raises(ValueError, match="rows of 19 numbers"):
        rays([[1.0, 2.0]], 16, 16)
    with pytest.raises(ValueError, match="rows of 19 numbers"):
        rays([], 16, 16)


def test_detected_by_the_adapter():
    shapes = {"control_adapter.conv.weight": (48, 24 * 16**2, 2, 2)}
    shapes |= {f"control_adapter.residual_blocks.{i}.conv1.weight": (48, 48, 3, 3) for i in range(2)}
    assert FunCamera.detect(shapes) == FunCamera(factor=16, blocks=2) and FunCamera.detect({}) is None


def test_node():
    poses = [pose(camera(seed)) for seed in range(6)]
    (embeds,) = N["WanVideoFunCameraEmbeds"]().process(poses, 72, 64, 0.5, 0.1, 0.9)
    assert (embeds.latent_shape, embeds.num_frames) == ((16, 2, 8, 8), 5)
    (path,) = embeds.payloads
    torch.testing.assert_close(path.rays, by_latent_frame(rays(poses[:5], 64, 64)) * 0.5)
    assert (path.start, path.end) == (0.1, 0.9)


@pytest.fixture
def models(tmp_path):
    before = get_host()
    folder = tmp_path / "diffusion_models"
    tiny.transformer(in_dim=36, extensions=(FunCamera(8, 1),)).save(folder / "camera.safetensors")
    tiny.transformer(in_dim=36).save(folder / "i2v.safetensors")
    tiny.text_encoder().save(tmp_path / "text_encoders/t5.safetensors")
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield
    set_host(before)


def test_sampler(models):
    def run(name, embeds, **options):
        model = N["WanVideoModelLoader"]().loadmodel(name, "fp32", "offload_device", "disabled")[0]
        encode = N["WanVideoTextEncodeCached"]().process
        text = encode("t5.safetensors", "fp32", "a person", "bad", use_disk_cache=False)[0]
        settings = dict(steps=2, cfg=1.0, shift=5.0, seed=1, force_offload=True, scheduler="euler", riflex_freq_index=0)
        return N["WanVideoSampler"]().process(model, embeds, text_embeds=text, **settings, **options)[0]["samples"]

    poses = [pose(camera(0)) for _ in range(21)]
    moving = [pose(camera(seed)) for seed in range(21)]
    still, moved = (N["WanVideoFunCameraEmbeds"]().process(path, 32, 32, 1.0, 0.0, 1.0)[0] for path in (poses, moving))
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(21, 32, 32, moved)
    (windows,) = N["WanVideoContextOptions"]().process("static_standard", 13, 4, 4, True, False)
    whole = run("camera.safetensors", embeds)
    assert whole.shape == (1, 16, 6, 4, 4) and not torch.equal(whole, run("camera.safetensors", still))
    assert run("camera.safetensors", embeds, context_options=windows).isfinite().all()
    with pytest.raises(ValueError, match="control_adapter.conv.weight"):
        run("i2v.safetensors", embeds)
