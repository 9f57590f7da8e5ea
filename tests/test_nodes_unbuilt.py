"""Nodes that are not built yet: present with their interface, refused before anything runs, harmless where unused.

Their inputs and outputs are held to the original's in test_node_interfaces.py.
"""

import json
import re
from pathlib import Path

import pytest
import wanvideo_wrapper
from wanvideo_wrapper import nodes_unbuilt
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.host import get_host
from wanvideo_wrapper.nodes_unbuilt import unbuilt

ORIGINAL = json.loads((Path(__file__).parent / "data/node_interfaces.json").read_text())
CLASSES, TITLES = unbuilt({})


@pytest.mark.parametrize("name", CLASSES)
def test_refuses_before_and_while_running(name):
    node, title = CLASSES[name], TITLES[name]
    assert title == ORIGINAL[name]["display_name"]
    for flag in ("deprecated", "experimental"):
        assert getattr(node, flag.upper()) == ORIGINAL[name][flag]
    sentence = node.VALIDATE_INPUTS(input_types={"vae": "WANVAE"})
    assert sentence.startswith(f"'{title}' is not built in this version: disconnect or bypass it")
    assert sentence.endswith(".")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        getattr(node(), node.FUNCTION)(anything=1)


def test_a_node_that_a_family_registers_is_not_taken():
    (first, *rest) = CLASSES
    classes, titles = unbuilt({first: object})
    assert list(classes) == list(titles) == rest


def test_advice_names_nodes_that_are_built():
    titles = set(wanvideo_wrapper.NODE_DISPLAY_NAME_MAPPINGS.values()) - set(TITLES.values())
    core = {"Upscale Image", "ImageFromBatch", "WanTrackToVideo"}
    for node in CLASSES.values():
        named = set(re.findall(r"(?<!\w)'([^']+)'", node.interface.get("instead", "")))
        assert named <= titles | core


class Value:
    RETURN_TYPES = ("FLOAT",)
    FUNCTION = "get"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def get(self):
        return (0.5,)


class Shown:
    RETURN_TYPES = ()
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    def show(self, value):
        return {"ui": {"value": [value]}}


GONE = nodes_unbuilt._node_class(
    "Gone",
    {"display_name": "Gone Node", "category": "", "function": "go", "outputs": [["FLOAT", "value"]]},
)


def run(**nodes):
    prompt = Prompt({key: Node(key, kind, "", inputs) for key, (kind, inputs) in nodes.items()}, {})
    classes = {**STAND_INS, **CLASSES, "Value": Value, "Shown": Shown, "Gone": GONE}
    return Runner(prompt, classes, get_host()).run()


def test_no_result_depends_on_it():
    shown = run(a=("Value", {}), b=("Gone", {}), c=("Shown", {"value": Link("a", 0)}))
    assert shown == [{"value": [0.5]}]


def test_a_result_depends_on_it():
    with pytest.raises(ValueError, match="'Gone Node' is not built"):
        run(b=("Gone", {}), c=("Shown", {"value": Link("b", 0)}))
