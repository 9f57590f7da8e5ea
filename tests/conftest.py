"""Markers: a test that needs hardware is skipped, with the reason, where the machine lacks it.

WAN_INFERENCE_MODE=1 runs tests as ComfyUI runs nodes: whatever they make, weights too, are tensors of inference mode.
"""

import os
import signal

import pytest
import torch

pytest_plugins = ["limits", "seeds"]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
INFERENCE = os.environ.get("WAN_INFERENCE_MODE") == "1"
NEEDS = {"cuda": (0, 0), "sm89": (8, 9), "sm100": (10, 0)}


def pytest_configure(config):
    # A shell's job in the background ignores Ctrl-C, and so would what tests start and stop.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    share_cores()


def share_cores():
    """Processes of pytest-xdist share the cores: more threads than cores would make each of them slower."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max((os.cpu_count() or 1) // workers, 1)
        torch.set_num_threads(threads)
        # So do those that tests start.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, least in NEEDS.items():
            if item.get_closest_marker(mark) is None:
                continue
            if CAPABILITY is None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            elif least > CAPABILITY:
                item.add_marker(pytest.mark.skip(reason=f"needs compute capability {least[0]}.{least[1]}"))


@pytest.fixture(autouse=True)
def inference_mode(request):
    """All of a test in inference mode, where that is asked for and the test needs nothing that the mode lacks."""
    with torch.inference_mode(INFERENCE and request.node.get_closest_marker("autograd") is None):
        yield
