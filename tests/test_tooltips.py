"""Every node says what it does, and every input what it is for."""

import pytest
import wanvideo_wrapper

NODES = wanvideo_wrapper.NODE_CLASS_MAPPINGS


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip(name):
    declared = NODES[name].INPUT_TYPES()
    tips = {
        entry: (options[0] if options else {}).get("tooltip", "")
        for section in ("required", "optional")
        for entry, (_, *options) in declared.get(section, {}).items()
    }
    assert [entry for entry, tip in tips.items() if len(tip) < 5] == []


def test_a_tooltip_of_a_node_comes_before_a_shared_one():
    tip = NODES["WanVideoDecode"].INPUT_TYPES()["required"]["vae"][1]["tooltip"]
    assert tip == "The VAE of the model that sampled"
    assert "Model Loader" in NODES["WanVideoSampler"].INPUT_TYPES()["required"]["model"][1]["tooltip"]


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_description(name):
    description = NODES[name].DESCRIPTION
    assert len(description) > 15
