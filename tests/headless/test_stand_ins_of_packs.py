"""Stand-ins for the small nodes that graphs of many packs share, against numpy and their definitions."""

import wave

import numpy as np
import pytest
import torch
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.headless.widgets import checked, inputs_of, values_by_name
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


def call(kind, *arguments, **named):
    cls = NODES[kind]
    return getattr(cls(), cls.FUNCTION)(*arguments, **named)


@pytest.mark.parametrize(
    ("kind", "saved", "value"),
    [
        ("ImpactInt", [14], 14),
        ("ImpactFloat", [5], 5.0),
        ("Int", ["480"], 480),
        ("PrimitiveInt", [20, "increment"], 20),
        ("PrimitiveStringMultiline", ["one\ntwo"], "one\ntwo"),
        ("StringConstant", ["word"], "word"),
        ("Text Prompt (JPS)", ["word"], "word"),
        ("Seed (rgthree)", [1234, "", "", ""], 1234),
        ("mxSlider", [8, 8.5, 0], 8),
        ("mxSlider", [8, 8.5, 1], 8.5),
        ("StringConstantMultiline", ["one\ntwo ", True], "onetwo"),
        ("StringConstantMultiline", ["one\ntwo ", False], "one\ntwo "),
    ],
)
def test_constants_give_what_was_saved(kind, saved, value):
    values = values_by_name(NODES[kind], saved)
    entries = {entry.name: entry for entry in inputs_of(NODES[kind])}
    (given,) = call(kind, **{name: checked(entries[name], saved, kind) for name, saved in values.items()})
    assert given == value and type(given) is type(value)


def test_a_seed_that_may_be_any_is_the_same_in_all_processes_and_another_in_other_workflows():
    seeds = [call("Seed (rgthree)", -1, {"1": {"inputs": {"text": text}}}, "7")[0] for text in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2] and all(0 <= seed < 2**50 for seed in seeds)


def test_texts_are_joined_and_replaced():
    assert call("JoinStrings", "-", "one", "two") == ("one-two",)
    function = "StringFunction|pysssss"
    assert call(function, "append", "no", "one", "", "two") == ("onetwo",)
    assert call(function, "append", "yes", "one ,,", "", "two") == ("one, two",)
    assert call(function, "replace", "no", "a.b", ".", "-") == ("a-b",)
    assert call(function, "replace", "no", "a11b2", r"/\d+/", "-") == ("a-b-",)
    with pytest.raises(ValueError, match="regular expression"):
        call(function, "replace", "no", "a", "/(/", "")


def test_texts_are_chosen():
    assert [call("ImpactStringSelector", "a\n#b\nc", False, select)[0] for select in (0, 1, 5)] == ["a", "#b", "c"]
    assert [call("ImpactStringSelector", "a\n#b\nc\n", True, select)[0] for select in (0, 1)] == ["a", "b\nc"]
    assert call("ImpactStringSelector", "", True, 3) == ("",)


def test_wildcards_are_what_comfyui_filled_in_last(caplog):
    caplog.set_level("INFO")
    fill = "ImpactWildcardProcessor"
    assert call(fill, "no wildcard", "older", "populate", 0) == ("no wildcard",)
    assert call(fill, "{a|b}", "kept", "fixed", 0) == ("kept",) and not caplog.messages
    for text in ("{a|b}", "__colors__", "<lora:x:1>"):
        assert call(fill, text, "filled", "populate", 0) == ("filled",)
    assert len(caplog.messages) == 3
    with pytest.raises(ValueError, match="write the text itself"):
        call(fill, "{a|b}", "", "populate", 0)


def test_the_first_value_passes_a_switch():
    picture = torch.rand(1, 2, 2, 3)
    nodes = {
        "1": Node("1", "PrimitiveString", "", {"value": "taken"}),
        "2": Node("2", "PrimitiveString", "", {"value": "not taken"}),
        "3": Node("3", "Any Switch (rgthree)", "", {"any_01": Link("1", 0), "any_02": Link("2", 0)}),
        "4": Node("4", "PreviewAny", "", {"source": Link("3", 0)}),
    }
    assert Runner(Prompt(nodes, {}), NODES, StandaloneHost(device="cpu")).run() == [{"text": ["taken"]}]
    assert call("Any Switch (rgthree)", any_01=None, any_02=0) == (0,)
    assert call("Any Switch (rgthree)", any_01=None) == (None,)
    assert call("ImagePass", image=picture)[0] is picture and call("easy cleanGpuUsed", anything=5) == (5,)


