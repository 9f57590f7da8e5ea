"""Every node says what it does, and every input of these modules what it is for."""

import importlib

import pytest
import wanvideo_wrapper

FAMILIES = (
    ".nodes", ".nodes_attention", ".nodes_schedule", ".nodes_text", ".nodes_utility", ".cache_methods.nodes_cache",
    ".multitalk.nodes_audio", ".clip_image.nodes", ".image_to_video.nodes",
)  # fmt: skip
NODES = {
    name: node
    for family in FAMILIES
    for name, node in importlib.import_module(family, "wanvideo_wrapper").NODE_CLASS_MAPPINGS.items()
}


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip(name):
    declared = NODES[name].INPUT_TYPES()
    tips = {
        entry: (options[0] if options else {}).get("tooltip", "")
        for section in ("required", "optional")
        for entry, (_, *options) in declared.get(section, {}).items()
    }
    assert tips
    assert [entry for entry, tip in tips.items() if len(tip) < 5] == []


@pytest.mark.parametrize("name", wanvideo_wrapper.NODE_CLASS_MAPPINGS)
def test_every_node_has_a_description(name):
    description = wanvideo_wrapper.NODE_CLASS_MAPPINGS[name].DESCRIPTION
    assert len(description) > 15
