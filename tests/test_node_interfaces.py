"""Every node has the interface that saved graphs rely on: names, order, types, options, defaults, limits, outputs."""

import importlib
import json
from pathlib import Path

import pytest
import wanvideo_wrapper
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.saved_values import RENAMED

ORIGINAL = json.loads((Path(__file__).parent / "data/node_interfaces.json").read_text())
NODES = wanvideo_wrapper.NODE_CLASS_MAPPINGS
# Nodes of this pack alone, which no saved graph of the original has.
OWN = {"WanVideoDemoInputs", "WanVideoDoctor", "WanVideoMultiGPU"}
# Of the original's last commits, after the version that the table is of.
LATER = {"LongCatAvatarWhisperEmbeds"}
FOLDERS = (
    "diffusion_models", "vae", "text_encoders", "clip_vision", "loras", "wav2vec2", "vae_approx", "controlnet",
    "audio_encoders", "nlf", "mmaudio",
)  # fmt: skip
LIMITS = ("default", "min", "max", "step", "round", "multiline", "advanced")
# Inputs that come after the original's, so that saved graphs stay valid.
APPENDED = {
    "MultiTalkSilentEmbeds": {"optional": ["wav2vec_model"]},
    "WanVideoModelLoader": {"optional": ["multi_gpu_args"]},
    "WanVideoLongCatAvatarExtendEmbeds": {"optional": ["prev_images", "vae"]},
}
ATTENTION = ["sageattn_3_fp4", "sageattn_3_fp8", "sageattn_varlen", "cudnn_fp8", "sol_attn", "fa3_fp8", "auto_fp8"]
APPENDED_OPTIONS = {
    ("WanVideoModelLoader", "quantization"): ["fp4_experimental", "fp4_scaled", "fp4_scaled_fast"],
    ("WanVideoModelLoader", "attention_mode"): ATTENTION,
    ("WanVideoSetAttentionModeOverride", "attention_mode"): ATTENTION,
}
# Wider than the original's, so that saved graphs stay valid.
WIDER = {
    ("WanVideoBlockSwap", "blocks_to_swap"): {"min": -1},
    ("MultiTalkWav2VecEmbeds", "num_frames"): {"max": 1_000_000},
    ("MultiTalkSilentEmbeds", "num_frames"): {"max": 1_000_000},
}


@pytest.fixture
def files(tmp_path):
    """A host with one file of each kind; returns the widget list of a `<files:...>` type."""
    before = get_host()
    names = {}
    for kind in FOLDERS:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}.safetensors").touch()
        names[kind] = [f"{kind}.safetensors"]
    (tmp_path / "diffusion_models" / "model.gguf").touch()
    names["unet_gguf"] = ["model.gguf"]
    set_host(StandaloneHost(models=tmp_path, device="cpu"))

    def expand(kind):
        if not isinstance(kind, str) or not kind.startswith("<files:"):
            return kind
        return [name for part in kind.split("+") for name in names[part.removeprefix("<files:").removesuffix(">")]]

    yield expand
    set_host(before)


@pytest.mark.parametrize("name", [name for name in NODES if name in ORIGINAL])
def test_inputs(name, files):
    declared = NODES[name].INPUT_TYPES()
    for section in ("required", "optional", "hidden"):
        wanted = ORIGINAL[name]["inputs"].get(section, [])
        got = declared.get(section, {})
        extra = APPENDED.get(name, {}).get(section, [])
        assert list(got) == [entry[0] for entry in wanted] + extra
        for entry in wanted:
            if section == "hidden":
                assert got[entry[0]] == entry[1]
                continue
            kind, *options = got[entry[0]]
            # The two ways to write a dropdown.
            original = entry[2]["options"] if entry[1] == "COMBO" else entry[1]
            want, appended = files(original), APPENDED_OPTIONS.get((name, entry[0]))
            if isinstance(want, list):
                want = [part for item in want for part in (files(item) if str(item).startswith("<files:") else [item])]
            assert kind == (want if appended is None else want + appended), entry[0]
            given = options[0] if options else {}
            published = (entry[2] if len(entry) > 2 else {}) | WIDER.get((name, entry[0]), {})
            assert {k: v for k, v in given.items() if k in LIMITS} == {
                k: v for k, v in published.items() if k in LIMITS
            }, entry[0]


@pytest.mark.parametrize("name", [name for name in NODES if name in ORIGINAL])
def test_outputs_and_names(name):
    node, original = NODES[name], ORIGINAL[name]
    assert [list(pair) for pair in zip(node.RETURN_TYPES, node.RETURN_NAMES, strict=True)] == original["outputs"]
    assert original["function"] == node.FUNCTION and callable(getattr(node, node.FUNCTION))
    assert original["category"] == node.CATEGORY
    assert bool(getattr(node, "OUTPUT_NODE", False)) == original["output_node"]
    assert wanvideo_wrapper.NODE_DISPLAY_NAME_MAPPINGS[name] == original["display_name"]


def test_every_node_of_the_original_is_registered():
    assert len(ORIGINAL) == 146
    assert set(NODES) == set(wanvideo_wrapper.NODE_DISPLAY_NAME_MAPPINGS)
    assert set(NODES) == set(ORIGINAL) | OWN | LATER, "nodes of this pack alone: OWN above, docs/differences.md"


def test_every_difference_is_in_the_docs():
    page = (Path(__file__).parents[1] / "docs/differences.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    added = [(node, name) for node, parts in APPENDED.items() for names in parts.values() for name in names]
    added += [(node, option) for (node, _), options in APPENDED_OPTIONS.items() for option in options]
    added += [(node, name) for node, name in WIDER] + [(node, node) for node in OWN | LATER]
    assert len(added) >= 20
    for node, name in added:
        assert any(f"`{node}`" in row and f"`{name}`" in row for row in rows), f"{name} of {node} has no row"
    assert all(f"`{name}`" in page for renamed in RENAMED.values() for name in (*renamed, *renamed.values()))


@pytest.mark.parametrize("family", wanvideo_wrapper.FAMILIES)
def test_families_register(family):
    module = importlib.import_module(family, package="wanvideo_wrapper")
    assert module.NODE_CLASS_MAPPINGS
    assert all(NODES[name] is node for name, node in module.NODE_CLASS_MAPPINGS.items())
