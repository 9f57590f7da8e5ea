"""The motion tokenizer against the authors' form, pictures of poses, and the nodes."""

import numpy as np
import pytest
import tiny_motion
import torch
import torch.nn.functional as F
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.mtv_crafter.joints import deviation, mean
from wanvideo_wrapper.mtv_crafter.poses import draw, first_person, projected
from wanvideo_wrapper.mtv_crafter.vqvae import MotionVqVae, VqSizes, load_tokenizer
from wanvideo_wrapper.wanvideo.request import ImageEmbeds


def resnet(w, name, x):
    dilation = max(1, 512 // w[f"{name}.block.2.weight"].shape[0] - 1)
    h = F.silu(F.group_norm(x, 32, w[f"{name}.block.0.weight"], w[f"{name}.block.0.bias"], 1e-6))
    h = F.conv2d(h, w[f"{name}.block.2.weight"], w[f"{name}.block.2.bias"], padding=dilation, dilation=dilation)
    h = F.silu(F.group_norm(h, 32, w[f"{name}.block.3.weight"], w[f"{name}.block.3.bias"], 1e-6))
    h = F.conv2d(h, w[f"{name}.block.5.weight"], w[f"{name}.block.5.bias"])
    if f"{name}.conv_short.weight" in w:
        x = F.conv2d(x, w[f"{name}.conv_short.weight"], w[f"{name}.conv_short.bias"])
    return x + h


def along_joints(w, name, x):
    """A convolution over the joints of each frame."""
    return torch.stack([F.conv1d(x[:, :, f], w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
                        for f in range(x.shape[2])], dim=2)  # fmt: skip


def halved(x):
    odd = x.shape[2] % 2
    pairs = [x[:, :, i : i + 2].mean(dim=2) for i in range(odd, x.shape[2], 2)]
    return torch.stack([*([x[:, :, 0]] if odd else []), *pairs], dim=2)


def doubled(x):
    odd = x.shape[2] % 2
    rest, count = x[:, :, odd:], x.shape[2] - odd
    places = torch.linspace(0, count - 1, 2 * count, dtype=torch.float64)
    low = places.floor().long().clamp(max=count - 1)
    high, share = (low + 1).clamp(max=count - 1), (places - low)[:, None]
    return torch.cat((x[:, :, :odd], rest[:, :, low] * (1 - share) + rest[:, :, high] * share), dim=2)


def side(w, name, x, resize, sampler):
    x = F.conv2d(x, w[f"{name}.conv_in.weight"], w[f"{name}.conv_in.bias"], padding=1)
    for i in range(3):
        x = resnet(w, f"{name}.resnet1.{i}", x)
    x = resnet(w, f"{name}.resnet2", along_joints(w, f"{name}.{sampler.format(1)}", resize(x)))
    for i in range(3):
        x = resnet(w, f"{name}.resnet3.{i}", x)
    x = along_joints(w, f"{name}.{sampler.format(2)}", resize(x))
    return F.conv2d(x, w[f"{name}.conv_out.weight"], w[f"{name}.conv_out.bias"], padding=1)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "encoded", "decoded"), [
    (9, ((0, 9),), ((0, 3),)), (17, ((0, 9), (9, 17)), ((0, 3), (3, 5))),
    (21, ((0, 13), (13, 21)), ((0, 2), (2, 4), (4, 6))),
])  # fmt: skip
def test_tokenizer_is_the_authors(frames, encoded, decoded):
    model = tiny_motion.tokenizer()
    w = {name: value.double() for name, value in model.state_dict().items()}
    joints = ((tiny_motion.body(frames) - mean()) / deviation())[None]
    x = joints.double().permute(0, 3, 1, 2)
    codes = torch.cat([side(w, "encoder", x[:, :, a:b], halved, "downsample{}.joint_downsample")
                       for a, b in encoded], dim=2)  # fmt: skip
    flat = codes.permute(0, 2, 3, 1).reshape(-1, 20)
    nearest = w["vq.codebook"][torch.cdist(flat, w["vq.codebook"]).argmin(1)]
    want = nearest.reshape(1, -1, 24, 20).permute(0, 3, 1, 2)
    got = model.codes(joints)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    back = torch.cat([side(w, "decoder", want[:, :, a:b], doubled, "upsample{}.upsampler")
                      for a, b in decoded], dim=2).permute(0, 2, 3, 1)  # fmt: skip
    assert model.joints(got).shape == back.shape
    torch.testing.assert_close(model.joints(got).double(), back, rtol=1e-4, atol=1e-5)


def test_keys_and_shapes_of_the_published_tokenizer():
    with torch.device("meta"):
        model = MotionVqVae(VqSizes(outer=128, inner=512, code=3072, codes=8192))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == keys_of("mtvcrafter_vqvae")


