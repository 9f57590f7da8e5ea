"""Keys and shapes of published files, from tests/data/checkpoints."""

import json
from pathlib import Path

FACTS = Path(__file__).parent / "data" / "checkpoints"


def keys_of(name):
    """Every key of a published file with its shape."""
    found = {}
    for key, value in json.loads((FACTS / f"{name}.json").read_text()).items():
        if key == "_meta":
            continue
        if isinstance(value, dict):
            numbers = value.get("indices", range(value["count"]))
            found |= {key.replace("{i}", str(i)): tuple(value["shape"]) for i in numbers}
        else:
            found[key] = tuple(value)
    return found
