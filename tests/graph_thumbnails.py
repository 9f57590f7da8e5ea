"""Thumbnails of graphs for ComfyUI's list of templates: what the graph does in large letters above a plan of its nodes.

A screenshot of a graph cannot be read at this size.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN = 512, 36
BACKGROUND, BOX, NOTE, LINE, TEXT = "#1d2430", "#3f6ea8", "#8a6a32", "#7f8ea3", "#f2f4f7"
LETTERS, PER_LINE = 44, 20
PLAN_TOP, PLAN_BOTTOM = 262, SIDE - MARGIN


def thumbnail(graph):
    """A square RGB picture of SIDE pixels, as ComfyUI shows it uncropped."""
    saved = graph.saved()
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    title = graph.note.splitlines()[0].removeprefix("# ")
    text = "\n".join(textwrap.wrap(title, PER_LINE))
    draw.multiline_text((MARGIN, MARGIN), text, TEXT, ImageFont.load_default(LETTERS), spacing=10)
    place = _plan(saved["nodes"])
    boxes = {node["id"]: place(node) for node in saved["nodes"]}
    for _, source, _, target, *_ in saved["links"]:
        (_, top, right, _), (left, other, *_) = boxes[source], boxes[target]
        draw.line((right, top + 4, left, other + 4), LINE, 2)
    for node in saved["nodes"]:
        draw.rounded_rectangle(boxes[node["id"]], 4, NOTE if node["type"] == "MarkdownNote" else BOX)
    return picture


def _plan(nodes):
    """A function of a node: its box in the lower part of the picture, (left, top, right, bottom) in pixels."""
    width, height = (max(node["pos"][i] + node["size"][i] for node in nodes) for i in (0, 1))
    scale = min((SIDE - 2 * MARGIN) / width, (PLAN_BOTTOM - PLAN_TOP) / height)

    def place(node):
        (x, y), (w, h) = node["pos"], node["size"]
        left, top = MARGIN + x * scale, PLAN_TOP + y * scale
        return left, top, left + w * scale, top + h * scale

    return place
