"""Several prompts in one text: systems say how it is written and what goes with it."""

from types import SimpleNamespace

import pytest
import torch
from wanvideo_wrapper import nodes_text


class Encoder:
    """Embeds a prompt as its length."""

    name, managed = "encoder", SimpleNamespace(release=lambda: None)

    def encode(self, prompts, device=None):
        return [torch.full((2, 3), float(len(prompt))) for prompt in prompts]


def by(separator):
    return SimpleNamespace(
        split=lambda text: text.split(separator) if separator in text else None,
        payloads=lambda parts: (separator, len(parts)),
    )


@pytest.mark.parametrize(
    ("text", "lengths", "payloads"),
    [(" a ", [1], ()), ("aa+a", [2, 1], ("+", 2)), ("a-aa+a", [4, 1], ("+", 2)), ("a-aa", [1, 2], ("-", 2))],
)
def test_the_first_form_that_a_text_follows_splits_it(monkeypatch, text, lengths, payloads):
    monkeypatch.setattr(nodes_text, "PROMPT_FORMS", (by("+"), by("-")))
    (embeds,) = nodes_text.WanVideoTextEncode().process(text, "", Encoder())
    assert [int(part[0, 0]) for part in embeds.positive] == lengths and embeds.payloads == payloads
    assert len(embeds.negative) == 1
