"""Nodes of other packs use this pack as they use the original: by method, by module, and under names of their own."""

import copy
import importlib
import importlib.util
import inspect
import json
import pickle
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import wanvideo_wrapper
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host
from wanvideo_wrapper.linked_values import in_form
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.registry import SYSTEMS, refuse_other_spellings
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.t5 import TextEncoder
from wanvideo_wrapper.wanvideo.modules.vae import WanVAE
from wanvideo_wrapper.wanvideo.opaque import Opaque
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, TextEmbeds
from wanvideo_wrapper.wanvideo.schedulers import get_scheduler, scheduler_list

N = wanvideo_wrapper.NODE_CLASS_MAPPINGS
# The parameters of the original's entries, in their order.
ORDERS = json.loads((Path(__file__).parent / "data/call_orders.json").read_text())


def taken_in_order(node):
    """The parameters that an entry takes in order."""
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]


@pytest.mark.parametrize("name", ORDERS)
def test_entries_take_values_in_the_order_of_the_original(name):
    renamed = getattr(N[name], "RENAMED_INPUTS", {})
    theirs, ours = [renamed.get(each, each) for each in ORDERS[name]], taken_in_order(N[name])
    assert ours[: len(theirs)] == theirs[: len(ours)]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("WanVideoImageToVideoEncode", "fun_or_fl2v_model", False), ("WanVideoClipVisionEncode", "ratio", 1.0),
        ("DrawNLFPoses", "stick_width", 1.0), ("DrawNLFPoses", "point_radius", 2),
    ],
)  # fmt: skip
def test_what_a_prompt_leaves_out_is_as_in_the_original(name, given, value):
    """There entries have other defaults than their widgets."""
    assert inspect.signature(getattr(N[name], N[name].FUNCTION)).parameters[given].default == value


def test_values_in_order_are_looked_at_as_those_of_links_are():
    swap = N["WanVideoBlockSwap"]()
    assert swap.setargs(3, True, False) == swap.setargs(blocks_to_swap=3, offload_img_emb=True, offload_txt_emb=False)
    with pytest.raises(ValueError, match="WanVideo Block Swap: 'blocks_to_swap' must be a whole number, not nan"):
        swap.setargs(float("nan"), False, False)
    with pytest.raises(TypeError, match=r"Block Swap takes 7 values in order \(blocks_to_swap, .*\), not 8"):
        swap.setargs(*range(8))
    with pytest.raises(TypeError, match="Swap got 'blocks_to_swap' twice, in order and by name"):
        swap.setargs(3, True, False, blocks_to_swap=4)


def test_inputs_that_had_another_name_are_taken_under_it():
    given = {"width": 32, "height": 32, "num_frames": 9, "force_offload": True}
    with pytest.raises(ValueError, match="WanVideo Encode: 'image' is a str, not pictures"):
        N["WanVideoEncode"]().encode(object(), driving_video="a video", enable_vae_tiling=False)
    with pytest.raises(ValueError, match="has no input 'video' in this version"):
        N["WanVideoImageToVideoEncode"]().process(**given, video=None)


@pytest.mark.parametrize("name", ["WanVideoModelLoader", "WanVideoSampler", "WanVideoDecode", "WanVideoVACEEncode"])
def test_a_node_that_sets_the_device_of_a_module_finds_it(name):
    """As those of ComfyUI-MultiGPU do."""
    module = inspect.getmodule(N[name]())
    before = module.device
    assert before == get_host().device() and module.offload_device == get_host().offload_device()
    module.device = torch.device("meta")
    assert module.device.type == "meta" and get_host().device() == before
    module.device = before


def test_a_module_of_the_original_has_every_node():
    for module in ("nodes", "nodes_model_loading", "nodes_sampler", "nodes_utility"):
        for name, node in N.items():
            assert getattr(importlib.import_module(f"wanvideo_wrapper.{module}"), name) is node
    with pytest.raises(AttributeError, match="'wanvideo_wrapper.nodes' has no attribute 'nothing'"):
        _ = importlib.import_module("wanvideo_wrapper.nodes").nothing


class Unloaded(ModuleType):
    """As modules whose package is not there, or loaded when something is looked up in it."""

    def __getattr__(self, name):
        raise ImportError("looked up")


def test_an_import_under_another_name_is_the_same_package(monkeypatch):
    """As `importlib.import_module("custom_nodes.ComfyUI-WanVideoWrapper.nodes_sampler")` makes one."""
    monkeypatch.setattr(sys, "modules", {"unloaded": Unloaded("unloaded")} | sys.modules)
    queued = []
    monkeypatch.setattr("wanvideo_wrapper.host.before_queuing", queued.append)
    file, name = Path(wanvideo_wrapper.__file__), "ComfyUI-WanVideoWrapper"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    sys.modules[name] = other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.NODE_CLASS_MAPPINGS == N and not queued
    assert importlib.import_module(f"{name}.nodes_sampler").WanVideoSampler is N["WanVideoSampler"]


