"""Imported by the process that forks others for this one, and by no other.

A terminal or a service manager sends its signals to all processes of a run. This one must go on: how those that it
forked have ended is known from it alone.
"""

from __future__ import annotations

import signal

from .watch import STOPS

for _number in STOPS:
    signal.signal(_number, signal.SIG_IGN)
