"""Which inputs of a node class are widgets, what saved widget values belong to which, and whether a value is valid.

The rules are those of ComfyUI's front end (positional widget values) and server (types, limits, lists).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..saved_values import BOOLEANS, CASTS, KIND_NAMES, Choices, ModelFiles, cast, is_empty, note_default

CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")
SEEDS = ("seed", "noise_seed")
UPLOADS = ("image_upload", "video_upload", "audio_upload")
LONGEST_SHOWN, LONGEST_NUMBER = 200, 600


class Input(NamedTuple):
    """One input of a node class. kind: a type name or a list of choices."""

    name: str
    kind: str | list[str]
    options: Mapping[str, object]
    required: bool

    @property
    def is_widget(self) -> bool:
        """Whether the front end shows a widget for it."""
        return self.has_widget_type and not self.options.get("forceInput")

    @property
    def has_widget_type(self) -> bool:
        """Whether a widget could hold its values."""
        return isinstance(self.kind, list) or self.kind in CASTS

    @property
    def is_controlled(self) -> bool:
        """Whether the front end shows a second widget, for what becomes of the value after a run."""
        return self.name in SEEDS or bool(self.options.get("control_after_generate"))

    @property
    def is_upload(self) -> bool:
        """Whether the front end shows a button for uploads, which has a value of its own."""
        return any(self.options.get(upload) for upload in UPLOADS)

    @property
    def saved_values(self) -> int:
        """How many values are saved for the widget."""
        return 1 + self.is_controlled + self.is_upload

    @property
    def default(self) -> object:
        """The value of an untouched widget."""
        if "default" in self.options:
            return self.options["default"]
        if isinstance(self.kind, list):
            return self.kind[0] if self.kind else ""
        return CASTS[self.kind]()


def inputs_of(cls: type, values: Mapping[str, object] | None = None) -> list[Input]:
    """Required then optional inputs, in order, and those that a class adds for the values of others (EXTRA_INPUTS)."""
    declared = cls.INPUT_TYPES()
    sections = [(section, declared.get(section, {})) for section in ("required", "optional")]
    if values is not None and hasattr(cls, "EXTRA_INPUTS"):
        sections.append(("optional", cls.EXTRA_INPUTS(values)))
    entries = []
    for section, rows in sections:
        for name, (kind, *options) in rows.items():
            entries.append(Input(name, kind, options[0] if options else {}, section == "required"))
    return entries


def takes_any_name(cls: type) -> bool:
    """Whether the node is called with inputs of any name, so that a link may have one that is not declared."""
    parameters = inspect.signature(getattr(cls, cls.FUNCTION)).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def values_by_name(cls: type, saved: Sequence[object] | Mapping[str, object] | None) -> dict[str, object]:
    """Saved widget values under their inputs' names; missing ones get their defaults.

    A list goes by position; a value for the seed's control or an upload button in between is passed over.
    """
    entries = inputs_of(cls)
    if isinstance(saved, Mapping):
        return {entry.name: saved.get(entry.name, entry.default) for entry in entries if entry.is_widget}
    return {entries[place].name: value for place, value in positional_values(entries, saved)}


def positional_values(entries: Sequence[Input], saved: Sequence[object] | None) -> list[tuple[int, object]]:
    """(place of the entry, saved value) of each that has a widget, in order; missing values are the default.

    Editors before 1.16 saved a value for inputs that only lack one (forceInput) too, which is passed over.
    """
    widgets = [(place, entry) for place, entry in enumerate(entries) if entry.has_widget_type]
    if len(saved or ()) != sum(entry.saved_values for _, entry in widgets):
        widgets = [(place, entry) for place, entry in widgets if entry.is_widget]
    rest = _Saved(saved or ())
    values = [(place, entry, rest.take(entry)) for place, entry in widgets]
    return [(place, value) for place, entry, value in values if entry.is_widget]


class _Saved:
    """Positional widget values, taken one by one."""

    def __init__(self, values: Sequence[object]) -> None:
        self._values = list(values)

    def take(self, entry: Input) -> object:
        """The next value, with what belongs to the same widget removed."""
        if not self._values:
            return entry.default
        value = self._values.pop(0)
        if entry.is_controlled and self._values and self._values[0] in CONTROL_VALUES:
            self._values.pop(0)
            if isinstance(entry.kind, list) and self._values:
                # A list has a filter besides.
                self._values.pop(0)
        if entry.is_upload and self._values:
            self._values.pop(0)
        return value


def checked(entry: Input, value: object, where: str, *, limits: bool = True) -> object:
    """The value as its input's type. An empty value of an older graph is the default.

    where: names the node, for messages. limits: whether min and max count; False where the node judges the value
    itself, as in ComfyUI. Choices always count, so that other spellings of a file are found. Raises ValueError if the
    value does not fit.
    """
    if isinstance(entry.kind, list):
        return _choice(entry, value, where)
    if entry.kind not in CASTS:
        return value
    if is_empty(entry.kind, value):
        note_default(where, entry.name, entry.default)
        return entry.default
    try:
        value = cast(entry.kind, value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: '{entry.name}' must be {KIND_NAMES[entry.kind]}, not {_shown(value)}.") from None
    low, high = (entry.options.get("min"), entry.options.get("max")) if limits else (None, None)
    if entry.kind not in ("INT", "FLOAT"):
        return value
    # "Not at least" instead of "less than", so that NaN fails too.
    outside = (low is not None and not value >= low) or (high is not None and not value <= high)
    if outside or (entry.kind == "FLOAT" and not math.isfinite(value)):
        raise ValueError(f"{where}: '{entry.name}' must be {_limits(low, high)}, not {_shown(value)}.")
    return value


def _shown(value: object) -> str:
    """The value for a message, which a long text or a number of thousands of digits would drown."""
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | list | dict) else str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def from_text(entry: Input, text: str, where: str) -> object:
    """A value typed by the user as its input's type. Raises ValueError if it does not fit or the input needs a link."""
    if not isinstance(entry.kind, list) and entry.kind not in CASTS:
        raise ValueError(f"{where}: '{entry.name}' takes a link ({entry.kind}), not a value.")
    if entry.kind == "BOOLEAN" and text.lower() not in BOOLEANS:
        raise ValueError(f"{where}: '{entry.name}' must be true or false, not {_shown(text)}.")
    return checked(entry, text, where)


def _limits(low: object, high: object) -> str:
    if low is not None and high is not None:
        return f"between {low} and {high}"
    if low is None and high is None:
        return "a number"
    return f"at most {high}" if low is None else f"at least {low}"


def _choice(entry: Input, value: object, where: str) -> object:
    # Lists of other packs know no other spellings.
    choices = entry.kind if isinstance(entry.kind, Choices) else ModelFiles(entry.kind, default=entry.default)
    option = choices.current(value)
    if option is not None:
        return option
    raise ValueError(f"{where}: {choices.refusal(entry.name, value, _shown(value))}")