def test_formulas():
    assert call("MathExpression|pysssss", "(a // b) % c + 1", a=17, b=4, c=3) == (2, 2.0)
    assert call("MathExpression|pysssss", "a * 0.5", a=-7) == (-3, -3.5)


def test_sizes_and_parts():
    pictures = torch.rand(5, 4, 6, 3)
    assert call("GetImageSize+", pictures) == call("GetImageSize", pictures) == (6, 4, 5)
    part = "ImageFromBatch+"
    assert torch.equal(call(part, pictures, 1, 2)[0], pictures[1:3])
    assert torch.equal(call(part, pictures, 3, -1)[0], pictures[3:])
    assert torch.equal(call(part, pictures, 9, 4)[0], pictures[4:])
    doubled, count = call("VHS_DuplicateImages", pictures, 2)
    assert count == 10 and torch.equal(doubled, torch.cat((pictures, pictures)))
    mask = torch.rand(2, 4, 6)
    gray = call("MaskToImage", mask)[0]
    assert gray.shape == (2, 4, 6, 3) and all(torch.equal(gray[..., c], mask) for c in range(3))


def test_what_a_loaded_video_tells():
    names = ("fps", "frame_count", "duration", "width", "height")
    told = {f"{kind}_{name}": (kind, name) for kind in ("source", "loaded") for name in names}
    source, loaded = ([told[f"{kind}_{name}"] for name in names] for kind in ("source", "loaded"))
    assert call("VHS_VideoInfo", told) == (*source, *loaded)
    assert call("VHS_VideoInfoSource", told) == tuple(source) and call("VHS_VideoInfoLoaded", told) == tuple(loaded)
    assert NODES["VHS_VideoInfo"].RETURN_TYPES == ("FLOAT", "INT", "FLOAT", "INT", "INT") * 2


def nearest(pictures, width, height):
    """The pixel under the middle of each new one."""
    rows = ((np.arange(height) + 0.5) * pictures.shape[1] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * pictures.shape[2] / width).astype(int)
    return pictures[:, rows][:, :, columns]


def test_pictures_are_scaled():
    pictures = torch.rand(2, 12, 20, 3)
    assert torch.equal(call("ImageScale", pictures, "nearest-exact", 7, 9, "disabled")[0], nearest(pictures, 7, 9))
    square = call("ImageScale", pictures, "nearest-exact", 6, 6, "center")[0]
    assert torch.equal(square, nearest(pictures[:, :, 4:16], 6, 6))
    assert call("ImageScale", pictures, "lanczos", 10, 0, "disabled")[0].shape == (2, 6, 10, 3)
    assert call("ImageScale", pictures, "lanczos", 0, 0, "disabled")[0] is pictures
    assert call("ImageScaleBy", pictures, "area", 0.5)[0].shape == (2, 6, 10, 3)
    halves = pictures.reshape(2, 6, 2, 10, 2, 3).mean(dim=(2, 4))
    assert torch.allclose(call("ImageScaleBy", pictures, "bilinear", 0.5)[0], halves, atol=1e-6)
    # Nothing but lanczos smooths: at a third of the size the pixel in the middle of three is left.
    thirds = ("stretch", "0, 0, 0", "center", 1)
    for method in ("bilinear", "bicubic"):
        small = call("ImageResizeKJv2", pictures[:, :, :18], 6, 4, method, *thirds)[0]
        assert torch.allclose(small, pictures[:, 1::3, 1:18:3], atol=1e-6)


def test_batches_are_merged_at_the_size_of_one():
    large, small = torch.rand(2, 12, 20, 3), torch.rand(3, 6, 10, 3)
    arguments = ("nearest-exact", "disabled")
    for strategy, size in (("A", "large"), ("B", "small"), ("smaller", "small"), ("larger", "large")):
        merged, count = call("VHS_MergeImages", large, small, f"match {strategy}", *arguments)
        height, width = (large if size == "large" else small).shape[1:3]
        assert count == 5 and torch.equal(merged, torch.cat([nearest(i, width, height) for i in (large, small)]))


