"""What a rank says to the process that started it."""

import logging
import sys

from wanvideo_wrapper.distributed.rank import outcome
from wanvideo_wrapper.distributed.told import Logged, ToldLog


def test_a_line_that_cannot_be_written_ends_no_run(capsys):
    told = []
    # Not of the tree of loggers: pytest's own handler raises.
    log = logging.Logger("a library")
    log.addHandler(ToldLog(told.append))
    log.warning("%d frames", "no")
    log.warning("%d frames", 3)
    assert told == [Logged("a library", logging.WARNING, "3 frames")]
    assert "Logging error" in capsys.readouterr().err


def test_work_that_ends_its_process_has_an_outcome():
    """On Ray its starter waits for one, and the actor's process goes on."""
    assert outcome(lambda: sys.exit("no licence")).failure == "SystemExit('no licence')"
