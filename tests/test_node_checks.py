"""VALIDATE_INPUTS: what cannot run is refused when the graph is queued, in the words of the node that would meet it."""

import inspect
import math
import re

import pytest
import qwen_files
import torch
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.flashvsr.decoder import DecoderLayout, FlashVsrDecoder
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.modules.tiny_vae import TinyAutoencoder, TinyLayout
from wanvideo_wrapper.wanvideo.text_cache import TextCache

SAMPLER = {"model": "WANVIDEOMODEL", "image_embeds": "WANVIDIMAGE_EMBEDS", "text_embeds": "WANVIDEOTEXTEMBEDS"}
TILES = {"tile_x": 128, "tile_y": 272, "tile_stride_x": 128, "tile_stride_y": 128}
REFUSALS = [
    ("WanVideoSampler", {"model": "WANVIDEOMODEL"}, {}, "no prompt"),
    ("WanVideoSamplerv2", {"model": "WANVIDEOMODEL"}, {}, "no prompt"),
    ("WanVideoSampler", SAMPLER, {"scheduler": "rcm", "steps": 8}, "'rcm' works with 4 steps at most, not 8"),
    ("WanVideoSampler", SAMPLER, {"scheduler": "nonsense"}, "'scheduler' has no choice 'nonsense'"),
    ("WanVideoSampler", SAMPLER, {"start_step": 5, "end_step": 5}, "No steps are left"),
    ("WanVideoSampler", SAMPLER, {"shift": 0.0}, "shift must be above 0"),
    ("WanVideoSampler", SAMPLER, {"steps": 0}, "'steps' must be between 1 and inf, not 0"),
    ("WanVideoSampler", SAMPLER, {"denoise_strength": float("nan")}, "'denoise_strength' must be between"),
    ("WanVideoSampler", {**SAMPLER, "model": "WANVAE"}, {}, "'model' takes WANVIDEOMODEL, but WANVAE"),
    ("WanVideoScheduler", {}, {"scheduler": "flowmatch_causvid"}, "9 steps at most, not 30"),
    ("WanVideoSchedulerv2", {}, {"start_step": 30}, "No steps are left"),
    ("WanVideoContextOptions", {}, {"context_frames": 16, "context_overlap": 16}, "must be less than context_frames"),
    ("WanVideoImageToVideoMultiTalk", {}, {"frame_window_size": 25, "motion_frame": 25}, "must be less than frame_w"),
    ("WanVideoImageToVideoSkyreelsv3_audio", {}, {"frame_window_size": 17, "drop_frames": 12}, "plus drop_frames"),
    ("MultiTalkSilentEmbeds", {}, {}, "connect Wav2VecModelLoader"),
    ("HuMoEmbeds", {}, {}, "connect WanVideoVAELoader"),
    ("HuMoEmbeds", {"vae": "WANVAE", "audio": "AUDIO"}, {}, "connect WhisperModelLoader"),
    ("HuMoEmbeds", {"vae": "WANVAE"}, {"num_frames": -1}, "none is connected"),
    ("WanVideoImageToVideoEncode", {"start_image": "IMAGE"}, {}, "connect WanVideoVAELoader"),
    ("WanVideoUni3C_embeds", {}, {}, "nothing to follow"),
    ("WanVideoSLG", {}, {"blocks": "9 10"}, "separated by commas"),
    ("WanVideoExperimentalArgs", {}, {"video_attention_split_steps": "x"}, "whole numbers"),
    ("WanVideoExperimentalArgs", {}, {"temporal_score_rescaling": True, "tsr_k": 0.0}, "tsr_k"),
    ("WanVideoSetAttentionModeOverride", {}, {"start_step": 4, "end_step": 4}, "applies nowhere"),
    ("WanVideoBlockList", {}, {"blocks": "5-2"}, "is empty"),
    ("WanVideoEncode", {}, {"enable_vae_tiling": True, **TILES}, "larger than their strides"),
    ("WanVideoDecode", {}, {"enable_vae_tiling": True, **TILES}, "larger than their strides"),
    ("WanVideoTextEncode", {}, {"positive_prompt": "a"}, "connect LoadWanVideoT5TextEncoder"),
    ("WanVideoTextEncode", {}, {"positive_prompt": "a", "use_disk_cache": True}, "not in the cache"),
    ("WanVideoTextEncodeSingle", {}, {"prompt": "a"}, "connect LoadWanVideoT5TextEncoder"),
    ("WanVideoLoraSelectByName", {}, {"lora_name": "absent"}, "No LoRA"),
    ("WanVideoModelLoader", {}, {"model": "vae.safetensors"}, "is a Wan VAE"),
    ("WanVideoModelLoader", {}, {"model": "cut.safetensors"}, "is truncated"),
    ("WanVideoModelLoader", {}, {"model": "gone.safetensors"}, "'gone.safetensors', which is not there: put it into"),
    ("WanVideoModelLoader", {}, {"model": "t2v.safetensors", "attention_mode": "cudnn_fp8"}, "cannot run because"),
    ("WanVideoVAELoader", {}, {"model_name": "t5.safetensors"}, "load it with 'WanVideo T5 Text Encoder Loader'"),
    ("LoadWanVideoT5TextEncoder", {}, {"model_name": "vae.safetensors"}, "load it with 'WanVideo VAE Loader'"),
    ("WanVideoTextEncodeCached", {}, {"model_name": "vae.safetensors"}, "load it with 'WanVideo VAE Loader'"),
    ("LoadWanVideoClipTextEncoder", {}, {"model_name": "t5.safetensors"}, "T5 Text Encoder Loader"),
    ("Wav2VecModelLoader", {}, {"model": "vae.safetensors"}, "is a Wan VAE"),
]  # fmt: skip
LINKED = {
    "WanVideoSampler": SAMPLER,
    "WanVideoSamplerSettings": SAMPLER,
    "WanVideoSamplerv2": SAMPLER,
    "MultiTalkSilentEmbeds": {"wav2vec_model": "WAV2VECMODEL"},
    "HuMoEmbeds": {"vae": "WANVAE"},
    "WanVideoImageToVideoEncode": {"vae": "WANVAE"},
    "WanVideoUni3C_embeds": {"render_latent": "LATENT"},
    "WanVideoTextEncode": {"t5": "WANTEXTENCODER"},
    "WanVideoTextEncodeSingle": {"t5": "WANTEXTENCODER"},
}
FILES = {
    "WanVideoModelLoader": {"model": "t2v.safetensors"},
    "WanVideoVAELoader": {"model_name": "vae.safetensors"},
    "WanVideoTinyVAELoader": {"model_name": "tae.safetensors"},
    "WanVideoFlashVSRDecoderLoader": {"model_name": "tc.safetensors"},
    "LoadWanVideoT5TextEncoder": {"model_name": "t5.safetensors"},
    "WanVideoTextEncodeCached": {"model_name": "t5.safetensors"},
    "LoadWanVideoClipTextEncoder": {"model_name": "clip.safetensors"},
    "Wav2VecModelLoader": {"model": "w.safetensors"},
    "WanVideoLoraSelectByName": {"lora_name": "distill"},
    "QwenLoader": {"model": "qwen.safetensors"},
    "WanVideoPromptExtenderSelect": {"model": "qwen.safetensors"},
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    before = get_host()
    models = tmp_path_factory.mktemp("models")
    tiny.transformer(in_dim=16).save(models / "diffusion_models/t2v.safetensors")
    tiny.vae(base_dim=4).save(models / "vae/vae.safetensors")
    layout = TinyLayout(16, 1, 4, (8, 4, 4, 4), (2, 2, 1), (1, 2, 2))
    (models / "vae_approx").mkdir()
    save_file(TinyAutoencoder(layout).state_dict(), models / "vae_approx/tae.safetensors")
    decoder = FlashVsrDecoder(DecoderLayout((4, 4, 4, 4), (1, 2, 2)))
    save_file(decoder.state_dict(), models / "vae/tc.safetensors")
    tiny.text_encoder().save(models / "text_encoders/t5.safetensors")
    qwen_files.language_model().save(models / "text_encoders/qwen.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip.safetensors")
    tiny.wav2vec().save(models / "wav2vec2/w.safetensors")
    vae = (models / "vae/vae.safetensors").read_bytes()
    for folder in ("diffusion_models", "text_encoders", "wav2vec2"):
        (models / folder / "vae.safetensors").write_bytes(vae)
    (models / "vae/t5.safetensors").write_bytes((models / "text_encoders/t5.safetensors").read_bytes())
    (models / "diffusion_models/cut.safetensors").write_bytes(vae[:-1])
    (models / "loras").mkdir()
    (models / "loras/distill_rank64.safetensors").write_bytes(vae)
    host = StandaloneHost(models=models, device="cpu")
    set_host(host)
    yield host
    set_host(before)


@pytest.mark.parametrize(("name", "links", "values", "fragment"), REFUSALS, ids=lambda value: str(value)[:24])
def test_what_cannot_run_is_refused_before_anything_runs(host, name, links, values, fragment):
    with pytest.raises((ValueError, OSError), match=re.escape(fragment)):
        N[name].VALIDATE_INPUTS(**values, input_types=links)


# They are refused whatever is connected.
NEVER = ("LoadNLFModel", "DownloadAndLoadNLFModel")


def judging():
    return {
        name: node
        for name, node in N.items()
        if hasattr(node, "VALIDATE_INPUTS") and name not in NEVER
    }


def test_defaults_are_welcome_and_every_parameter_is_an_input_with_a_default(host):
    assert len(judging()) >= 25
    for name, node in judging().items():
        declared = node.INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        for parameter in list(inspect.signature(node.VALIDATE_INPUTS).parameters.values()):
            # ComfyUI leaves out what other nodes make, and knows no values but those of inputs.
            assert parameter.default is not parameter.empty, (name, parameter)
            assert parameter.name in (*inputs, "input_types"), (name, parameter)
            if parameter.name == "input_types" or isinstance(inputs[parameter.name][0], list):
                continue
            widget = inputs[parameter.name][1].get("default")
            assert parameter.default == widget or isinstance(widget, str), (name, parameter)
        assert node.VALIDATE_INPUTS(**FILES.get(name, {}), input_types=LINKED.get(name, {})) is True, name


@pytest.mark.parametrize("name", [name for name in FILES if name != "WanVideoLoraSelectByName"])
def test_a_file_saved_under_another_folder_and_system_is_checked_where_it_lies(host, name):
    ((widget, file),) = FILES[name].items()
    assert N[name].VALIDATE_INPUTS(**{widget: f"WanVideo\\{file}"}) is True


def test_values_that_other_nodes_make_are_not_judged(host):
    links = {**SAMPLER, "steps": "INT"}
    assert N["WanVideoSampler"].VALIDATE_INPUTS(scheduler="unipc", start_step=30, input_types=links) is True
    custom = {**SAMPLER, "sigmas": "SIGMAS"}
    assert N["WanVideoSampler"].VALIDATE_INPUTS(start_step=30, input_types=custom) is True
    assert N["WanVideoDecode"].VALIDATE_INPUTS(**TILES) is True


def test_links_of_any_type_fit_and_whole_numbers_are_reals(host):
    sampler = N["WanVideoSampler"]
    for links in ({"model": "*"}, {"model": "WANVIDEOMODEL,MODEL"}, {"cfg": "INT"}, {"cfg": "FLOAT"}):
        assert sampler.VALIDATE_INPUTS(input_types={**SAMPLER, **links}) is True
    with pytest.raises(ValueError, match="'steps' takes INT, but FLOAT is linked to it"):
        sampler.VALIDATE_INPUTS(input_types={**SAMPLER, "steps": "FLOAT"})


def test_prompts_on_disk_need_no_encoder(host, monkeypatch, tmp_path):
    monkeypatch.setattr(type(host), "cache_dir", lambda self: tmp_path)
    cache = TextCache(tmp_path / "text_embeds")
    for prompt in ("a", "b", ""):
        cache.save(prompt, "t5", torch.rand(3, 8))
    node, single = N["WanVideoTextEncode"], N["WanVideoTextEncodeSingle"]
    assert node.VALIDATE_INPUTS(positive_prompt="a | b", use_disk_cache=True) is True
    with pytest.raises(ValueError, match="not in the cache"):
        node.VALIDATE_INPUTS(positive_prompt="a | c", use_disk_cache=True)
    assert single.VALIDATE_INPUTS(prompt="b", use_disk_cache=True) is True
    with pytest.raises(ValueError, match="not in the cache"):
        single.VALIDATE_INPUTS(prompt="a | b", use_disk_cache=True)


def test_every_value_of_a_wrong_type_is_refused_in_one_sentence(host):
    """What ComfyUI hands on, although it could not make the type of it: numbers that are empty, text, lists."""
    refused = 0
    for name, node in judging().items():
        declared = node.INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        for parameter in set(inspect.signature(node.VALIDATE_INPUTS).parameters) - {"input_types"}:
            kind = inputs[parameter][0]
            wrong = {"INT": (None, "", "x", [1], {}), "FLOAT": (None, "x", [0.5]), "STRING": (None, [], {})}
            for value in ("none of them", [3]) if isinstance(kind, list) else wrong.get(kind, ()):
                with pytest.raises(ValueError, match=rf"^'{parameter}' (must be|has no choice|is) .*[^)]$") as refusal:
                    values = {**FILES.get(name, {}), parameter: value}
                    node.VALIDATE_INPUTS(**values, input_types=LINKED.get(name, {}))
                assert str(value) in str(refusal.value), (name, parameter)
                refused += 1
    assert refused > 100


def test_values_that_are_linked_come_without_a_value(host):
    """ComfyUI gives None for what another node will make."""
    for name, node in judging().items():
        declared = node.INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        for parameter in set(inspect.signature(node.VALIDATE_INPUTS).parameters) - {"input_types"}:
            kind = inputs[parameter][0]
            links = {**LINKED.get(name, {}), parameter: kind if isinstance(kind, str) else "COMBO"}
            values = {**FILES.get(name, {}), parameter: None}
            assert node.VALIDATE_INPUTS(**values, input_types=links) is True, (name, parameter)


def numbers():
    """(node, input, its type, its least value) of every widget of a number."""
    for name, node in N.items():
        declared = node.INPUT_TYPES()
        for section in ("required", "optional"):
            for entry, (kind, *options) in declared.get(section, {}).items():
                if kind in ("INT", "FLOAT"):
                    yield name, entry, kind, (options[0] if options else {}).get("min", -math.inf)


def test_no_node_runs_with_a_number_that_is_none(host):
    """ComfyUI lets NaN pass its limits, and holds what another node makes to none: the entry itself refuses it."""
    refused = 0
    for name, entry, kind, least in numbers():
        node = N[name]
        zero = [0] if 0 < least <= 1 else []
        for value in (math.nan, math.inf, -math.inf, "8", *zero, *([-(10**400), -1] if least >= 0 else [])):
            sentence = rf"^{re.escape(node.DISPLAY_NAME)}: '{entry}' must be a .*\.$"
            with pytest.raises(ValueError, match=sentence) as told:
                getattr(node(), node.FUNCTION)(**{entry: value})
            assert repr(value) in str(told.value) and ("whole" in str(told.value)) == (kind == "INT")
            refused += 1
    assert refused > 1500


def test_a_video_without_pixels_is_refused(host):
    with pytest.raises(ValueError, match="^A video cannot be 0x480 pixels large"):
        N["WanVideoEmptyEmbeds"]().process(width=0, height=480, num_frames=9)


def test_numbers_beyond_a_widgets_own_limits_may_be_linked(host):
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(width=32, height=32, num_frames=10**4 + 1)
    assert embeds is not None
