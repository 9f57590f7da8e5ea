"""Every system on 2 and 4 ranks equals itself on one, in float32 on a CPU."""

import pytest
from contract import ALL_CASES
from several import Several


@pytest.fixture(scope="module", params=(2, 4), ids=("2 ranks", "4 ranks"))
def several(request):
    with Several(request.param) as processes:
        yield processes


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_system_is_the_same_on_several_ranks(several, name):
    answers = several.run("ranked", "difference", name)
    assert max(relative for relative, _ in answers) < 1e-5
    assert len({total for _, total in answers}) == 1
