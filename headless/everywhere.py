"""Links of cg-use-everywhere: what its nodes ("Anything Everywhere" and its kin) send to inputs without a link.

Which inputs they reach depends on titles, groups, colors and priorities. The editor saves what came of all that beside
the graph, in `extra.ue_links`, and that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Node = Mapping[str, object]
# Origin, its output, target, its input.
Ends = tuple[object, int, object, int]
# Where links from around a subgraph start, seen from inside: no node.
FROM_AROUND = -10


def sent_links(
    extra: object, nodes: Mapping[object, Node], links: Mapping[object, Ends], runs: Callable[[object], bool]
) -> Iterator[Ends]:
    """What is sent in one level of a workflow, of which these are the `extra`, the nodes and the links.

    runs: whether the node with an id is there, and neither muted nor bypassed. Others send nothing, and a link from
    one of them leaves its input free. Entries that no longer fit the graph are passed over.
    """
    ids = {str(key): key for key in (*nodes, FROM_AROUND)}
    for entry in (extra.get("ue_links") if isinstance(extra, Mapping) else None) or ():
        origin, target = (ids.get(str(entry[end]), entry[end]) for end in ("upstream", "downstream"))
        place = entry["downstream_slot"]
        if runs(ids.get(str(entry["controller"]))) and _is_free(nodes.get(target), place, links, runs):
            yield origin, entry["upstream_slot"], target, place


def _is_free(target: Node | None, place: int, links: Mapping[object, Ends], runs: Callable[[object], bool]) -> bool:
    inputs = () if target is None else target.get("inputs") or ()
    if place >= len(inputs):
        return False
    link = links.get(inputs[place].get("link"))
    return link is None or not runs(link[0])


def linked(node: Node, place: int, link: object) -> Node:
    """The node with a link in one of its inputs."""
    inputs = list(node["inputs"])
    inputs[place] = {**inputs[place], "link": link}
    return {**node, "inputs": inputs}
