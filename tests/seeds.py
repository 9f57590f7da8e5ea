"""Random inputs that are fresh in every run and the same again when TEST_SEED says so, in any order, on any worker.

Each module, fixture and test draws from a generator of its own, seeded by its name: what ran before changes nothing.
Nor does how busy the machine is: hypothesis has no deadlines here, and keeps nothing for a later run.
"""

import os
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings


def draw_from(name):
    """Seeds every generator that tests use by TEST_SEED and `name`."""
    seed = zlib.crc32(f"{os.environ['TEST_SEED']} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Workers of pytest-xdist inherit the seed; hypothesis takes it where its own option gives none."""
    os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(10**6)))
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = os.environ["TEST_SEED"]
    settings.register_profile(
        "any machine", settings.default, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("any machine")


def pytest_report_header():
    return f"random inputs: TEST_SEED={os.environ['TEST_SEED']} draws them again"


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):
        draw_from(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    draw_from(f"{request.node.nodeid} {fixturedef.argname} {request.param_index}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    draw_from(item.nodeid)
