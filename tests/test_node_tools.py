"""What the nodes' widgets are read with."""

import inspect

import pytest
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.linked_values import OWN_SOCKETS
from wanvideo_wrapper.node_tools import whole_numbers


@pytest.mark.parametrize(("text", "numbers"), [("10", (10,)), (" 9 ,10", (9, 10)), ("", ()), ("0,0", (0, 0))])
def test_lists_of_whole_numbers(text, numbers):
    assert whole_numbers("blocks", text) == numbers


@pytest.mark.parametrize("text", ["ten", "-1", "1.5", "1;2", "1,,2", "1,", "²", "1 2"])
def test_other_lists_are_refused(text):
    with pytest.raises(ValueError, match=f"steps must be whole numbers.*not '{text}'"):
        whole_numbers("steps", text)


def own_sockets():
    """Every input of a node at a socket of this pack, but for the two that take dicts."""
    for name, node in NODE_CLASS_MAPPINGS.items():
        declared = node.INPUT_TYPES()
        for socket, (kind, *_) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if isinstance(kind, str) and OWN_SOCKETS.match(kind):
                yield pytest.param(node, socket, id=f"{name}.{socket}")


@pytest.mark.parametrize(("node", "socket"), list(own_sockets()))
def test_settings_of_other_packs_are_refused(node, socket):
    """As HunyuanVideoWrapper's block swap, whose socket has the same name."""
    with pytest.raises(ValueError, match=f"'{socket}' was made by a node of another pack .*: connect a node of this"):
        getattr(node(), node.FUNCTION)(**{socket: {"double_blocks_to_swap": 20}})


def test_nodes_of_this_pack_give_no_dicts_there():
    made = {"WANVIDEOMODEL", "BLOCKSWAPARGS", "WANCOMPILEARGS", "WANVIDIMAGE_EMBEDS", "WANVIDEOTEXTEMBEDS", "WANVAE"}
    assert all(map(OWN_SOCKETS.match, made))
    for node in NODE_CLASS_MAPPINGS.values():
        entry = inspect.unwrap(getattr(node, node.FUNCTION))
        kinds = entry.__annotations__["return"].removeprefix("tuple[").split(", ")
        gives = [kind for kind in node.RETURN_TYPES if isinstance(kind, str) and OWN_SOCKETS.match(kind)]
        assert not gives or not kinds[node.RETURN_TYPES.index(gives[0])].startswith(("dict", "Mapping", "SamplerArgs"))