@pytest.fixture
def host(tmp_path):
    before = get_host()
    tiny_motion.save_tokenizer(tmp_path / "vae/vq.safetensors")
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


def test_poses_become_motion_of_a_video(host):
    (tokenizer,) = N["LoadVQVAE"]().loadmodel("vq.safetensors")
    tokens, seen = N["MTVCrafterEncodePoses"]().encode(tokenizer, tiny_motion.poses(9))
    assert tokens.shape == (1, 3 * 24, 20) and seen.shape == (9, 24, 3)
    codebook = tokenizer.model.vq.codebook
    assert torch.cdist(tokens[0], codebook).amin(1).max() < 1e-5
    want = tokenizer.model.joints(tokens.unflatten(1, (3, 24)).permute(0, 3, 1, 2))[0] * deviation() + mean()
    torch.testing.assert_close(seen, want)
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9)
    (added,) = N["WanVideoAddMTVMotion"]().add(embeds, tokens, [1.0, 0.5], 0.1, 0.9)
    (payload,) = added.payloads
    assert (payload.strengths, payload.start, payload.end) == ((1.0, 0.5), 0.1, 0.9)
    assert payload.tokens is tokens


def test_another_file_is_no_tokenizer(host, tmp_path):
    from safetensors.torch import save_file

    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no motion VQ-VAE"):
        load_tokenizer(tmp_path / "other.safetensors", host)


class Detector:
    """What a pack that runs NLF hands on."""

    def __init__(self):
        self.sizes = []

    def detect_smpl_batched(self, images):
        self.sizes.append(tuple(images.shape))
        boxes = [torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.9]])] * (len(images) - 1) + [torch.zeros(0, 5)]
        return {"joints3d_nonparam": [torch.ones(2, 24, 3) * i for i in range(len(images))], "boxes": boxes}


def test_models_of_other_packs_predict(host):
    detector = Detector()
    poses, boxes = N["NLFPredict"]().predict(detector, torch.rand(5, 6, 8, 3), per_batch=2)
    assert detector.sizes == [(2, 3, 6, 8), (2, 3, 6, 8), (1, 3, 6, 8)]
    assert [float(frame[0, 0, 0]) for frame in poses["joints3d_nonparam"][0]] == [0, 1, 0, 1, 0]
    assert [box[0] for box in boxes] == [1, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="TorchScript, a program"):
        N["NLFPredict"]().predict(object(), torch.rand(1, 6, 8, 3))


def test_programs_are_refused_before_anything_runs(host):
    for name in ("LoadNLFModel", "DownloadAndLoadNLFModel"):
        assert "this pack loads no programs" in N[name].VALIDATE_INPUTS()
        with pytest.raises(ValueError, match="TorchScript, a program"):
            N[name]().loadmodel("nlf.torchscript")


def test_poses_that_are_none_are_named():
    with pytest.raises(ValueError, match="frame 1 of the pose video"):
        first_person({"joints3d_nonparam": [[torch.ones(1, 24, 3), torch.ones(0, 24, 3)]]})
    with pytest.raises(ValueError, match=r"24 joints .*\(1, 17, 3\)|24 joints .*\[1, 17, 3\]"):
        first_person([torch.ones(1, 17, 3)])
    for wrong in ({}, {"joints3d_nonparam": []}, "poses", 7, []):
        with pytest.raises(ValueError, match="no poses of an NLF model"):
            first_person(wrong)


def test_joints_are_seen_by_nlfs_camera():
    joints = torch.tensor([[0.0, 0.0, 1000.0]] * 22 + [[500.0, -250.0, 1000.0], [0.0, 0.0, 0.0]])
    places = projected(joints, 200, 100)
    focal = 100 / np.tan(np.radians(27.5))
    np.testing.assert_allclose(places[0], [100, 50])
    np.testing.assert_allclose(places[22], [100 + focal / 2, 50 - focal / 4], rtol=1e-6)
    assert places.isfinite().all()


@pytest.mark.parametrize("style", ["original", "scail"])
def test_pictures_show_the_first_person(style):
    poses = {"joints3d_nonparam": [[torch.stack((mean(), mean() + 400)), torch.zeros(0, 24, 3)]]}
    pictures = draw(poses, 350, 700, stick_width=1.0, point_radius=3, style=style)
    assert pictures.shape == (2, 700, 350, 3) and not pictures[1].any()
    alone = draw([mean()], 350, 700, stick_width=1.0, point_radius=3, style=style)
    assert torch.equal(pictures[0], alone[0])
    x, y = projected(mean(), 350, 700)[[18, 20]].mean(0).int().tolist()
    limb = (255, 255, 0) if style == "original" else (0, 60, 255)
    assert tuple((pictures[0, y, x] * 255).int().tolist()) == limb
