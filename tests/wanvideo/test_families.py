"""Every published key and shape of the base families is what the model is built with; other systems are named."""

import itertools
import json
import math
import re
import struct

import pytest
import torch
from published_keys import keys_of
from wanvideo_wrapper import NODE_DISPLAY_NAME_MAPPINGS
from wanvideo_wrapper.node_checks import check_loadable
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.architecture import config_of
from wanvideo_wrapper.wanvideo.assign import check
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.families import LORA_KIND, OTHER_KINDS, TRANSFORMER, TRANSFORMER_KIND
from wanvideo_wrapper.wanvideo.inspect import describe
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, contents, with_aliases
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.quantization import plan_of
from wanvideo_wrapper.wanvideo.safetensors_file import BITS

BF16 = LoadOptions(base_dtype=torch.bfloat16)
BASE = {
    "wan21_t2v_1_3B": (1536, 30, 12, 16, ()),
    "wan21_t2v_14B": (5120, 40, 40, 16, ()),
    "wan21_i2v_14B": (5120, 40, 40, 36, ("ClipImageExtension",)),
    "wan21_flf2v_14B": (5120, 40, 40, 36, ("ClipImageExtension",)),
    "wan21_fun_inp_1_3B": (1536, 30, 12, 36, ("ClipImageExtension",)),
    "wan21_fun_control_14B": (5120, 40, 40, 48, ("FunControl", "ClipImageExtension")),
    "wan21_fun_control_camera_14B": (5120, 40, 40, 32, ("FunCamera", "ClipImageExtension")),
    "wan22_fun_control_A14B": (5120, 40, 40, 52, ("FunControl",)),
    "wan22_fun_control_camera_A14B": (5120, 40, 40, 36, ("FunCamera",)),
    "wan22_t2v_A14B": (5120, 40, 40, 16, ()),
    "wan22_i2v_A14B": (5120, 40, 40, 36, ()),
    "wan22_ti2v_5B": (3072, 30, 24, 48, ()),
    "humo_17B": (5120, 40, 40, 36, ("HuMo",)),
    "humo_1_7B": (1536, 30, 12, 36, ("HuMo",)),
    "skyreels_v3_talking_avatar_14B": (5120, 40, 40, 36, ("ClipImageExtension", "MultiTalk")),
    "s2v_14B": (5120, 40, 40, 16, ("SpeechInjection",)),
    "wananimate_14B": (5120, 40, 40, 36, ("ClipImageExtension", "Animate")),
    "vace_1_3B": (1536, 30, 12, 16, ("VaceExtension",)),
    "vace_14B": (5120, 40, 40, 16, ("VaceExtension",)),
    "skyreels_v2_df_1_3B": (1536, 30, 12, 16, ("FrameRateEmbedding",)),
    "skyreels_v2_df_14B": (5120, 40, 40, 16, ("FrameRateEmbedding",)),
    "mtvcrafter_14B_merged": (5120, 40, 40, 16, ("MtvCrafter",)),
    "steadydancer_14B": (5120, 40, 40, 36, ("SteadyDancer", "ClipImageExtension")),
    "recammaster_1_3B": (1536, 30, 12, 16, ("ReCamMaster",)),
    "ovi_11B": (3072, 30, 24, 48, ("Ovi",)),
    "longcat_13B": (4096, 48, 32, 16, ("LongCat",)),
    "longcat_avatar_13B": (4096, 48, 32, 16, ("LongCat", "LongCatAvatar")),
    "minimaxremover_1_3B": (1536, 30, 12, 48, ("FunControl", "MiniMaxRemover")),
}
WITH_WEIGHTS = (
    "FunControl", "FunCamera", "ClipImageExtension", "MultiTalk", "HuMo", "SpeechInjection", "Animate", "VaceExtension",
    "MtvCrafter", "FrameRateEmbedding", "ReCamMaster", "SteadyDancer",
    "Ovi", "LongCat", "LongCatAvatar",
    "MiniMaxRemover",
)  # fmt: skip
REFUSED = {}


