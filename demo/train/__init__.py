"""Trains the demo's models from nothing: `python -m wanvideo_wrapper.demo.train --out DIR`.

Data is drawn (`demo/faces.py`) and spoken by synthetic voices (`recordings/`), so a run needs nothing but a GPU.
"""

from __future__ import annotations

from pathlib import Path

RECORDINGS = Path(__file__).resolve().parent.parent / "recordings"