@pytest.mark.parametrize("start", [0, 2])
def test_schedules_are_those_of_the_scheduler_node(start):
    """As ComfyUI-TripleKSampler reads them."""
    for name in ("euler", "unipc/beta", "dpm++_sde"):
        assert name in scheduler_list
        *_, wired, _, _ = N["WanVideoScheduler"]().process(name, 6, start, -1, 5.0)
        schedule, timesteps, first, last = get_scheduler(
            name, 6, start_step=start, end_step=-1, shift=5.0, device=torch.device("cpu"), transformer_dim=5120
        )
        assert torch.equal(schedule.sigmas, wired.sigmas) and (first, last) == (start, 5)
        assert torch.equal(timesteps, wired.timesteps) and len(timesteps) == 6 - start


def test_settings_of_block_swap_are_taken_as_a_dict():
    """As WanVideoBlockSwapMultiGPU gives them."""
    widgets = {"blocks_to_swap": 7, "offload_img_emb": True, "offload_txt_emb": False, "prefetch_blocks": 2}
    model = Model()
    (swapped,) = N["WanVideoSetBlockSwap"]().loadmodel(model, {**widgets, "swap_device": "cpu"})
    assert swapped.block_swap == N["WanVideoBlockSwap"]().setargs(**widgets)[0]
    with pytest.raises(ValueError, match="'block_swap_args' wants blocks to wait on cuda:1; .* choose cpu"):
        N["WanVideoSetBlockSwap"]().loadmodel(model, {**widgets, "swap_device": "cuda:1"})


@dataclass(frozen=True)
class Model:
    block_swap: object = None


def cut(speech, start, length):
    """As InfiniteTalkEmbedsSlice cuts speech for the original pack."""
    features = [part[start : start + length] for part in speech["audio_features"]]
    scales = {name: speech.get(name, 1.0) for name in ("audio_scale", "audio_cfg_scale")}
    return {"audio_features": features, **scales, "ref_target_masks": speech.get("ref_target_masks", None)}


def test_speech_is_read_and_taken_as_a_dict():
    features, masks = (torch.randn(20, 3, 8), torch.randn(20, 3, 8)), torch.rand(2, 4, 4)
    speech = MultiTalkEmbeds(features=features, scale=0.7, cfg_scale=2.5, masks=masks)

    def taken(value):
        declared = {"optional": {"multitalk_embeds": ("MULTITALK_EMBEDS",)}}
        return in_form(declared, {"multitalk_embeds": value}, "Sampler")

    got = taken(cut(speech, 4, 9))["multitalk_embeds"]
    assert (got.scale, got.cfg_scale, got.num_frames) == (0.7, 2.5, 9) and got.masks is masks
    assert all(torch.equal(part, whole[4:13]) for part, whole in zip(got.features, features, strict=True))
    assert taken(speech)["multitalk_embeds"] is speech and speech.get("audio_stride") is None
    assert "audio_features" in speech and "audio_stride" not in speech
    stacked = taken({**speech, "audio_features": torch.stack(features)})["multitalk_embeds"]
    assert stacked.num_frames == 20 and (stacked.scale, stacked.cfg_scale) == (0.7, 2.5) and stacked.masks is masks
    with pytest.raises(ValueError, match="Sampler: 'multitalk_embeds' holds no speech"):
        taken(cut(speech, 20, 9))


def test_a_look_into_values_of_this_pack_is_told_in_one_sentence():
    """As nodes of other packs read the dicts of the original's embeds, and move its VAE themselves."""
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9)
    text = TextEmbeds(positive=(torch.randn(3, 8),))
    for value in (embeds, text, WanVAE.__new__(WanVAE), TextEncoder.__new__(TextEncoder)):
        name = type(value).__name__
        with pytest.raises(AttributeError, match=f"^{name} of this pack has no attribute 'clone': a node of another"):
            value.clone()
        with pytest.raises(TypeError, match=f"^{name} of this pack has no item 'target_shape'.* in its place.$"):
            _ = value["target_shape"]
        assert not hasattr(value, "get")
    assert replace(embeds, num_frames=5).num_frames == 5 and copy.copy(text) == text
    assert pickle.loads(pickle.dumps(embeds)) == embeds


def test_an_error_in_a_property_stays_its_own():
    class Broken(Opaque):
        @property
        def size(self):
            return None.size

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'size'"):
        _ = Broken().size


def test_the_model_is_where_nodes_of_other_packs_look_for_it(tmp_path):
    """As WanVideoSamplerMultiGPU and ComfyUI-TripleKSampler do."""
    tiny.transformer(in_dim=16).save(tmp_path / "m.safetensors", torch.float32)
    model = load_wan_model(
        tmp_path / "m.safetensors", LoadOptions(base_dtype=torch.float32), StandaloneHost(device="cpu"), SYSTEMS
    )
    assert model.model.diffusion_model is model.transformer
    assert model.model_options.get("transformer_options", {}).get("block_swap_args") is None


@pytest.mark.parametrize("there", [["ATI", "ovi"], ["ovi", "HuMo", "LongCat"]])
def test_files_put_over_the_original_s_folders_are_told(there):
    """As Windows and macOS leave them: the folder keeps its name, and Python does not find it under the other."""
    with pytest.raises(ImportError, match=f"whose folders {', '.join(sorted(set(there) - {'ovi'}))} stayed: delete"):
        refuse_other_spellings(there)
    refuse_other_spellings([*(name.lower() for name in there), *there, "MTV", "gguf"])