def sparse_file(path, shapes, metadata=None, types=None):
    """A safetensors file of the right length whose tensors are holes in the file. types: of those that are not BF16."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        form = (types or {}).get(name, "BF16")
        size = torch.Size(shape).numel() * BITS[form] // 8
        header[name] = {"dtype": form, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_base_families(name, prefix, tmp_path):
    dim, layers, heads, in_dim, systems = BASE[name]
    shapes = keys_of(name)
    checkpoint = with_aliases(
        open_checkpoint(sparse_file(tmp_path / f"{name}.safetensors", {prefix + k: v for k, v in shapes.items()})),
        SYSTEMS,
    )
    config = config_of(checkpoint, SYSTEMS)
    assert (config.dim, config.num_layers, config.num_heads, config.in_dim) == (dim, layers, heads, in_dim)
    found = SYSTEMS.detect(checkpoint.shapes)
    assert tuple(type(e).__name__ for e in found if type(e).__name__ in WITH_WEIGHTS) == systems
    with torch.device("meta"):
        model = WanModel(config, found)
    built = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    published = {
        re.sub(r"(?<!multitalk_)audio_proj\.(?!audio_proj_glob)", "multitalk_audio_proj.", key): shape
        for key, shape in shapes.items()
    }
    published = {
        key.removeprefix("video_model."): shape for key, shape in published.items() if not key.startswith("model_type.")
    }
    assert built == published


# The others are as this one, and take longer.
QUICK = ("wan21_t2v_1_3B", "wan21_fun_inp_1_3B")


def tiles(rows, columns, block):
    """Shape of block scales in cuBLAS' order."""
    return -(-rows // 128) * 128, -(-columns // block // 4) * 4


# Storage -> what a linear layer's weight of N x K becomes in a file: leaf -> type and shape; and its mark.
STORED = {
    "F8_E4M3": (lambda n, k: {"weight": ("F8_E4M3", (n, k))}, None),
    "F8_E4M3 scaled": (lambda n, k: {"weight": ("F8_E4M3", (n, k)), "scale_weight": ("F32", ())}, None),
    "NVFP4": (
        lambda n, k: {"weight": ("U8", (n, k // 2)), "weight_scale": ("F8_E4M3", tiles(n, k, 16)),
                      "weight_scale_2": ("F32", ())},
        {"format": "nvfp4"},
    ),
    "MXFP8": (
        lambda n, k: {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("F8_E8M0", tiles(n, k, 32))}, {"format": "mxfp8"}
    ),
    "INT8": (
        lambda n, k: {"weight": ("I8", (n, k)), "weight_scale": ("F32", (n, 1))}, {"format": "int8_tensorwise"}
    ),
    "INT4 rotated": (
        lambda n, k: {"weight": ("I8", (n, k // 2)), "weight_scale": ("F32", (n,))}, {"format": "convrot_w4a4"}
    ),
    "W4A8": (
        lambda n, k: {"weight": ("I8", (n, k // 2)), "weight_s_rel": ("F8_E4M3", (n, k // 16)),
                      "weight_s_channel": ("F32", (n,)), "weight_codebook": ("F32", (16,))},
        {"format": "asym_w4a8_int8"},
    ),
}  # fmt: skip


def is_large(name, shape):
    """Whether files hold this tensor in few bits."""
    return name.endswith(".weight") and "blocks." in name and len(shape) == 2 and shape[1] % 256 == 0


def stored_file(path, shapes, storage):
    """The file with its large linear layers in this storage, as ComfyUI and Kijai write it."""
    make, mark = STORED[storage]
    tensors, marks = {}, {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        if not is_large(name, shape):
            tensors[name] = ("BF16", shape)
            continue
        marks[layer] = mark
        tensors |= {f"{layer}.{part}": stored for part, stored in make(*shape).items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": marks})} if mark else None
    types = {name: form for name, (form, _) in tensors.items()}
    return sparse_file(path, {name: shape for name, (_, shape) in tensors.items()}, metadata, types)


def gguf_file(path, shapes):
    """Large linear layers in Q4_K; five dimensions as city96's converter writes them."""
    fields, infos, offset = b"", b"", 0
    large = {name: shape for name, shape in shapes.items() if len(shape) > 4}
    for name, shape in large.items():
        key = b"comfy.gguf.orig_shape." + name.encode()
        fields += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 5, len(shape))
        fields += struct.pack(f"<{len(shape)}i", *shape)
    for name, shape in shapes.items():
        quantized = is_large(name, shape)
        dims, count = (math.prod(shape),) if name in large else shape[::-1], math.prod(shape)
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
        infos += struct.pack(f"<{len(dims)}QIQ", *dims, 12 if quantized else 1, offset)
        size = count // 256 * 144 if quantized else 2 * count
        offset += -(-size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(large)) + fields + infos
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + offset)
    return path


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BASE])
def test_every_family_in_every_storage(name, tmp_path):
    shapes = {key: shape for key, shape in keys_of(name).items() if not key.startswith("model_type.")}
    plain = contents(sparse_file(tmp_path / f"{name}.safetensors", shapes), BF16, SYSTEMS)
    with torch.device("meta"):
        model = WanModel(plain.config, plain.extensions)
    names = {key: key for key, _ in model.named_parameters()}
    files = {"GGUF Q4_K": gguf_file(tmp_path / f"{name}.gguf", shapes)}
    for storage in STORED:
        files[storage] = stored_file(tmp_path / f"{name} {storage}.safetensors", shapes, storage)
    for storage, path in files.items():
        found = contents(path, BF16, SYSTEMS)
        assert found.config == plain.config
        assert [type(e) for e in found.extensions] == [type(e) for e in plain.extensions]
        check(model, found.checkpoint, names, what=TRANSFORMER)
        assert found.checkpoint.shapes == plain.checkpoint.shapes
        assert found.checkpoint.formats["blocks.1.self_attn.q.weight"] == storage
        # The loader takes it as it is, or says what to choose.
        plan_of("disabled", found.main, device=torch.device("cpu"), base=torch.bfloat16)


@pytest.mark.parametrize(
    ("module", "base"),
    [
        ("infinitetalk_module", "wan21_i2v_14B"),
        ("multitalk_module", "wan21_i2v_14B"),
        ("vace_module_only_1_3B", "wan21_t2v_1_3B"),
        ("vace_module_only_14B", "wan21_t2v_14B"),
        ("fantasytalking", "wan21_i2v_14B"),
        ("mtvcrafter_module", "wan21_t2v_14B"),
        ("lynx_full_module", "wan21_t2v_14B"),
        ("lynx_lite_module", "wan21_t2v_14B"),
        ("fantasyportrait", "wan21_i2v_14B"),
        ("recammaster_blocks", "wan21_t2v_1_3B"),
        ("ovi_audio_5B", "ovi_video_5B"),
        ("longvie2_extra", "wan21_i2v_14B"),
        ("flashvsr_extra", "wan21_t2v_1_3B"),
        ("onetoall_extra_14B", "wan21_t2v_14B"),
    ],
)
def test_module_joins_its_base(module, base, tmp_path):
    base, shapes = open_checkpoint(sparse_file(tmp_path / "base.safetensors", keys_of(base))), keys_of(module)
    part = with_aliases(open_checkpoint(sparse_file(tmp_path / "part.safetensors", shapes)), SYSTEMS)
    kind = SYSTEMS.kind_of(part.shapes)
    for storage in (*STORED, "GGUF Q4_K"):
        path = tmp_path / f"{storage}{'.gguf' if storage.startswith('GGUF') else '.safetensors'}"
        path = gguf_file(path, shapes) if path.suffix == ".gguf" else stored_file(path, shapes, storage)
        stored = with_aliases(open_checkpoint(path), SYSTEMS)
        assert SYSTEMS.kind_of(stored.shapes) == kind and stored.shapes == part.shapes
        assert (storage in stored.formats.values()) == any(itertools.starmap(is_large, shapes.items()))
    part = part.chosen(lambda key: not key.startswith(kind.own))
    assert len(part.shapes) >= 8
    whole = with_aliases(base, SYSTEMS).joined([part])
    with torch.device("meta"):
        model = WanModel(config_of(base, SYSTEMS), SYSTEMS.detect(whole.shapes))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == dict(whole.shapes)


@pytest.mark.parametrize(("name", "system"), REFUSED.items())
def test_systems_that_are_not_built_are_named(name, system, tmp_path):
    checkpoint = open_checkpoint(sparse_file(tmp_path / f"{name}.safetensors", keys_of(name)))
    with pytest.raises(ValueError, match=system):
        config_of(with_aliases(checkpoint, SYSTEMS), SYSTEMS)
    assert system in str(describe(checkpoint.path, SYSTEMS))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wan21_vae", "Wan VAE"),
        ("flashvsr_tcdecoder", "FlashVSR decoder"),
        ("umt5_xxl_encoder_wan", "UMT5 text encoder"),
        ("umt5_xxl_encoder_hf", "UMT5 text encoder"),
        ("clip_xlm_roberta_vit_h_14_visual", "CLIP vision encoder"),
        ("wav2vec2_base", "wav2vec2 speech encoder"),
        ("whisper_large_v3_encoder", "Whisper speech encoder"),
        ("infinitetalk_module", "MultiTalk or InfiniteTalk module"),
        ("vace_module_only_14B", "VACE module"),
        ("fantasytalking", "FantasyTalking module"),
        ("standin_lora", "Stand-In LoRA"),
        ("mtvcrafter_module", "MTVCrafter module"),
        ("lynx_full_module", "Lynx module"),
        ("lynx_lite_module", "Lynx module"),
        ("fantasyportrait", "FantasyPortrait module"),
        ("recammaster_blocks", "ReCamMaster module"),
        ("ovi_audio_5B", "Ovi audio module"),
        ("uni3c_controlnet", "Uni3C controlnet"),
        ("wan_controlnet_1_3B", "Wan ControlNet"),
        ("wan_controlnet_5B", "Wan ControlNet"),
        ("wan_controlnet_14B", "Wan ControlNet"),
    ],
)
def test_other_kinds_of_files_are_named(name, kind, tmp_path):
    path = sparse_file(tmp_path / f"{name}.safetensors", keys_of(name))
    assert kind in str(describe(path, SYSTEMS))
    with pytest.raises(ValueError, match=kind):
        config_of(open_checkpoint(path), SYSTEMS)


HF, GGML = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight", "enc.blk.{}.attn_rel_b.weight"


@pytest.mark.parametrize(("top", "bias"), [("shared.weight", HF), ("token_embd.weight", GGML)])
def test_t5_of_other_models_is_no_umt5(top, bias, tmp_path):
    """t5xxl_fp16 and the like lie in the same folder. It has relative positions in its first block alone."""
    shared = {top: (96, 64), **{bias.format(block): (32, 4) for block in range(2)}}
    umt5 = sparse_file(tmp_path / "umt5.safetensors", shared)
    t5xxl = sparse_file(tmp_path / "t5xxl.safetensors", {k: v for k, v in shared.items() if k != bias.format(1)})
    check_loadable(umt5, "WanVideo T5 Text Encoder Loader")
    with pytest.raises(ValueError, match="t5xxl.safetensors is a T5 text encoder of Flux.*choose another file here"):
        check_loadable(t5xxl, "WanVideo T5 Text Encoder Loader")


def test_files_that_cannot_be_read_get_one_sentence(tmp_path):
    cut = tmp_path / "cut.safetensors"
    whole = sparse_file(tmp_path / "whole.safetensors", {"patch_embedding.weight": (64, 16, 1, 2, 2)})
    cut.write_bytes(whole.read_bytes()[:-10])
    pickled = tmp_path / "model.pt"
    torch.save({}, pickled)
    text = tmp_path / "page.safetensors"
    text.write_text("<html>not found</html>")
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(b"GGUF\x03\x00")
    key, shape = "patch_embedding.weight", (8, 16, 1, 2, 2)
    two = sparse_file(tmp_path / "two.safetensors", {key: shape, f"model.diffusion_model.{key}": shape})
    for path, says in [(cut, "truncated"), (pickled, "pickle"), (text, "truncated or is no safetensors"),
                       (gguf, "truncated or is no GGUF"), (two, "under")]:  # fmt: skip
        with pytest.raises(ValueError, match=says) as error:
            open_checkpoint(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        open_checkpoint(tmp_path / "absent.safetensors")


def test_loaders_that_messages_name_exist():
    known = {*NODE_DISPLAY_NAME_MAPPINGS.values(), "Load CLIP Vision"}
    kinds = [LORA_KIND, TRANSFORMER_KIND, *OTHER_KINDS, *(e.file for e in SYSTEMS.extensions if e.file)]
    assert {kind.loader for kind in kinds if kind.loader} <= known
