"""What is wrong with a prompt, all of it, before its first node runs.

Judged is what needs no computation: nodes that are missing, links and their types, widget values, what nodes say of
their own inputs (VALIDATE_INPUTS, called as ComfyUI's server calls it), files, options that cannot run, folders.
"""

from __future__ import annotations

import inspect
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .graph import Link, Node, Prompt
from .group_nodes import closed_because, is_group
from .packs import A_FORK, pack_of
from .ui_graph import WRAPPED
from .video_file import FORMATS, too_small
from .widgets import CASTS, Input, checked, inputs_of, takes_any_name

if TYPE_CHECKING:
    from ..host import Host

log = logging.getLogger("wanvideo")

# Less room than this does not hold the shortest video and its frames.
LEAST_ROOM = 16 * 2**20


class GraphError(ValueError):
    """A workflow that cannot run. problems: one sentence each, naming node, input, value and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = _grouped(problems)
        lines = self.problems
        if len(lines) > 1:
            lines = (f"The workflow has {len(lines)} problems:", *(f"- {line}" for line in lines))
        super().__init__("\n".join(lines))


_OF_A_NODE = re.compile(r"(.*?) \((#[^)]+)\): (.*)", re.DOTALL)


def _grouped(problems: list[str]) -> tuple[str, ...]:
    """Each sentence once: what is the same of several nodes of one name, with all their ids."""
    ids: dict[tuple[str, str] | str, list[str]] = {}
    for problem in problems:
        match = _OF_A_NODE.fullmatch(problem)
        key = problem if match is None else match.group(1, 3)
        ids.setdefault(key, []).append("" if match is None else match.group(2))
    return tuple(
        key if isinstance(key, str) else f"{key[0]} ({', '.join(dict.fromkeys(numbers))}): {key[1]}"
        for key, numbers in ids.items()
    )


def check(prompt: Prompt, classes: Mapping[str, type], host: Host) -> list[Node]:
    """The nodes that the outputs need, in an order in which they can run, their values as their inputs' types.

    Raises GraphError with everything that is wrong.
    """
    for node in prompt.nodes.values():
        _drop_unused(node, classes)
    outputs = [node for node in prompt.nodes.values() if is_output(node, classes)]
    if not outputs:
        raise GraphError([*_groups(prompt.nodes.values(), prompt, classes)] or [_no_output(prompt, classes)])
    needed, problems = _in_order(prompt, outputs)
    known = [node for node in needed if node.type in classes]
    problems += _groups(needed, prompt, classes)
    problems += _unknown([node for node in needed if node.type not in classes and not is_group(node.type)])
    for node in known:
        problems += _problems_of(node, prompt, classes)
    problems += _folder_problems(known, classes, host)
    problems += [text for node in known if (text := _too_small(node, prompt))]
    if problems:
        raise GraphError(problems)
    return needed


def _drop_unused(node: Node, classes: Mapping[str, type]) -> None:
    """Take out inputs that the node will not ask for (UNUSED_INPUTS), so that nothing runs for them."""
    unused = getattr(classes.get(node.type), "UNUSED_INPUTS", None)
    for name in () if unused is None else unused(node.inputs):
        node.inputs.pop(name, None)


def is_output(node: Node, classes: Mapping[str, type]) -> bool:
    """Whether the node saves or shows something."""
    return bool(getattr(classes.get(node.type), "OUTPUT_NODE", False))


def _groups(nodes: Iterable[Node], prompt: Prompt, classes: Mapping[str, type]) -> Iterator[str]:
    """A sentence for each group node that could not be opened."""
    reasons: dict[str, str] = {}
    for node in nodes:
        if not is_group(node.type):
            continue
        if node.type not in reasons:
            reasons[node.type] = closed_because(node.type, prompt.workflow, classes)
        # The editor opens none there, whatever it holds.
        reason = "inside a subgraph" if ":" in node.id else reasons[node.type]
        yield (
            f"{node.label}: it is a group node {reason}: choose 'Convert to nodes' in its menu in ComfyUI, or put the "
            "nodes in its place, and save the workflow again."
        )


def _no_output(prompt: Prompt, classes: Mapping[str, type]) -> str:
    nodes = prompt.nodes.values()
    used = {value.node for node in nodes for value in node.inputs.values() if isinstance(value, Link)}
    # They may be what saves the result: nobody takes what they make.
    ends = [node for node in nodes if node.type not in classes and node.id not in used]
    unknown = ", ".join(f"{node.label} of {pack_of(node.type, node.pack)}" for node in ends)
    known = f" that is known here, only {unknown}" if unknown else ""
    return f"The workflow has no node that saves or shows a result{known}: add VHS_VideoCombine."


def needed(prompt: Prompt, classes: Mapping[str, type]) -> list[Node]:
    """All that the outputs need, makers before takers, whether it can run or not."""
    return _in_order(prompt, [node for node in prompt.nodes.values() if is_output(node, classes)])[0]


def _in_order(prompt: Prompt, outputs: list[Node]) -> tuple[list[Node], list[str]]:
    """All that the outputs need, makers before takers; loops and links to nowhere. Chains are long: no recursion."""
    done: dict[str, Node] = {}
    problems: list[str] = []
    entered: set[str] = set()
    for output in outputs:
        stack = [(output, _makers(output, prompt, problems))] if output.id not in done else []
        entered.update(node.id for node, _ in stack)
        while stack:
            node, makers = stack[-1]
            maker = next(makers, None)
            if maker is None:
                stack.pop()
                entered.discard(node.id)
                done[node.id] = node
            elif maker.id in entered:
                problems.append(f"The workflow has a loop through {maker.label}; cut one of its links.")
            elif maker.id not in done:
                entered.add(maker.id)
                stack.append((maker, _makers(maker, prompt, problems)))
    return list(done.values()), problems


def _makers(node: Node, prompt: Prompt, problems: list[str]) -> Iterator[Node]:
    for name, value in node.inputs.items():
        if not isinstance(value, Link):
            continue
        if value.node in prompt.nodes:
            yield prompt.nodes[value.node]
        else:
            problems.append(f"{node.label}: '{name}' is linked to node {value.node}, which is not in the workflow.")


def _unknown(nodes: list[Node]) -> Iterator[str]:
    """A sentence for each pack that nodes are missing of."""
    packs: dict[str, list[str]] = {}
    for node in nodes:
        packs.setdefault(pack_of(node.type, node.pack), []).append(f"'{node.type}' (#{node.id})")
    for pack, names in packs.items():
        many = len(names) > 1
        needs = f"The workflow needs the node{'s' * many} {', '.join(names)}"
        it = "them" if many else "it"
        if pack == A_FORK:
            yield (
                f"{needs}, which neither this pack nor the original has: the workflow is of a fork, or of before {it} "
                f"went. Bypass {it} with --bypass, or run the workflow where it was made."
            )
        else:
            yield (
                f"{needs} of {pack}, which run{'s' * (not many)} in ComfyUI only: bypass {it} with --bypass, or run "
                "the workflow there."
            )


def _problems_of(node: Node, prompt: Prompt, classes: Mapping[str, type]) -> Iterator[str]:
    cls = classes[node.type]
    validate = getattr(cls, "VALIDATE_INPUTS", None)
    spec = None if validate is None else inspect.getfullargspec(validate)
    node.inputs = {name: _unwrapped(value) for name, value in node.inputs.items()}
    sound, received = True, {}
    entries = inputs_of(cls, node.inputs)
    yield from _unplaced(node, cls, entries)
    for entry in entries:
        value = node.inputs.get(entry.name)
        judged = spec is not None and (spec.varkw is not None or entry.name in spec.args)
        try:
            if isinstance(value, Link):
                received[entry.name] = _check_link(node, entry, value, prompt, classes)
            else:
                _check_value(node, entry, limits=not judged)
        except ValueError as error:
            sound = False
            yield str(error)
    if spec is not None and sound:
        yield from _verdict(node, validate, spec, received)


def _unplaced(node: Node, cls: type, entries: list[Input]) -> Iterator[str]:
    """Links to inputs that the node does not have: ComfyUI would call it with them."""
    names = [entry.name for entry in entries]
    unplaced = [name for name, value in node.inputs.items() if isinstance(value, Link) and name not in names]
    if unplaced and not takes_any_name(cls):
        others = ", ".join(names)
        for name in unplaced:
            yield f"{node.label}: '{name}' is linked, but the node has no such input: link one of {others}."


def _unwrapped(value: object) -> object:
    """A bare list is a link; one that is meant as a value comes in this wrapping."""
    if isinstance(value, dict) and WRAPPED in value:
        inner = value[WRAPPED]
        return ListValue(inner) if isinstance(inner, list) else inner
    return value


class ListValue(list):
    """A list that is a value of a widget, not a link."""


def _check_value(node: Node, entry: Input, *, limits: bool) -> None:
    value = node.inputs.get(entry.name)
    if isinstance(value, list) and not isinstance(value, ListValue):
        raise ValueError(
            f"{node.label}: '{entry.name}' is {value!r}, which is no link; a link is [\"node id\", output number]."
        )
    if value is None and not entry.is_widget:
        if entry.required:
            raise ValueError(f"{node.label}: the input '{entry.name}' is not connected.")
        return
    if _is_socket(entry) and value is not None:
        raise ValueError(
            f"{node.label}: '{entry.name}' takes {entry.kind} from another node, not the value {value!r:.80}; link it."
        )
    if entry.name in node.inputs or entry.required:
        value = entry.default if value is None and entry.name not in node.inputs else value
        node.inputs[entry.name] = checked(entry, value, node.label, limits=limits)


def _is_socket(entry: Input) -> bool:
    """Whether only another node can make the value."""
    if isinstance(entry.kind, list):
        return False
    return not any(part == "*" or part in CASTS for part in entry.kind.split(","))


def _check_link(node: Node, entry: Input, link: Link, prompt: Prompt, classes: Mapping[str, type]) -> object:
    """The type that arrives; None where its maker is not known, which is a problem of its own."""
    maker = prompt.nodes.get(link.node)
    if maker is None or maker.type not in classes:
        return None
    made = classes[maker.type].RETURN_TYPES
    if not 0 <= link.slot < len(made):
        raise ValueError(
            f"{maker.label} has no output {link.slot}, which '{entry.name}' of {node.label} takes; the workflow was "
            "saved with another version of it."
        )
    if not _fits(made[link.slot], entry.kind):
        raise ValueError(
            f"{node.label}: '{entry.name}' takes {entry.kind}, but is linked to {made[link.slot]} of {maker.label}."
        )
    return made[link.slot]


def _fits(made: object, wanted: object) -> bool:
    """Whether an output type may go to an input type: "*" is any, "A,B" is either, and a whole number is a number."""
    if not isinstance(made, str) or not isinstance(wanted, str) or "*" in (made, wanted):
        return True
    makes, takes = set(made.split(",")), set(wanted.split(","))
    return bool(makes & takes) or ("INT" in makes and "FLOAT" in takes)


def _verdict(
    node: Node, validate: object, spec: inspect.FullArgSpec, received: Mapping[str, object]
) -> Iterator[str]:
    """What the node says of its inputs. Values that other nodes will make are left out, as ComfyUI leaves them out."""
    values = {name: value for name, value in node.inputs.items() if not isinstance(value, Link)}
    chosen = values if spec.varkw else {name: value for name, value in values.items() if name in spec.args}
    if "input_types" in spec.args:
        chosen["input_types"] = dict(received)
    parameters = inspect.signature(validate).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if any(p.default is p.empty and p.name not in chosen for p in named) or not parameters:
        return
    try:
        verdict = validate(**chosen)
    except (ValueError, OSError) as error:
        verdict = str(error)
    if verdict is not True:
        yield f"{node.label}: {verdict if isinstance(verdict, str) else 'its inputs do not fit together.'}"


# From what is written to what chose its size: the input that leads on, by node.
_SIZE_COMES_FROM = {
    "VHS_VideoCombine": "images",
    "WanVideoDecode": "samples",
    "WanVideoPassImagesFromSamples": "samples",
    "WanVideoSampler": "image_embeds",
    "WanVideoSamplerv2": "image_embeds",
}


def _too_small(node: Node, prompt: Prompt) -> str:
    """Why the encoder of this node's format cannot write frames of the size asked for, "" if it can."""
    name = node.inputs.get("format")
    form = FORMATS.get(name) if node.type == "VHS_VideoCombine" and isinstance(name, str) else None
    if form is None:
        return ""
    source: Node | None = node
    # Links may form a loop, which another check names.
    passed: set[int] = set()
    while source is not None and source.type in _SIZE_COMES_FROM and id(source) not in passed:
        passed.add(id(source))
        link = source.inputs.get(_SIZE_COMES_FROM[source.type])
        source = prompt.nodes.get(link.node) if isinstance(link, Link) else None
    sides = [] if source is None else [source.inputs.get(side) for side in ("width", "height")]
    if any(isinstance(side, int) and side < form.least_side for side in sides):
        return f"{node.label}: {too_small(form, *sides)}"
    return ""


