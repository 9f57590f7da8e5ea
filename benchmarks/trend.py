"""Fails where a forward has become more than 5 % slower: python benchmarks/trend.py BEST.json NOW.json

NOW is what `wanvideo bench step --json` wrote, and BEST the best of earlier runs on this card; it is made where it is
not there, and replaced by a faster run only, so that small losses add up until they are seen. What is compared is the
time of this project over that of the same products and attention by themselves, in the same run: the clock of a card
changes by more than the limit from night to night.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

OWN, FLOOR, TIME = "this project", "sum of the best primitives", "ms a block"
LIMIT = 1.05


def ratio(path: Path) -> float:
    """Time of a block over the time of what it cannot do without. Raises ValueError for another file."""
    try:
        rows = {row["name"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
        return rows[OWN][TIME] / rows[FLOOR][TIME]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by 'wanvideo bench step --json': make it anew.") from error


def same_case(best: Path, now: Path) -> bool:
    """Whether the two were measured on the same card with the same options; the last of these is the file's name."""
    cards = [json.loads(path.read_text("utf-8")) for path in (best, now)]
    return len({(card["device"], card["command"].partition(" --json")[0]) for card in cards}) == 1


def main(arguments: Sequence[str]) -> int:
    """Compares, and keeps the better one as BEST; 1 where NOW is too slow."""
    best, now = map(Path, arguments)
    current = ratio(now)
    if not best.is_file() or not same_case(best, now):
        sys.stdout.write(f"{current:.3f} times the floor; nothing to compare it with yet.\n")
        return _keep(now, best)
    earlier = ratio(best)
    sys.stdout.write(f"{current:.3f} times the floor, {earlier:.3f} before: {current / earlier - 1:+.1%}\n")
    if current > LIMIT * earlier:
        return 1
    return _keep(now, best) if current < earlier else 0


def _keep(now: Path, best: Path) -> int:
    best.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(now, best)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
