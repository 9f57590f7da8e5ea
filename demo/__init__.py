"""The demo: tiny models in the real file formats, a drawn portrait, a spoken sentence, and their workflow.

`python -m wanvideo_wrapper.demo.train --out DIR` makes the models anew; MODEL_CARD.md says what they can do.
"""

from __future__ import annotations

from pathlib import Path

from ..host.protocol import DEMO_MODELS

ROOT = Path(__file__).resolve().parent
MODELS = DEMO_MODELS
INPUT = ROOT / "input"
WORKFLOW = ROOT.parent / "example_workflows" / "demo_infinitetalk.json"
