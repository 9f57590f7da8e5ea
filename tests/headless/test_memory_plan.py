"""What `wanvideo plan` says of a workflow with the 14B talking model, whose file is a header without values."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless import cli
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.memory_plan import plan
from wanvideo_wrapper.headless.published_headers import PlanningHost
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import checkpoint
from wanvideo_wrapper.wanvideo.file_memory import beside, config_and_footprint
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.memory import Work
from wanvideo_wrapper.wanvideo.tensor_file import StoredTensor

CLASSES = {**STAND_INS, **NODE_CLASS_MAPPINGS}
SHAPES = Path(__file__).parents[1] / "data/checkpoints"
NAME = "skyreels_v3_talking_avatar_14B.safetensors"
BESIDE = ("uni3c_controlnet.safetensors", "wan_controlnet_14B.safetensors")


class Header:
    """The names and shapes of the published file, as bfloat16."""

    metadata = {}

    def __init__(self, path):
        self.path, self.tensors = path, {}
        for key, value in json.loads((SHAPES / f"{path.stem}.json").read_text()).items():
            if key == "_meta":
                continue
            shape = tuple(value["shape"] if isinstance(value, dict) else value)
            for index in range(value["count"] if isinstance(value, dict) else 1):
                self.tensors[key.replace("{i}", str(index))] = StoredTensor(shape=shape, format="BF16")


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "open_files", lambda path: (Header(path),))
    (tmp_path / "models/diffusion_models").mkdir(parents=True)
    (tmp_path / "models/diffusion_models" / NAME).write_bytes(b"")
    (tmp_path / "models/controlnet").mkdir()
    for name in BESIDE:
        (tmp_path / "models/controlnet" / name).write_bytes(b"")
    return StandaloneHost(models=tmp_path / "models", device="cpu")


def workflow(quantization="fp8_e4m3fn_fast", attention="cudnn_fp8", swap=None, **more):
    loader = {"model": NAME, "base_precision": "bf16", "quantization": quantization, "attention_mode": attention}
    nodes = {
        "1": Node("1", "WanVideoModelLoader", "", loader | ({"block_swap_args": Link("4", 0)} if swap else {})),
        "2": Node("2", "INTConstant", "", {"value": 768}),
        "3": Node("3", "WanVideoImageToVideoEncode", "", {"width": Link("2", 0), "height": 768, "num_frames": 81}),
        "4": Node("4", "WanVideoBlockSwap", "", {"blocks_to_swap": swap or 0}),
    }
    return Prompt(nodes | more, {})


def said(lines, pattern):
    """The numbers of the one line that fits."""
    (match,) = [match for line in lines if (match := re.search(pattern, line))]
    return [float(number) for number in match.groups()]


def test_weights_and_peaks_of_14b_in_fp8(host):
    """18.5 GB of FP8 and what is kept in base precision; 3.4 GiB is what is counted with all blocks swapped."""
    lines = plan(workflow(swap=20), CLASSES, host)
    assert "81 frames of 768x768" in lines[0]
    (weights,) = said(lines, r"([\d.]+) GB of weights")
    resident, swapped = said(lines, r"peak: ([\d.]+) GB; all blocks swapped ([\d.]+) GB")
    assert 18.5 < weights < 20 and resident == pytest.approx(weights + 3.5, abs=0.3)
    assert swapped == pytest.approx(3.4 * 1.0737, rel=0.08)
    (saved,) = said(lines, r"as saved, 20 blocks swapped: ([\d.]+) GB")
    assert saved == pytest.approx(swapped + 20 * 0.464, abs=0.4)


@pytest.mark.parametrize(
    ("vram", "says"),
    [(80, "enough without block swap"), (12, r"blocks_to_swap 2\d \(or -1\), peak 1[12]\.\d GB"), (3, "not enough")],
)
def test_what_to_swap(host, vram, says):
    assert any(re.search(says, line) for line in plan(workflow(), CLASSES, host, vram=vram))


def steered(**embeds):
    loader = {"model": BESIDE[0], "base_precision": "fp16", "quantization": "disabled"}
    return {
        "6": Node("6", "WanVideoUni3C_ControlnetLoader", "", loader),
        "7": Node("7", "WanVideoUni3C_embeds", "", {"controlnet": Link("6", 0), **embeds}),
    }


def peaks_of(lines):
    return torch.tensor(said(lines, r"peak: ([\d.]+) GB; all blocks swapped ([\d.]+) GB"))


@pytest.mark.parametrize(
    ("embeds", "more", "says"),
    [({}, (0.23, 0.23), "0.2 GB of it on the GPU"), ({"offload": False}, (2.33, 2.33), "2.3 GB of it on the GPU")],
)
def test_uni3c_waits_or_is_there_as_a_whole(host, embeds, more, says):
    """1.17 billion values in 16 bits, two slabs of a twentieth of them."""
    plain, lines = plan(workflow(), CLASSES, host), plan(workflow(**steered(**embeds)), CLASSES, host)
    torch.testing.assert_close(peaks_of(lines) - peaks_of(plain), torch.tensor(more), atol=0.11, rtol=0)
    (line,) = [line for line in lines if BESIDE[0] in line]
    assert line == f"Beside     {BESIDE[0]}: {says}, counted above"


def test_uni3c_that_one_of_two_nodes_keeps_there_is_there_as_a_whole(host):
    nodes = steered()
    nodes["8"] = Node("8", "WanVideoUni3C_embeds", "", {"controlnet": Link("6", 0), "offload": False})
    assert any("2.3 GB of it on the GPU" in line for line in plan(workflow(**nodes), CLASSES, host))


def test_a_controlnet_waits_where_blocks_are_swapped(host):
    """0.35 billion values; its blocks in FP8 halve most of both."""
    for option, whole, slabs in (("disabled", 0.71, 0.22), ("fp8_e4m3fn_fast_no_ffn", 0.38, 0.11)):
        loader = {"model": BESIDE[1], "base_precision": "bf16", "quantization": option}
        nodes = {"6": Node("6", "WanVideoControlnetLoader", "", loader)}
        path, options = host.find_file("controlnet", BESIDE[1]), LoadOptions(base_dtype=torch.bfloat16)
        found = beside(path, replace(options, quantization=option.removesuffix("_no_ffn")), SYSTEMS)
        assert (found.resident / 1e9, found.swapped / 1e9) == pytest.approx((whole, slabs), abs=0.006)
        lines = plan(workflow(**nodes), CLASSES, host)
        more = peaks_of(lines) - peaks_of(plan(workflow(), CLASSES, host))
        torch.testing.assert_close(more, torch.tensor([whole, slabs]), atol=0.11, rtol=0)
        assert any(f"{whole:.1f} GB on the GPU, {slabs:.1f} GB where blocks are swapped" in line for line in lines)


def test_files_that_are_nothing_beside_and_those_that_are_not_there(host):
    options = LoadOptions(base_dtype=torch.bfloat16)
    assert beside(host.find_file("diffusion_models", NAME), options, SYSTEMS) is None
    nodes = steered()
    nodes["6"].inputs["model"] = "new.safetensors"
    planning = PlanningHost(models=host.models_dir("controlnet").parent, device="cpu")
    lines = plan(workflow(**nodes), CLASSES, planning)
    assert any(line.startswith("Beside     new.safetensors: not counted") for line in lines)


def test_options_that_old_graphs_saved_count_as_what_they_are_today(host):
    assert plan(workflow("torchao_fp8dq"), CLASSES, host) == plan(workflow("fp8_e4m3fn_fast"), CLASSES, host)


@pytest.mark.parametrize("name", ["model", "base_precision", "quantization", "attention_mode"])
def test_an_option_that_is_not_known_before_the_run_is_named(host, name):
    prompt = workflow(**{"9": Node("9", "SomePackText", "", {})})
    prompt.nodes["1"].inputs[name] = Link("9", 0)
    with pytest.raises(ValueError, match=f"'{name}' comes from another node"):
        plan(prompt, CLASSES, host)


def test_an_option_that_is_none_is_named(host):
    with pytest.raises(ValueError, match=r"WanVideoModelLoader \(#1\): 'attention_mode' has no choice 'spargeattn'"):
        plan(workflow(attention="spargeattn"), CLASSES, host)


def test_less_precision_takes_less(host):
    path, sizes = host.find_file("diffusion_models", NAME), {}
    for quantization in ("disabled", "fp8_e4m3fn", "fp4_experimental"):
        options = LoadOptions(base_dtype=torch.bfloat16, quantization=quantization)
        config, footprint = config_and_footprint(path, options, SYSTEMS, Work(75_600))
        sizes[quantization] = sum(footprint.blocks)
    assert config.num_layers == len(footprint.blocks) == 40
    assert 1.95 < sizes["disabled"] / sizes["fp8_e4m3fn"] < 2.01
    assert 3.4 < sizes["disabled"] / sizes["fp4_experimental"] < 3.6


def test_a_size_that_comes_from_a_picture_is_assumed(host):
    unknown = Node("3", "WanVideoImageToVideoEncode", "", {"width": Link("9", 0), "height": 768, "num_frames": 81})
    lines = plan(workflow(**{"3": unknown, "9": Node("9", "ImageResizeKJv2", "", {})}), CLASSES, host)
    assert "1280x720 (assumed" in lines[0]


def test_context_windows_bound_the_frames(host):
    options = Node("5", "WanVideoContextOptions", "", {"context_frames": 41})
    assert "41 frames" in plan(workflow(**{"5": options}), CLASSES, host)[0]


def test_without_a_model_there_is_nothing_to_plan(host):
    with pytest.raises(ValueError, match="no WanVideoModelLoader"):
        plan(Prompt({}, {}), CLASSES, host)


def test_the_command_plans_the_demo(capsys):
    from wanvideo_wrapper.demo import MODELS, WORKFLOW

    assert cli.main(["plan", str(WORKFLOW), "--models", str(MODELS), "--vram", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 GiB are enough without block swap" in out and "tiny_umt5.safetensors" in out
    assert cli.main(["plan", str(WORKFLOW), "--vram", "-1"]) == 2


@pytest.mark.parametrize("asked", ["ImageResizeKJv2", "GetImageSizeAndCount", "GetImageSize+"])
def test_a_size_is_what_a_resizing_node_is_asked_for(host, asked):
    resize = Node("5", "ImageResizeKJv2", "", {"image": Link("9", 0), "width": Link("2", 0), "height": 512})
    nodes = {"5": resize, "6": Node("6", asked, "", {"image": Link("5", 0), "width": 768, "height": 512})}
    prompt = workflow(**nodes)
    first = 0 if asked == "GetImageSize+" else 1
    prompt.nodes["3"].inputs |= {"width": Link("6", first), "height": Link("6", first + 1)}
    assert "81 frames of 768x512 (WanVideoImageToVideoEncode" in plan(prompt, CLASSES, host)[0]
    nodes["6"].inputs["height"] = resize.inputs["height"] = 0
    assert "(assumed" in plan(prompt, CLASSES, host)[0]


def test_sizes_that_lead_back_to_themselves_are_not_known(host):
    ring = {
        "5": Node("5", "GetImageSizeAndCount", "", {"image": Link("6", 0)}),
        "6": Node("6", "ImagePass", "", {"image": Link("5", 0)}),
    }
    prompt = workflow(**ring)
    prompt.nodes["3"].inputs["width"] = Link("5", 1)
    assert "(assumed" in plan(prompt, CLASSES, host)[0]


def test_a_number_of_frames_passes_a_switch(host):
    nodes = {
        "5": Node("5", "Any Switch (rgthree)", "", {"any_01": Link("6", 0), "any_02": Link("2", 0)}),
        "6": Node("6", "mxSlider", "", {"Xi": 45, "Xf": 45.0, "isfloatX": 0}),
    }
    prompt = workflow(**nodes)
    prompt.nodes["3"].inputs["num_frames"] = Link("5", 0)
    assert "45 frames of 768x768" in plan(prompt, CLASSES, host)[0]


def test_a_size_that_is_no_number_is_named(host):
    prompt = workflow()
    prompt.nodes["2"].inputs["value"] = "{{WIDTH}}"
    with pytest.raises(ValueError, match=r"INTConstant \(#2\): 'value' must be a whole number, not '{{WIDTH}}'"):
        list(plan(prompt, CLASSES, host))