def _folder_problems(nodes: list[Node], classes: Mapping[str, type], host: Host) -> Iterator[str]:
    """Folders that the run would write to and cannot."""
    folders: dict[Path, str] = {}
    for node in nodes:
        if getattr(classes[node.type], "WRITES", False):
            folders.setdefault(host.output_dir(), "The output folder")
        path = node.inputs.get("output_path")
        if isinstance(path, str) and path:
            try:
                folders.setdefault(host.writable_folder(path), f"{node.label}: output_path")
            except (ValueError, OSError) as error:
                yield f"{node.label}: output_path: {error}"
    for folder, what in folders.items():
        problem = unwritable(folder)
        if problem:
            yield f"{what} {folder} {problem}"


def unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder that exists or will be made; "" if it can. Nothing is left there."""
    folder = folder.absolute()
    ancestors = (folder, *folder.parents)
    try:
        existing = next(place for place in ancestors if place.exists())
        if not existing.is_dir():
            return f"cannot be a folder, because {existing} is a file: choose another folder."
        with tempfile.TemporaryFile(dir=existing):
            pass
        room = shutil.disk_usage(existing).free
    except OSError as error:
        return f"cannot be written to ({error.strerror}): choose another folder, or change its permissions."
    if room < LEAST_ROOM:
        return f"has room for only {room / 2**20:.1f} MB: free some, or choose another folder."
    return ""