@pytest.mark.parametrize(
    ("width", "height", "method", "condition", "step", "size"),
    [
        (10, 10, "stretch", "always", 0, (10, 10)),
        (10, 10, "keep proportion", "always", 0, (10, 6)),
        (0, 24, "keep proportion", "always", 0, (40, 24)),
        (10, 10, "fill / crop", "always", 4, (8, 8)),
        (10, 11, "pad", "always", 0, (10, 11)),
        (40, 40, "keep proportion", "downscale if bigger", 8, (16, 8)),
        (40, 40, "keep proportion", "if smaller area", 8, (40, 24)),
    ],
)
def test_sizes_of_image_resize_of_essentials(width, height, method, condition, step, size):
    pictures = torch.rand(2, 12, 20, 3)
    result, *told = call("ImageResize+", pictures, width, height, "nearest-exact", method, condition, step)
    assert (result.shape[2], result.shape[1]) == tuple(told) == size
    if condition == "downscale if bigger":
        assert torch.equal(result, pictures[:, 2:10, 2:18])
    if method == "pad":
        assert torch.equal(result[:, 2:8], nearest(pictures, 10, 6))
        assert not result[:, :2].any() and not result[:, 8:].any()
    if method == "fill / crop":
        assert torch.equal(result, nearest(pictures, 13, 8)[:, :, 2:10])


def test_borders_are_the_pixels_at_the_edge():
    pictures = torch.rand(2, 6, 10, 3)
    arguments = (16, 16, "nearest-exact", "pad_edge_pixel", "0, 0, 0", "center", 2)
    result, width, height, _ = call("ImageResizeKJv2", pictures, *arguments)
    inner = nearest(pictures, 16, 10)
    assert (width, height) == (16, 16)
    assert np.array_equal(result.numpy(), np.pad(inner.numpy(), ((0, 0), (3, 3), (0, 0), (0, 0)), mode="edge"))


def test_sound_between_two_times():
    audio = {"waveform": torch.rand(1, 2, 100), "sample_rate": 1}
    crop, cls = "AudioCrop", NODES["AudioCrop"]
    assert torch.equal(call(crop, audio, "0:10", "1:05")[0]["waveform"], audio["waveform"][..., 10:65])
    assert torch.equal(call(crop, audio, "90", "9:00")[0]["waveform"], audio["waveform"][..., 90:])
    for times in (("0:10", "0:10"), ("x", "1:00")):
        with pytest.raises(ValueError, match="start_time|no time"):
            cls.VALIDATE_INPUTS(*times)
    with pytest.raises(ValueError, match="is over before"):
        call(crop, audio, "2:00", "3:00")


def test_a_part_of_an_uploaded_sound(tmp_path):
    samples = torch.randint(-9000, 9000, (800,), dtype=torch.int16)
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 400, 0, "NONE", ""))
        file.writeframes(samples.numpy().astype("<i2").tobytes())
    before = get_host()
    set_host(StandaloneHost(inputs=tmp_path, device="cpu"))
    try:
        audio, length = call("VHS_LoadAudioUpload", "voice.wav", 0.5, 1)
        with pytest.raises(ValueError, match="lower start_time"):
            call("VHS_LoadAudioUpload", "voice.wav", 5)
        with pytest.raises((ValueError, OSError), match="other.wav"):
            NODES["VHS_LoadAudioUpload"].VALIDATE_INPUTS("other.wav")
    finally:
        set_host(before)
    assert length == 1 and audio["sample_rate"] == 400
    assert torch.allclose(audio["waveform"][0, 0], samples[200:600] / 32768, atol=1e-4)


def test_music_stays_with_the_voice_and_is_told(caplog):
    audio = {"waveform": torch.rand(1, 2, 100), "sample_rate": 1}
    bass, drums, other, vocals = call("AudioSeparation", audio, chunk_length=10)
    assert vocals is audio and not any(part["waveform"].any() for part in (bass, drums, other))
    assert "not separated" in caplog.text
