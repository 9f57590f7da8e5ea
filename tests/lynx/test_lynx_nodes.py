"""The resampler and ArcFace against their published forms, the crops, and the nodes."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny_faces
import torch
import torch.nn.functional as F
from published_keys import keys_of
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.lynx.arcface import ArcFace
from wanvideo_wrapper.lynx.faces import TEMPLATE, crops
from wanvideo_wrapper.lynx.resampler import Resampler, ResamplerSizes
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, TextEmbeds


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published_resampler(w, x, heads):
    """The perceiver of the authors with separate scales and a softmax."""
    def norm(name, t):
        return F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.linear(x, w["proj_in.weight"], w["proj_in.bias"])
    queries = w["latents"].expand(x.shape[0], -1, -1)
    for i in range(2):
        seen, own = norm(f"layers.{i}.0.norm1", x), norm(f"layers.{i}.0.norm2", queries)
        q = F.linear(own, w[f"layers.{i}.0.to_q.weight"])
        k, v = F.linear(torch.cat((seen, own), 1), w[f"layers.{i}.0.to_kv.weight"]).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        queries = queries + F.linear(out.transpose(1, 2).flatten(2), w[f"layers.{i}.0.to_out.weight"])
        hidden = F.gelu(F.linear(norm(f"layers.{i}.1.0", queries), w[f"layers.{i}.1.1.weight"]))
        queries = queries + F.linear(hidden, w[f"layers.{i}.1.3.weight"])
    return norm("norm_out", F.linear(queries, w["proj_out.weight"], w["proj_out.bias"]))


@torch.no_grad()
def test_resampler_is_the_published_one():
    model, x = tiny_faces.resampler(10), rand(2, 3, tiny_faces.EMBEDDING)
    want = published_resampler({k: v.double() for k, v in model.state_dict().items()}, x.double(), heads=2)
    torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "out"), [("lynx_resampler_full", 5120), ("lynx_resampler_lite", 2048)])
def test_keys_and_shapes_of_the_published_resamplers(name, out):
    with torch.device("meta"):
        model = Resampler(ResamplerSizes(queries=16, dim=1280, inner=1280, heads=20, hidden=5120, layers=4,
                                         embedding=512, out=out))  # fmt: skip
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == keys_of(name)


def published_arcface(w, x):
    """IR-SE50 by facexlib's keys, BGR."""
    def norm(name, t):
        shape = (1, -1, *[1] * (t.dim() - 2))
        mean, var, gain, bias = (w[f"{name}.{part}"].view(shape) for part in
                                 ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
        return (t - mean) / (var + 1e-5).sqrt() * gain + bias

    x = F.prelu(norm("input_layer.1", F.conv2d(x[:, [2, 1, 0]], w["input_layer.0.weight"], padding=1)),
                w["input_layer.2.weight"])  # fmt: skip
    for i in range(24):
        name, stride = f"body.{i}", 2 if i in (0, 3, 7, 21) else 1
        h = F.conv2d(norm(f"{name}.res_layer.0", x), w[f"{name}.res_layer.1.weight"], padding=1)
        h = F.conv2d(F.prelu(h, w[f"{name}.res_layer.2.weight"]), w[f"{name}.res_layer.3.weight"], stride=stride,
                     padding=1)  # fmt: skip
        h = norm(f"{name}.res_layer.4", h)
        squeezed = F.relu(F.conv2d(h.mean((2, 3), keepdim=True), w[f"{name}.res_layer.5.fc1.weight"]))
        h = h * F.conv2d(squeezed, w[f"{name}.res_layer.5.fc2.weight"]).sigmoid()
        if f"{name}.shortcut_layer.0.weight" in w:
            short = norm(f"{name}.shortcut_layer.1", F.conv2d(x, w[f"{name}.shortcut_layer.0.weight"], stride=stride))
        else:
            short = x[:, :, ::stride, ::stride]
        x = h + short
    x = F.linear(norm("output_layer.0", x).flatten(1), w["output_layer.3.weight"], w["output_layer.3.bias"])
    x = norm("output_layer.4", x)
    return x / x.norm(dim=1, keepdim=True)


@pytest.fixture
def host(tmp_path):
    before = get_host()
    tiny_faces.save_resampler(tmp_path / "diffusion_models/lite.safetensors", 10)
    tiny_faces.save_arcface(tmp_path / "clip_vision")
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield get_host()
    set_host(before)


@torch.no_grad()
def test_a_face_becomes_tokens(host):
    (loaded,) = N["LoadLynxResampler"]().loadmodel("lite.safetensors", "fp32")
    picture = torch.rand(1, 112, 112, 3, generator=torch.Generator().manual_seed(1))
    ((tokens, without),) = N["LynxEncodeFaceIP"]().encode(loaded, picture)
    w = {key: value.double() for key, value in tiny_faces.arcface().state_dict().items()}
    embedding = published_arcface(w, picture.double().permute(0, 3, 1, 2) * 2 - 1)
    sampler = {key: value.double() for key, value in tiny_faces.resampler(10).state_dict().items()}
    for got, row in ((tokens, embedding), (without, torch.zeros_like(embedding))):
        torch.testing.assert_close(got.double(), published_resampler(sampler, row[:, None], 2), rtol=1e-4, atol=1e-4)


def test_shapes_of_the_published_arcface():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in ArcFace(64, 512).state_dict().items()}
    assert shapes["output_layer.3.weight"] == (512, 512 * 7 * 7) and "body.23.res_layer.5.fc2.weight" in shapes
    assert shapes["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert "body.0.shortcut_layer.0.weight" not in shapes


def test_wrong_faces_and_files_are_named(host, tmp_path):
    (loaded,) = N["LoadLynxResampler"]().loadmodel("lite.safetensors", "fp32")
    with pytest.raises(ValueError, match="112x112 pixels but ip_image is 64x48"):
        N["LynxEncodeFaceIP"]().encode(loaded, torch.rand(1, 48, 64, 3))
    (tmp_path / "clip_vision" / "recognition_arcface_ir_se50.safetensors").unlink()
    with pytest.raises(ValueError, match="needs ArcFace's weights"):
        N["LynxEncodeFaceIP"]().encode(loaded, torch.rand(1, 112, 112, 3))
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 4, 16)}, tmp_path / "diffusion_models/other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no Lynx resampler"):
        N["LoadLynxResampler"]().loadmodel("other.safetensors", "fp32")


