"""Every node has the interface that saved graphs rely on: names, order, types, options, defaults, limits, outputs."""

import json
from pathlib import Path

import pytest
import wanvideo_wrapper
from wanvideo_wrapper.host import get_host, set_host
from wanvideo_wrapper.standalone_host import StandaloneHost

ORIGINAL = json.loads((Path(__file__).parent / "data/node_interfaces.json").read_text())
NODES = wanvideo_wrapper.NODE_CLASS_MAPPINGS
LIMITS = ("default", "min", "max", "step", "round", "multiline", "advanced")
# Inputs that come after the original's, so that saved graphs stay valid.
APPENDED = {"MultiTalkSilentEmbeds": {"optional": ["wav2vec_model"]}}
ATTENTION = ["sageattn_3_fp4", "sageattn_3_fp8", "sageattn_varlen", "cudnn_fp8", "sol_attn"]
APPENDED_OPTIONS = {
    ("WanVideoModelLoader", "quantization"): ["fp4_experimental", "fp4_scaled", "fp4_scaled_fast"],
    ("WanVideoModelLoader", "attention_mode"): ATTENTION,
    ("WanVideoSetAttentionModeOverride", "attention_mode"): ATTENTION,
}


@pytest.fixture
def files(tmp_path):
    """A host with one file of each kind; returns the widget list of a `<files:...>` type."""
    before = get_host()
    names = {}
    for kind in ("diffusion_models", "vae", "text_encoders", "clip_vision", "loras", "wav2vec2"):
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


@pytest.mark.parametrize("name", NODES)
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
            want, appended = files(entry[1]), APPENDED_OPTIONS.get((name, entry[0]))
            if isinstance(want, list):
                want = [part for item in want for part in (files(item) if str(item).startswith("<files:") else [item])]
            assert kind == (want if appended is None else want + appended), entry[0]
            given = options[0] if options else {}
            published = entry[2] if len(entry) > 2 else {}
            assert {k: v for k, v in given.items() if k in LIMITS} == {
                k: v for k, v in published.items() if k in LIMITS
            }, entry[0]


@pytest.mark.parametrize("name", NODES)
def test_outputs_and_names(name):
    node, original = NODES[name], ORIGINAL[name]
    assert [list(pair) for pair in zip(node.RETURN_TYPES, node.RETURN_NAMES, strict=True)] == original["outputs"]
    assert original["function"] == node.FUNCTION and callable(getattr(node, node.FUNCTION))
    assert original["category"] == node.CATEGORY
    assert bool(getattr(node, "OUTPUT_NODE", False)) == original["output_node"]
    assert wanvideo_wrapper.NODE_DISPLAY_NAME_MAPPINGS[name] == original["display_name"]


def test_all_families_register():
    assert len(NODES) == 46
    assert set(NODES) == set(wanvideo_wrapper.NODE_DISPLAY_NAME_MAPPINGS)
