"""Stand-ins for nodes of ComfyUI and KJNodes, against scipy, numpy and their definitions."""

import av
import numpy as np
import pytest
import torch
from scipy import ndimage
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.headless.widgets import values_by_name
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


@pytest.fixture
def host(tmp_path):
    before = get_host()
    host = StandaloneHost(inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    (tmp_path / "in").mkdir()
    set_host(host)
    yield host
    set_host(before)


def call(kind, *arguments, **named):
    cls = NODES[kind]
    return getattr(cls(), cls.FUNCTION)(*arguments, **named)


def images(count=3, height=10, width=14, channels=3):
    return torch.rand(count, height, width, channels)


def test_empty_image_and_batches():
    (made,) = call("EmptyImage", 6, 4, 2, 0x3366FF)
    assert made.shape == (2, 4, 6, 3) and torch.allclose(made[1, 3, 5], torch.tensor([0.2, 0.4, 1.0]))
    one, other, third = images(2), images(3), images(1, 20, 28)
    assert torch.equal(call("RepeatImageBatch", one, 3)[0], torch.cat((one, one, one)))
    assert torch.equal(call("ImageBatch", one, other)[0], torch.cat((one, other)))
    joined = call("ImageBatchMulti", 3, one, image_2=other, image_3=third)[0]
    assert joined.shape == (6, 10, 14, 3) and torch.equal(joined[:5], torch.cat((one, other)))
    assert torch.equal(call("GetImagesFromBatchIndexed", other, "2, 0,-1")[0], other[[2, 0, 2]])
    for wrong in ("3", "x", ""):
        with pytest.raises(ValueError, match="indexes"):
            call("GetImagesFromBatchIndexed", other, wrong)


def test_concatenate_matches_the_side_where_they_meet():
    left, right = images(2, 10, 14), images(1, 20, 30)
    joined = call("ImageConcanate", left, right, "right", True)[0]
    assert joined.shape == (2, 10, 14 + 15, 3) and torch.equal(joined[:, :, :14], left)
    assert torch.equal(joined[0, :, 14:], joined[1, :, 14:])
    below = call("ImageConcanate", left, left, "up", False)[0]
    assert torch.equal(below, torch.cat((left, left), dim=1))
    with pytest.raises(ValueError, match="match_image_size"):
        call("ImageConcanate", left, right, "right", False)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 32)),
        ({"keep_proportion": True}, (24, 16)),
        ({"width_input": 50}, (48, 32)),
        ({"get_image_size": images(1, 40, 16)}, (16, 40)),
        ({"crop": "center"}, (24, 32)),
        ({"crop": 0}, (24, 32)),
    ],
)
def test_image_resize_kj(options, size):
    named = {"width": 24, "height": 32, "upscale_method": "lanczos", "keep_proportion": False, "divisible_by": 8}
    result, width, height = call("ImageResizeKJ", images(2, 40, 60), **(named | options))
    assert (width, height) == size and result.shape == (2, height, width, 3)
    saved = values_by_name(NODES["ImageResizeKJ"], [624, 600, "lanczos", True, 16, 0, 0, "disabled"])
    assert (saved["width"], saved["height"], saved["divisible_by"]) == (624, 600, 16)


@pytest.mark.parametrize("side", ["source", "new_images"])
def test_extend_with_overlap(side):
    source, new = images(5), images(6)
    same, start, black = call("ImageBatchExtendWithOverlap", source, 2, side, "cut")
    assert same is source and torch.equal(start, source[3:]) and black.shape == (1, 64, 64, 3)
    joined = call("ImageBatchExtendWithOverlap", source, 2, side, "cut", new)[2]
    kept = torch.cat((source[:-2], new)) if side == "source" else torch.cat((source, new[2:]))
    assert torch.equal(joined, kept)
    blended = call("ImageBatchExtendWithOverlap", source, 2, side, "linear_blend", new)[2]
    assert torch.allclose(blended[3], source[3] * 2 / 3 + new[0] / 3, atol=1e-6)
    assert torch.allclose(blended[4], source[4] / 3 + new[1] * 2 / 3, atol=1e-6)
    with pytest.raises(ValueError, match="more than the 5"):
        call("ImageBatchExtendWithOverlap", source, 6, side, "cut")


@pytest.mark.parametrize("expand", [0, 1, 3, -2])
@pytest.mark.parametrize("tapered", [True, False])
def test_grow_mask_is_gray_dilation(expand, tapered):
    mask = torch.rand(2, 12, 9)
    footprint = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) if tapered else np.ones((3, 3))
    step = ndimage.grey_dilation if expand > 0 else ndimage.grey_erosion
    want = mask.numpy()
    for _ in range(abs(expand)):
        want = np.stack([step(part, footprint=footprint) for part in want])
    assert np.array_equal(call("GrowMask", mask, expand, tapered)[0].numpy(), want)


def test_masks():
    picture, mask = images(2), torch.rand(2, 5, 7)
    assert torch.equal(call("ImageToMask", picture, "green")[0], picture[..., 1])
    with pytest.raises(ValueError, match="no channel 'alpha'"):
        call("ImageToMask", picture, "alpha")
    assert torch.equal(call("InvertMask", mask)[0], 1 - mask)
    assert call("GetMaskSizeAndCount", mask)[1:] == (7, 5, 2)


