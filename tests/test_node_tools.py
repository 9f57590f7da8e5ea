"""What the nodes' widgets are read with."""

import pytest
from wanvideo_wrapper.node_tools import whole_numbers


@pytest.mark.parametrize(("text", "numbers"), [("10", (10,)), (" 9 ,10", (9, 10)), ("", ()), ("0,0", (0, 0))])
def test_lists_of_whole_numbers(text, numbers):
    assert whole_numbers("blocks", text) == numbers


@pytest.mark.parametrize("text", ["ten", "-1", "1.5", "1;2", "1,,2", "1,", "²", "1 2"])
def test_other_lists_are_refused(text):
    with pytest.raises(ValueError, match=f"steps must be whole numbers.*not '{text}'"):
        whole_numbers("steps", text)
