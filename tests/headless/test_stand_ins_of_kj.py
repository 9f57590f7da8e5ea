"""Stand-ins for nodes of KJNodes and VideoHelperSuite, and ComfyUI's audio encoder, against their definitions."""

import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


@pytest.fixture
def host(tmp_path):
    before = get_host()
    (tmp_path / "in").mkdir()
    host = StandaloneHost(models=tmp_path, inputs=tmp_path / "in", outputs=tmp_path / "out", device="cpu")
    set_host(host)
    yield host
    set_host(before)


def call(kind, *arguments, **named):
    cls = NODES[kind]
    return getattr(cls(), cls.FUNCTION)(*arguments, **named)


def images(count=3, height=10, width=14, channels=3):
    return torch.rand(count, height, width, channels)


def latent(*shape):
    return {"samples": torch.randn(shape)}


def run(host, **nodes):
    made = {key: Node(id=key, type=kind, title=key, inputs=inputs) for key, (kind, inputs) in nodes.items()}
    return Runner(Prompt(made, {}), NODES, host).run()


def test_parts_of_batches():
    batch, masks = images(7), torch.rand(7, 10, 14)
    first, count, second, rest = call("VHS_SplitImages", batch, -2)
    assert torch.equal(first, batch[:5]) and torch.equal(second, batch[5:]) and (count, rest) == (5, 2)
    chosen, count = call("VHS_SelectEveryNthImage", batch, 3, 1)
    assert torch.equal(chosen, batch[[1, 4]]) and count == 2
    with pytest.raises(ValueError, match="leaves none of 7"):
        call("VHS_SelectEveryNthImage", batch, 1, 7)
    repeated, marks = call("ImageBatchRepeatInterleaving", batch, 2)
    assert torch.equal(repeated, torch.stack([batch[i // 2] for i in range(14)]))
    assert torch.equal(marks[:, 0, 0], torch.tensor([1.0, 0.0] * 7))
    assert torch.equal(call("ImageBatchRepeatInterleaving", batch, 2, masks)[1][::2], masks)


def test_frames_of_latents(caplog):
    video, part = latent(1, 4, 6, 2, 3), latent(1, 4, 2, 2, 3)
    assert call("GetLatentSizeAndCount", video) == (video, 1, 4, 6, 2, 3)
    assert call("GetLatentSizeAndCount", latent(5, 4, 2, 3))[1:] == (5, 4, 0, 2, 3)
    take = lambda *where: call("GetLatentRangeFromBatch", video, *where)[0]["samples"]  # noqa: E731
    assert torch.equal(take(-1, 2), video["samples"][:, :, 4:]) and torch.equal(take(1, 3), video["samples"][:, :, 1:4])
    assert torch.equal(take(2, -1), video["samples"][:, :, 2:]) and take(5, 9).shape[2] == 1
    with pytest.raises(ValueError, match="past the last of 6"):
        take(6, 1)
    (placed,) = call("InsertLatentToIndexed", part, video, 1)
    want = torch.cat((video["samples"][:, :, :1], part["samples"], video["samples"][:, :, 2:]), 2)
    assert torch.equal(placed["samples"], want)
    with pytest.raises(ValueError, match="outside of the 2 latent frames"):
        call("InsertLatentToIndexed", part, video, 2)
    (replaced,) = call("ReplaceVideoLatentFrames", video, -2, part)
    assert torch.equal(replaced["samples"], torch.cat((video["samples"][:, :, :4], part["samples"]), 2))
    assert call("ReplaceVideoLatentFrames", video, 5, part)[0] is video and "do not fit at 5" in caplog.text
    assert call("ReplaceVideoLatentFrames", video, 0)[0] is video


@pytest.mark.parametrize("tapered", [True, False])
@pytest.mark.parametrize(("expand", "rate"), [(1, 0.6), (-1, 0.6), (0, 0.0)])
def test_masks_grow_more_from_frame_to_frame(expand, rate, tapered):
    masks = (torch.rand(4, 16, 15) > 0.8).float()
    footprint = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) if tapered else np.ones((3, 3))
    grown, rest = call("GrowMaskWithBlur", masks, expand, rate, tapered, True, 0.0, 1.0, 1.0)
    for index, mask in enumerate(masks):
        want, pixels = 1 - mask.numpy(), expand + index * (rate if expand >= 0 else -rate)
        for _ in range(abs(round(pixels))):
            step = ndimage.grey_dilation if pixels > 0 else ndimage.grey_erosion
            want = step(want, footprint=footprint)
        assert np.array_equal(grown[index].numpy(), want)
    assert torch.equal(rest, 1 - grown)


def test_masks_mix_blur_and_close():
    masks = torch.rand(3, 12, 12)
    mixed = call("GrowMaskWithBlur", masks, 0, 0.0, True, False, 0.0, 0.25, 1.0)[0]
    assert torch.allclose(mixed[1], masks[1] * 0.25 + masks[0] * 0.75)
    assert torch.allclose(mixed[2], masks[2] * 0.25 + mixed[1] * 0.75)
    decayed = call("GrowMaskWithBlur", masks, 0, 0.0, True, False, 0.0, 1.0, 0.5)[0]
    both = masks[1] + masks[0] / 2
    assert torch.allclose(decayed[1], both / both.max())
    blurred = call("GrowMaskWithBlur", masks, 0, 0.0, True, False, 2.0, 1.0, 1.0)[0]
    picture = Image.fromarray((masks[2] * 255).byte().numpy()).filter(ImageFilter.GaussianBlur(2.0))
    assert np.array_equal((blurred[2] * 255).round().numpy(), np.array(picture))
    ring = torch.zeros(1, 9, 9)
    ring[0, 2:7, 2:7] = 1
    ring[0, 4, 4] = 0
    closed = call("GrowMaskWithBlur", ring, 0, 0.0, True, False, 0.0, 1.0, 1.0, True)[0]
    assert closed[0, 4, 4] == 1 and closed.sum() == 25


def test_blocks():
    mask = torch.zeros(2, 40, 40)
    mask[0, 5:30, 3:20] = torch.eye(25, 17)
    (blocks,) = call("BlockifyMask", mask, 8)
    assert not blocks[1].any() and not blocks[0, :5].any() and not blocks[0, :, 20:].any()
    # 17 rows and 17 columns: two blocks a side, the last of 9.
    want = torch.zeros(40, 40)
    want[5:13, 3:11] = want[13:22, 11:20] = 1
    assert torch.equal(blocks[0], want)


@pytest.mark.parametrize(
    ("color", "values"),
    [("255, 0, 51, 127.5", (1, 0, 0.2, 0.5)), ("0.5,1,0", (0.5, 1, 0, 1)), ("#ff000080", (1, 0, 0, 128 / 255))],
)
def test_masks_are_painted(color, values):
    pictures, mask = images(3, channels=4), torch.rand(2, 5, 7)
    (painted,) = call("DrawMaskOnImage", pictures, mask, color)
    whole = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for index in range(3):
        share = whole[index % 2][..., None] * values[3]
        want = pictures[index, ..., :3] * (1 - share) + torch.tensor(values[:3]) * share
        assert torch.allclose(painted[index, ..., :3], want, atol=1e-6)
        assert torch.allclose(painted[index, ..., 3:], torch.maximum(pictures[index, ..., 3:], share))
    for wrong in ("red", "1, 2", "300, 0, 0"):
        with pytest.raises(ValueError, match="is no color"):
            call("DrawMaskOnImage", pictures, mask, wrong)


def test_crops_around_masks_have_one_size():
    pictures, mask = images(2, 60, 80), torch.zeros(2, 60, 80)
    mask[0, 10:20, 30:60] = 1
    mask[1, 40:52, 5:25] = 1
    crops, masks, boxes = call("ImageCropByMaskAndResize", pictures, mask, 64, 2, 0, 0)
    # With padding 34x14 at (27, 7) and 24x16 at (2, 37); in whole tokens 48x16 around their middles.
    assert boxes == [(20, 6, 68, 22), (0, 37, 48, 53)]
    assert crops.shape == (2, 32, 64, 3) and masks.shape == (2, 32, 64)
    resized = call("ImageResizeKJ", pictures[:1, 6:22, 20:68], 64, 32, "lanczos", False, 2)[0]
    assert torch.equal(crops[:1], resized)
    with pytest.raises(ValueError, match="1 masks for 2 pictures"):
        call("ImageCropByMaskAndResize", pictures, mask[:1], 64, 2, 0, 0)


def test_colors_match_one_or_each():
    target, reference = images(2, 24, 24) * 0.4, images(2, 24, 24) * 0.5 + 0.3
    (one,) = call("ColorMatch", reference[:1], target, "mkl")
    (each,) = call("ColorMatch", reference, target, "mkl")
    assert torch.equal(one[0], each[0]) and not torch.equal(one[1], each[1])
    for index in range(2):
        assert torch.allclose(each[index].mean((0, 1)), reference[index].mean((0, 1)), atol=0.02)
    (half,) = call("ColorMatch", reference, target, "mkl", 0.5)
    assert torch.allclose(half, (target + each) / 2, atol=1e-6)
    assert call("ColorMatch", reference, target, "mkl", 0.0)[0] is target
    with pytest.raises(ValueError, match="2 references for 3 pictures"):
        call("ColorMatch", reference, images(3), "mkl")


def test_calculator():
    assert call("SimpleCalculatorKJ", "a / 2", a=7) == (3.5, 3, True)
    assert call("SimpleCalculatorKJ", "not (a > b) or cos(pi) > 0", a=3, b=1) == (0.0, 0, False)
    with pytest.raises(ValueError, match="no formula"):
        call("SimpleCalculatorKJ", "c + __import__", a=1)
    with pytest.raises(ValueError, match="no formula"):
        call("SimpleCalculatorKJ", "a + b", a=1)


def test_a_switch_runs_what_it_chooses(host):
    chosen = {"switch": True, "on_true": Link("yes", 0), "on_false": Link("no", 0)}
    nodes = {"yes": ("INTConstant", {"value": 3}), "no": ("OnlyInComfyUI", {}), "shown": ("PreviewAny", {})}
    nodes |= {"switch": ("LazySwitchKJ", {**chosen}), "shown": ("PreviewAny", {"source": Link("switch", 0)})}
    assert run(host, **nodes) == [{"text": ["3"]}]
    with pytest.raises(ValueError, match="OnlyInComfyUI"):
        run(host, **nodes | {"switch": ("LazySwitchKJ", {**chosen, "switch": False})})


def test_a_widget_is_read_from_the_linked_node(host):
    def ask(**inputs):
        reads = {"id": 0, "widget_name": "height", "any_input": Link("picture", 0), **inputs}
        return run(
            host,
            picture=("EmptyImage", {"width": 8, "height": 6, "batch_size": 1, "color": 0}),
            number=("FloatConstant", {"value": 1.23456}),
            read=("WidgetToString", reads),
            shown=("ShowText|pysssss", {"text": Link("read", 0)}),
        )[0]["text"]

    assert ask() == ["6"] and ask(widget_name="width, height") == ["width: 8, height: 6"]
    assert ask(return_all=True) == ["width: 8, height: 6, batch_size: 1, color: 0"]
    assert ask(node_title="number", widget_name="value", allowed_float_decimals=3) == ["1.235"]
    with pytest.raises(ValueError, match="has no widget 'depth'; its widgets are width, height, batch_size, color"):
        ask(widget_name="depth")
    with pytest.raises(ValueError, match="finds no node #77"):
        ask(id=77)


def test_splines():
    drawn = [[{"x": 10.4, "y": 25}, {"x": 20, "y": 50}], [{"x": 0, "y": 100}]]
    settings = dict(
        points_store="", mask_width=40, mask_height=100, points_to_sample=2, sampling_method="path",
        interpolation="basis", tension=0.5, repeat_output=2, float_output_type="list",
    )  # fmt: skip
    mask, points, heights, count, shares = call("SplineEditor", coordinates=json.dumps(drawn), **settings)
    assert json.loads(points) == [[{"x": 10, "y": 25}, {"x": 20, "y": 50}], [{"x": 0, "y": 100}]] and count == 2
    assert heights == [0.75, 0.5, 0.0] * 2 and json.loads(shares)[0] == {"x": 0.9, "y": 0.75}
    assert mask.shape == (2, 100, 40) and not mask.any()
    alone = call("SplineEditor", coordinates=json.dumps(drawn[0]), **settings, max_value=2.0)
    assert json.loads(alone[1]) == [{"x": 10, "y": 25}, {"x": 20, "y": 50}] and alone[2][:2] == [1.5, 1.0]
    assert alone[0].shape[0] == 4 and torch.equal(alone[0][:, 0, 0], torch.tensor([1.5, 1.0] * 2))
    with pytest.raises(ValueError, match="holds no points"):
        call("SplineEditor", coordinates="[]", **settings)


def test_previews(host):
    sound = {"waveform": torch.rand(2, 2, 800) * 2 - 1, "sample_rate": 8000}
    paths = call("PreviewAudio", sound)["ui"]["audio"]
    with wave.open(paths[1]) as file:
        assert file.getparams()[:4] == (2, 2, 8000, 800)
        heard = np.frombuffer(file.readframes(800), np.int16).reshape(-1, 2).T / 32767
    assert np.abs(heard - sound["waveform"][1].numpy()).max() < 1e-4
    (path,) = call("MaskPreview", torch.tensor([[[0.0, 1.0], [0.2, 0.6]]]))["ui"]["images"]
    assert np.array(Image.open(path)).tolist() == [[[v] * 3 for v in row] for row in ((0, 255), (51, 153))]
    pictures, masks = images(3, 16, 16), torch.zeros(2, 16, 16)
    masks[:, :8] = 1
    (path,) = call("PreviewAnimation", 10.0, pictures, masks)["ui"]["images"]
    with Image.open(path) as shown:
        assert shown.n_frames == 2 and np.array(shown.convert("RGB"))[:7].min() > 240
    with pytest.raises(ValueError, match="nothing to show"):
        call("PreviewAnimation", 10.0)


def encoder(*, large):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(3)
    config = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_bias=large, do_stable_layer_norm=large,
        feat_extract_norm="layer" if large else "group",
    )  # fmt: skip
    return Wav2Vec2Model(config).eval()


@pytest.mark.parametrize("large", [True, False])
def test_audio_encoder(host, tmp_path, large):
    model = encoder(large=large)
    tiny.wav2vec_file(model).save(tmp_path / "audio_encoders" / "w.safetensors", torch.float32)
    with wave.open(str(tmp_path / "in" / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 32000, dtype=np.int16).tobytes())
    audio, seconds = call("VHS_LoadAudio", "input/a.wav", 0.25, 0.5)
    assert seconds == 0.5 and NODES["VHS_LoadAudio"].VALIDATE_INPUTS("input/a.wav")
    (loaded,) = call("AudioEncoderLoader", "w.safetensors")
    (heard,) = call("AudioEncoderEncode", loaded, audio)
    sound = audio["waveform"].mean(1)
    if large:
        sound = (sound - sound.mean()) / (sound.var() + 1e-7).sqrt()
    with torch.no_grad():
        hidden, _ = model.feature_projection(model.feature_extractor(sound).transpose(1, 2))
        hidden = hidden + model.encoder.pos_conv_embed(hidden)
        outputs = [hidden if large else model.encoder.layer_norm(hidden)]
        for layer in model.encoder.layers:
            given = layer(outputs[-1])
            outputs.append(given[0] if isinstance(given, tuple) else given)
        if large:
            outputs[-1] = model.encoder.layer_norm(outputs[-1])
    assert len(heard["encoded_audio_all_layers"]) == 3 and heard["audio_samples"] == 8000
    for got, want in zip(heard["encoded_audio_all_layers"], outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(heard["encoded_audio"], heard["encoded_audio_all_layers"][-1])
    with pytest.raises(ValueError, match=r"over before 3\.0 s"):
        call("VHS_LoadAudio", "input/a.wav", 3.0)


def test_a_refusal_to_resize_names_the_widget_that_stops_it():
    judge = NODES["ImageResizeKJv2"].VALIDATE_INPUTS
    assert judge("lanczos", "pillarbox_blur").startswith("keep_proportion 'pillarbox_blur' runs in ComfyUI only")
    assert judge("nvidia_rtx_vsr", "pad_edge").startswith("upscale_method 'nvidia_rtx_vsr' runs in ComfyUI only")
    assert judge("lanczos", "crop") is True