def test_composite_lays_a_picture_over_another_where_the_mask_is_one():
    below, over, mask = images(3, 10, 14), images(2, 6, 8), torch.rand(1, 6, 8)
    got = call("ImageCompositeMasked", below, over, 9, 7, False, mask)[0]
    want = below.clone()
    for n in range(3):
        for y in range(3):
            for x in range(5):
                share = mask[0, y, x]
                want[n, 7 + y, 9 + x] = over[n % 2, y, x] * share + below[n, 7 + y, 9 + x] * (1 - share)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.equal(call("ImageCompositeMasked", below, over, 20, 0, False)[0], below)
    assert torch.equal(call("ImageCompositeMasked", below, below.flip(0), 0, 0, True)[0], below.flip(0))


def test_blur_is_a_gaussian_mirrored_at_the_borders():
    picture = images(1, 12, 13)
    axis = np.exp(-np.linspace(-1, 1, 5) ** 2 / (2 * 0.7**2))
    kernel = np.outer(axis, axis) / axis.sum() ** 2
    planes = picture[0].double().numpy().transpose(2, 0, 1)
    want = np.stack([ndimage.correlate(plane, kernel, mode="mirror") for plane in planes], -1)
    assert np.allclose(call("ImageBlur", picture, 2, 0.7)[0][0].numpy(), want, atol=1e-6)


def test_image_pad():
    picture = images(2, 10, 14)
    padded, masks = call("ImagePadKJ", picture, 1, 2, 3, 4, 0, "color", "255, 0, 51")
    assert padded.shape == (2, 17, 17, 3) and torch.equal(padded[:, 3:13, 1:15], picture)
    assert torch.allclose(padded[0, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert masks[:, 3:13, 1:15].sum() == 0 and (masks == 1).sum() == 2 * (17 * 17 - 140)
    edge, _ = call("ImagePadKJ", picture, 0, 0, 0, 0, 0, "edge_pixel", "0", target_width=20, target_height=10)
    assert torch.equal(edge[:, :, 0], picture[:, :, 0]) and torch.equal(edge[:, :, 3:17], picture)
    with pytest.raises(ValueError, match="smaller than the picture"):
        call("ImagePadKJ", picture, 0, 0, 0, 0, 0, "color", "0", target_width=8, target_height=10)


@pytest.mark.parametrize(
    ("formula", "result"),
    [("a - (b + 3)", 2.0), ("max(a, b) // 2", 4.0), ("a ** 2 % 7", 4.0), ("-a / b", -9 / 4), ("a > b", 1.0)],
)
def test_simple_math(formula, result):
    whole, exact = call("SimpleMath+", formula, a=9, b=4)
    assert exact == pytest.approx(result) and whole == round(result)


@pytest.mark.parametrize("formula", ["__import__('os')", "a.real", "open", "a +", "1" * 600, "[1]", "9" + "**9" * 6])
def test_simple_math_is_nothing_but_arithmetic(formula):
    with pytest.raises(ValueError, match="formula"):
        call("SimpleMath+", formula, a=1)


def test_sound_nodes(caplog):
    sound = {"waveform": torch.rand(1, 2, 1000), "sample_rate": 100}
    assert torch.equal(call("TrimAudioDuration", sound, 2.5, 3.0)[0]["waveform"], sound["waveform"][..., 250:550])
    assert torch.equal(call("TrimAudioDuration", sound, -1.0, 60.0)[0]["waveform"], sound["waveform"][..., 900:])
    with pytest.raises(ValueError, match="leaves nothing of a sound of 10.00 s"):
        call("TrimAudioDuration", sound, 0.0, 0.0)
    (model,) = call("MelBandRoFormerModelLoader", "voices.safetensors")
    vocals, rest = call("MelBandRoFormerSampler", model, sound)
    assert vocals is sound and not rest["waveform"].any()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_create_and_save_video(host, tmp_path):
    nodes = {
        "image": ("EmptyImage", {"width": 32, "height": 32, "batch_size": 6, "color": 255}),
        "video": ("CreateVideo", {"images": Link("image", 0), "fps": 12.0}),
        "save": ("SaveVideo", {"video": Link("video", 0), "filename_prefix": "video/clip"}),
    }
    made = {key: Node(id=key, type=kind, title="", inputs=inputs) for key, (kind, inputs) in nodes.items()}
    (shown,) = Runner(Prompt(made, {}), NODES, host).run()
    path = tmp_path / "out" / "video" / "clip_00001_.mp4"
    assert shown == {"videos": [str(path)]}
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12
        assert sum(1 for _ in container.decode(video=0)) == 6
        assert "prompt" in container.metadata


def test_latents_of_a_failed_run_are_loaded(host, tmp_path):
    from safetensors.torch import save_file

    samples = torch.randn(1, 16, 2, 4, 6)
    save_file({"latent_tensor": samples, "latent_format_version_0": torch.empty(0)}, tmp_path / "in" / "a.latent")
    assert torch.equal(call("LoadLatent", "a.latent")[0]["samples"], samples)
    (tmp_path / "in" / "b.latent").write_bytes(b"no latents")
    with pytest.raises(ValueError, match="b.latent is truncated"):
        call("LoadLatent", "b.latent")
