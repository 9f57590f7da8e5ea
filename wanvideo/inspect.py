"""What a model file is, from its header alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .architecture import config_of
from .checkpoint import open_checkpoint
from .families import TRANSFORMER
from .load_plan import with_aliases
from .systems import Systems


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts of a file, in the order in which they are shown: name -> text."""

    facts: dict[str, str]

    def __str__(self) -> str:
        width = max(len(name) for name in self.facts)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.facts.items())


def describe(path: Path, systems: Systems) -> Description:
    """Kind, sizes, storage and systems of a checkpoint, and the node that loads it.

    Raises ValueError, in one sentence, for a file that cannot be read or whose kind is unknown.
    """
    checkpoint = with_aliases(open_checkpoint(path), systems)
    kind = systems.kind_of(checkpoint.shapes)
    if kind is None:
        raise ValueError(f"{path.name} is no model that this pack knows, with {len(checkpoint.shapes)} tensors.")
    facts = {"file": path.name, "kind": kind.name}
    missing = systems.missing(checkpoint.shapes) if kind.name == TRANSFORMER else {}
    if missing:
        facts["needs"] = f"{', '.join(missing)} (not available in this version)"
    elif kind.name == TRANSFORMER:
        config = config_of(checkpoint, systems)
        facts["size"] = (
            f"{config.num_layers} layers of {config.dim} channels in {config.num_heads} heads, "
            f"{config.in_dim} latent channels in, {config.out_dim} out"
        )
        names = [type(extension).__name__ for extension in systems.detect(checkpoint.shapes)]
        facts["systems"] = ", ".join(names)
        prefix = checkpoint.naming.prefix
        facts["names"] = f"{checkpoint.naming.style}, prefix '{prefix}'" if prefix else checkpoint.naming.style
    formats = Counter(checkpoint.formats.values()).most_common()
    facts["tensors"] = f"{len(checkpoint.shapes)}, {checkpoint.parameters:,} values"
    facts["stored as"] = ", ".join(f"{form} ({count})" for form, count in formats)
    facts["loaded by"] = "nothing in this version" if missing or not kind.loader else kind.loader
    return Description(facts=facts)
