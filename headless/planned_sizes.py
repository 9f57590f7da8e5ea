"""Sizes of pictures that are known before a workflow runs: what the nodes that resize them are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Node

# By node, its outputs that are a width and a height.
SIZES = {
    "ImageResizeKJ": (1, 2),
    "ImageResizeKJv2": (1, 2),
    "ImageResize+": (1, 2),
    "GetImageSizeAndCount": (1, 2),
    "GetImageSize": (0, 1),
    "GetImageSize+": (0, 1),
}
# Their pictures are as large as their widgets say at most.
RESIZERS = ("ImageResizeKJ", "ImageResizeKJv2", "ImageResize+", "ImageScale")
# Of others, the input that has the size of the output.
SAME_SIZE = {**dict.fromkeys(SIZES, "image"), "ImagePass": "image", "GetImageRangeFromBatch": "images"}


def widget_of_size(node: Node, slot: int, maker: Callable[[Node, str], Node | None]) -> tuple[Node, str] | None:
    """(node, widget) that the number at output `slot` of a node comes from; None where it is no size, or not known.

    maker: the node behind an input of another one.
    """
    slots = SIZES.get(node.type, ())
    if slot not in slots:
        return None
    source: Node | None = node
    # Links may form a loop, which `run` names.
    passed: set[str] = set()
    while source is not None and source.type not in RESIZERS:
        passed.add(source.id)
        source = maker(source, SAME_SIZE[source.type]) if source.type in SAME_SIZE else None
        source = None if source is None or source.id in passed else source
    return None if source is None else (source, ("width", "height")[slots.index(slot)])
