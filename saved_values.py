"""Values of widgets as older graphs and other machines saved them: what they are here.

ComfyUI's server asks whether a value is in the list of its widget, and the node then gets the value as it was saved. So
the lists answer for every spelling that they can place, and `current_values` puts the name used here in its stead.
Numbers, texts and switches that were saved empty become their defaults (`take_defaults`), and inputs that had another
name get today's (`take_renamed_inputs`), before the server sees them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

log = logging.getLogger("wanvideo")

# Of a list in a message: hundreds of files would hide what it says.
SHOWN_CHOICES = 12
# By widget: options that older versions of the original had, and what does the same today.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "quantization": {
        "fp8_e4m3fn_fast_no_ffn": "fp8_e4m3fn_fast",
        "torchao_fp8dq": "fp8_e4m3fn_fast",
        "torchao_fp8dqrow": "fp8_e4m3fn_fast",
    },
}

MODEL_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
CASTS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
# For people.
KIND_NAMES = {"INT": "a whole number", "FLOAT": "a number", "STRING": "text", "BOOLEAN": "true or false"}
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Choices(list):
    """The options of a list widget.

    renamed: old name -> option. default: what an empty value stands for, as a widget that was added later saves it.
    """

    def __init__(
        self, options: Iterable[object], renamed: Mapping[str, str] | None = None, default: object = None
    ) -> None:
        super().__init__(options)
        self._renamed = renamed or {}
        self._default = default

    def current(self, value: object) -> object:
        """The option that a saved value stands for; None if there is none."""
        if super().__contains__(value):
            return value
        if value is None or value == "":
            return self._default
        other = self._renamed.get(value) if isinstance(value, str) else None
        return other if super().__contains__(other) else None

    def __contains__(self, value: object) -> bool:
        return self.current(value) is not None

    def refusal(self, name: str, value: object, shown: str) -> str:
        """The sentence for a value of the widget `name` that stands for no option. shown: the value for people."""
        return f"'{name}' has no choice {shown}; choices are: {self._listed() or 'there is none.'}"

    def _listed(self) -> str:
        """The options for a message; "" if there is none."""
        end = ", ..." if len(self) > SHOWN_CHOICES else "."
        return ", ".join(map(str, self[:SHOWN_CHOICES])) + end if self else ""


class ModelFiles(Choices):
    """Names of model files: '\\' and '/' are the same, and a file may have moved to another subfolder.

    folder: below the models folder, where a file that is missing belongs. place: that folder, for people.
    """

    def __init__(
        self, options: Iterable[object], default: object = None, folder: str = "", place: str = ""
    ) -> None:
        super().__init__(options, default=default)
        self.folder, self.place = folder, place

    def current(self, value: object) -> object:
        """The file's name here. None for one that is not there, or lies under its name in several other subfolders."""
        listed = super().current(value)
        if listed is not None or not isinstance(value, str):
            return listed
        moved = self._of_that_name(value)
        same = [name for name in moved if _path(name) == _path(value)]
        return next(iter(same or moved), None) if same or len(moved) == 1 else None

    def refusal(self, name: str, value: object, shown: str) -> str:
        """As for other lists; of a file that is not there, where to put it, or which of several to choose."""
        if not isinstance(value, str) or not value or not self.place:
            return super().refusal(name, value, shown)
        file, moved = _path(value), self._of_that_name(value)
        if moved:
            places = ", ".join(moved)
            return f"'{name}' is '{file}', and a file of that name lies at each of {places}: choose one of them."
        others = f", or choose one of: {self._listed()}" if self else "."
        return f"'{name}' is '{file}', which is not there: put it into {self.place}{others}"

    def _of_that_name(self, value: str) -> list[str]:
        """The files whose last part is that of a saved name."""
        return [name for name in self if isinstance(name, str) and _path(name).name == _path(value).name]


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def tolerant(declared: Mapping[str, Mapping[str, tuple[object, ...]]]) -> dict[str, dict[str, tuple[object, ...]]]:
    """INPUT_TYPES with Choices for plain lists."""
    return {section: {name: _row(name, row) for name, row in rows.items()} for section, rows in declared.items()}


def _row(name: str, row: tuple[object, ...]) -> tuple[object, ...]:
    # The rows of hidden inputs are texts.
    if not isinstance(row, tuple) or not isinstance(row[0], list) or isinstance(row[0], Choices):
        return row
    options = row[1] if len(row) > 1 else {}
    default = options.get("default", row[0][0] if row[0] else None)
    return (Choices(row[0], RENAMED.get(name), default), *row[1:])


def current_values(
    declared: Mapping[str, Mapping[str, tuple[object, ...]]], values: Mapping[str, object], node: str
) -> dict[str, object]:
    """The values with today's names of options and files; a log line for each that had another. node: for the lines."""
    rows = {name: row for section in ("required", "optional") for name, row in declared.get(section, {}).items()}
    return {name: _current(rows.get(name, (None,))[0], name, value, node) for name, value in values.items()}


def refuse_unusable(
    declared: Mapping[str, Mapping[str, tuple[object, ...]]], values: Mapping[str, object], node: str
) -> None:
    """Raise ValueError for the first number that no run can use. node: for the message.

    NaN passes ComfyUI's limits, and what another node makes is held to none; numbers above or below the widget's own
    limits may be meant, but not negative ones where it has none, nor zero where it counts from one.
    """
    for section in ("required", "optional"):
        for name, (kind, *options) in declared.get(section, {}).items():
            value = values.get(name)
            if kind not in ("INT", "FLOAT") or not isinstance(value, int | float | str):
                continue
            least = (options[0] if options else {}).get("min", -math.inf)
            finite = not isinstance(value, str | float) or (isinstance(value, float) and math.isfinite(value))
            if not finite or value < 0 <= least or value == 0 < least <= 1:
                limit = f" of at least {least}" if least >= 0 else ""
                raise ValueError(f"{node}: '{name}' must be {KIND_NAMES[kind]}{limit}, not {value!r}.")