def test_crops_bring_the_landmarks_to_the_template():
    """A picture whose colors are its coordinates shows where each pixel came from."""
    rows, columns = torch.meshgrid(torch.arange(300.0), torch.arange(400.0), indexing="ij")
    picture = torch.stack((columns / 400, rows / 400, torch.zeros(300, 400)), dim=2)
    turn = 1.3 * np.exp(0.2j)
    z = (TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]) * turn + (150 + 60j)
    landmarks = np.stack((z.real, z.imag), axis=1)
    both = crops(picture, landmarks)
    assert both.ip.shape == (112, 112, 3) and both.ref.shape == (256, 256, 3)
    stretched = both.ip.max() == 1 and both.ip.min() == 0
    assert stretched
    wide = ((TEMPLATE + [0, 10] - 56) * 0.8 + 56 + [4, 0]) * 2 + [8, 0]
    for crop, places in ((both.ip, TEMPLATE), (both.ref, wide)):
        seen = np.array([crop[round(y), round(x), :2].tolist() for x, y in places])
        # Colors were stretched alike in all channels: differences between landmarks tell.
        ratio = (seen - seen[0])[1:] / ((landmarks - landmarks[0])[1:] / 400)
        strong = abs(landmarks - landmarks[0])[1:] > 20
        np.testing.assert_allclose(ratio[strong], np.median(ratio[strong]), rtol=0.06)


def test_the_detector_is_asked_for_the_largest_face(monkeypatch):
    faces = [SimpleNamespace(bbox=[0, 0, 10, 10], kps=TEMPLATE + 5), SimpleNamespace(bbox=[0, 0, 90, 90], kps=TEMPLATE)]

    class FaceAnalysis:
        def prepare(self, ctx_id, det_size):
            pass

        def get(self, picture):
            assert picture.dtype == np.uint8 and picture.shape == (150, 160, 3)
            return faces

    app = ModuleType("insightface.app")
    app.FaceAnalysis = FaceAnalysis
    monkeypatch.setitem(sys.modules, "insightface", ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    picture = torch.rand(1, 150, 160, 3)
    ip, ref = N["LynxInsightFaceCrop"]().encode(picture)
    want = crops(picture[0], TEMPLATE)
    assert torch.equal(ip[0], want.ip) and torch.equal(ref[0], want.ref)
    faces.clear()
    with pytest.raises(ValueError, match="No face was found"):
        N["LynxInsightFaceCrop"]().encode(picture)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ValueError, match="needs the package insightface"):
        N["LynxInsightFaceCrop"]().encode(picture)


class Vae:
    def encode(self, video):
        assert video.shape == (3, 1, 16, 16)
        return video.mean(dim=0, keepdim=True).expand(16, -1, -1, -1)


def test_embeds_get_the_face():
    embeds, node = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9), N["WanVideoAddLynxEmbeds"]()
    text, image = TextEmbeds(positive=(rand(3, 8),)), torch.rand(1, 16, 16, 3)
    ip = rand(1, 4, 10), rand(1, 4, 10, seed=1)
    (added,) = node.add(embeds, 0.7, 0.6, 0.1, 0.9, [2.0, 1.0], Vae(), ip, image, text, "0-2, 5")
    (face,) = added.payloads
    assert (face.cfg, face.ref_blocks, face.start, face.end) == ((2.0, 1.0), (0, 1, 2, 5), 0.1, 0.9)
    assert (float(face.ip_scale), float(face.ref_scale)) == (pytest.approx(0.7), pytest.approx(0.6))
    assert torch.equal(face.prompt[0], text.positive[0]) and not face.without_picture.any()
    torch.testing.assert_close(face.picture[0, 0, 0], image[0].mean(2) * 2 - 1)
    (alone,) = node.add(embeds, 0.7, 0.6, 0.0, 1.0, 1.0, lynx_ip_embeds=ip)[0].payloads
    assert alone.picture is None and alone.ref_blocks is None
    for more, says in [
        ({}, "got no face"), ({"ref_image": image}, "needs vae and ref_text_embed"),
        ({"lynx_ip_embeds": ip, "ref_blocks_to_use": "3-x"}, "not '3-x'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            node.add(embeds, 0.7, 0.6, 1.0, 0.0, 1.0, **more)
