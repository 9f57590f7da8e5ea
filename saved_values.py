"""Values of list widgets as older graphs and other machines saved them: what they are called here.

ComfyUI's server asks whether a value is in the list of its widget, and the node then gets the value as it was saved. So
the lists answer for every spelling that they can place, and `current_values` puts the name used here in its stead.
"""

from __future__ import annotations

import logging
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

    def reason(self, value: object) -> str:
        """Why a value is none of the options; "" where there is nothing more to say."""
        return ""

    def refusal(self, name: str, value: object, shown: str) -> str:
        """The sentence for a value of the widget `name` that stands for no option. shown: the value for people."""
        listed = ", ".join(map(str, self[:SHOWN_CHOICES])) or "there is none"
        end = ", ..." if len(self) > SHOWN_CHOICES else "."
        return f"'{name}' has no choice {shown}{self.reason(value)}; choices are: {listed}{end}"


class ModelFiles(Choices):
    """Names of model files: '\\' and '/' are the same, and a file may have moved to another subfolder.

    folder: below the models folder, where a file that is missing belongs.
    """

    def __init__(self, options: Iterable[object], default: object = None, folder: str = "") -> None:
        super().__init__(options, default=default)
        self.folder = folder

    def current(self, value: object) -> object:
        """The file's name here. None for one that is not there, or lies under its name in several other subfolders."""
        listed = super().current(value)
        if listed is not None or not isinstance(value, str):
            return listed
        moved = self._of_that_name(value)
        same = [name for name in moved if _path(name) == _path(value)]
        return next(iter(same or moved), None) if same or len(moved) == 1 else None

    def reason(self, value: object) -> str:
        """Where to put a file that is not there, or which of several to choose."""
        moved = self._of_that_name(value) if isinstance(value, str) else []
        if moved:
            return f", and a file of that name lies at each of: {', '.join(moved)}; choose the one that is meant"
        where = f"models/{self.folder}" if self.folder else ""
        return f", which is not in {where}: put the file there (in ComfyUI, press R then)" if where else ""

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


def option_of(kind: object, value: object) -> object:
    """What a saved value is called today; the value itself where `kind` is no list widget, or has nothing like it."""
    option = kind.current(value) if isinstance(kind, Choices) else None
    return value if option is None else option


def _current(kind: object, name: str, value: object, node: str) -> object:
    option = option_of(kind, value)
    if option is value:
        return value
    log.info("%s: '%s' was saved as '%s'; '%s' is taken.", node, name, value, option)
    return option