def option_of(kind: object, value: object) -> object:
    """What a saved value is called today; the value itself where `kind` is no list widget, or has nothing like it."""
    option = kind.current(value) if isinstance(kind, Choices) else None
    return value if option is None else option


def _current(kind: object, name: str, value: object, node: str) -> object:
    return _noted(node, name, value, option_of(kind, value))


def _noted(where: str, name: str, value: object, option: object) -> object:
    """The option; says so where it was saved as another value."""
    if option is not value:
        log.info("%s: '%s' was saved as '%s'; '%s' is taken.", where, name, value, option)
    return option


def is_empty(kind: object, value: object) -> bool:
    """Whether a widget of numbers, text or a switch was saved without a value; JSON has null where one shows NaN.

    HTML is no value: nodes show pictures and tables in it, which older graphs saved where newer ones have a widget.
    """
    if kind not in CASTS or value is None:
        return kind in CASTS
    return kind != "STRING" and isinstance(value, str) and ((not value and kind != "BOOLEAN") or value.startswith("<"))


def cast(kind: str, value: object) -> object:
    """The value of a widget of numbers, text or a switch as its type.

    Raises TypeError, ValueError or OverflowError if it has nothing of that type in it.
    """
    if isinstance(value, list | dict):
        raise TypeError
    if kind == "BOOLEAN" and isinstance(value, str):
        # bool("false") is True. Other text, left there by shifted widgets of older graphs, counts as in ComfyUI.
        return BOOLEANS.get(value.lower(), bool(value))
    return CASTS[kind](value)


def note_default(where: str, name: str, default: object) -> None:
    """The log line for a widget that was saved empty. where: names the node."""
    log.info("%s: '%s' was saved empty; its default %r is taken.", where, name, default)


def take_defaults(prompt: object, classes: Mapping[str, type]) -> None:
    """Put defaults for the empty values of these nodes, in a prompt in API form, with a log line for each.

    ComfyUI's server refuses an empty number in words of Python, and makes "None" of an empty text. Whatever else is
    wrong with the prompt is left to the server.
    """
    nodes = prompt.items() if isinstance(prompt, dict) else ()
    for number, node in nodes:
        values = node.get("inputs") if isinstance(node, dict) else None
        cls = classes.get(node["class_type"]) if isinstance(values, dict) and "class_type" in node else None
        declared = {} if cls is None else cls.INPUT_TYPES()
        for name, (kind, *options) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if name in values and isinstance(kind, str) and is_empty(kind, values[name]):
                values[name] = (options[0] if options else {}).get("default", CASTS[kind]())
                note_default(f"{cls.DISPLAY_NAME} (#{number})", name, values[name])


def renamed_inputs(cls: type | None, values: Mapping[str, object], where: str) -> dict[str, object]:
    """The inputs of a node under today's names, with a log line for each that had another.

    A node class has them in RENAMED_INPUTS, old name -> new one; a value under the new name wins. where: for the lines.
    """
    names = getattr(cls, "RENAMED_INPUTS", {})
    result = {name: value for name, value in values.items() if name not in names}
    for old in names.keys() & values.keys() - {old for old, new in names.items() if new in values}:
        log.info("%s: the input '%s' is '%s' today.", where, old, names[old])
        result[names[old]] = values[old]
    return result


def take_renamed_inputs(prompt: object, classes: Mapping[str, type]) -> None:
    """Give the inputs of these nodes, in a prompt in API form, today's names: ComfyUI hands on links of any name."""
    for number, node in prompt.items() if isinstance(prompt, dict) else ():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if isinstance(kind, str) and kind in classes and isinstance(node.get("inputs"), dict):
            where = f"{classes[kind].DISPLAY_NAME} (#{number})"
            node["inputs"] = renamed_inputs(classes[kind], node["inputs"], where)


def take_moved_files(prompt: object, classes: Mapping[str, type], own: Mapping[str, type]) -> None:
    """Put today's names for model files that the lists of other packs' nodes do not know, with a log line for each.

    own: this pack's nodes, which place names themselves; prompts without any of them are left alone. A name that fits
    no file, or several, is left to the server; so are pictures and sounds, whose lists leave subfolders out.
    """
    nodes = {n: node for n, node in prompt.items() if isinstance(node, dict)} if isinstance(prompt, dict) else {}
    kinds = {number: node.get("class_type") for number, node in nodes.items()}
    if not any(kind in own for kind in kinds.values() if isinstance(kind, str)):
        return
    for number, node in nodes.items():
        kind, values = kinds[number], node.get("inputs")
        if not isinstance(kind, str) or kind in own or kind not in classes or not isinstance(values, dict):
            continue
        declared = classes[kind].INPUT_TYPES()
        for name, row in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            value = values.get(name)
            if isinstance(value, str) and value.lower().endswith(MODEL_ENDINGS):
                current = ModelFiles(_options_of(row)).current(value)
                values[name] = value if current is None else _noted(f"{kind} (#{number})", name, value, current)


def _options_of(row: tuple[object, ...]) -> Iterable[object]:
    """The choices of a list widget in either way to declare one; none of other inputs."""
    listed = row[1].get("options") if row[0] == "COMBO" and len(row) > 1 else row[0]
    return listed if isinstance(listed, list | tuple) else ()
