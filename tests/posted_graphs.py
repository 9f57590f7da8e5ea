"""Saved graphs as ComfyUI's editor posts them to its server."""

from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.headless.graph import Link, as_api, load
from wanvideo_wrapper.headless.widgets import checked, inputs_of
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host


def api_prompt(path, base, edits=(), bypassed=(), muted=(), nodes=None):
    """(the prompt, the graph): edited, and without nodes that no output needs.

    base: the server's folder. nodes: classes by name that the server has beside this pack's and the stand-ins.
    """
    before = get_host()
    set_host(StandaloneHost(models=base / "models", inputs=base / "input", device="cpu"))
    try:
        classes = {**STAND_INS, **NODE_CLASS_MAPPINGS, **(nodes or {})}
        prompt = load(path, classes, bypass=bypassed, mute=muted)
        for edit in edits:
            prompt.set(edit, classes)
        needed = _needed(prompt, classes)
        prompt.nodes = {key: node for key, node in prompt.nodes.items() if key in needed}
        for node in prompt.nodes.values():
            for entry in inputs_of(classes[node.type]):
                value = node.inputs.get(entry.name)
                if entry.is_widget and not isinstance(value, Link) and entry.name in node.inputs:
                    node.inputs[entry.name] = checked(entry, value, node.label)
        return as_api(prompt), prompt.workflow
    finally:
        set_host(before)


def _needed(prompt, classes):
    waiting = [n.id for n in prompt.nodes.values() if getattr(classes.get(n.type), "OUTPUT_NODE", False)]
    needed = set()
    while waiting:
        key = waiting.pop()
        if key not in needed:
            needed.add(key)
            waiting += [value.node for value in prompt.nodes[key].inputs.values() if isinstance(value, Link)]
    return needed
