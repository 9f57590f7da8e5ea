"""The example of docs/adding_a_system.md runs as it is printed, as a folder of the package."""

import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wanvideo_wrapper
from contract import build, inputs
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.request import ImageEmbeds
from wanvideo_wrapper.wanvideo.systems import Systems
from wanvideo_wrapper.wanvideo.tokens import video_tokens

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/adding_a_system.md"
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def echo():
    """The modules of the example, by file."""
    package = f"{wanvideo_wrapper.__name__}.echo"
    modules = {}
    before = dict(sys.modules)
    sys.modules[package] = types.ModuleType(package)
    for file, name in (("echo/extension.py", f"{package}.extension"), ("echo/nodes.py", f"{package}.nodes"),
                       ("tests/echo/cases.py", "echo_cases")):  # fmt: skip
        module = modules[file] = sys.modules[name] = types.ModuleType(name)
        module.__package__ = name.rpartition(".")[0]
        exec(compile(FILES[file], file, "exec"), module.__dict__)
    yield modules
    for name in set(sys.modules) - set(before):
        if name.startswith(package) or name == "echo_cases":
            del sys.modules[name]


def test_all_of_it_is_run_and_fits_the_line_length_of_the_linter(echo):
    assert set(echo) == set(FILES)
    assert all(len(line) <= 120 for text in FILES.values() for line in text.splitlines())


def test_its_key_is_found_and_owned_and_an_idle_one_changes_nothing(echo):
    case = echo["tests/echo/cases.py"].CASES["echo"]
    base, model = build(case.extension, config=case.config)
    assert set(model.state_dict()) - set(base.state_dict()) == {"echo.mark"}
    systems = Systems(extensions=(type(case.extension),))
    assert systems.detect({k: tuple(v.shape) for k, v in model.state_dict().items()}) == (case.extension,)
    assert torch.equal(base(inputs()), model(inputs()))
    with pytest.raises(ValueError, match="echo.mark"):
        base(inputs(case.payload))
    late = replace(case.payload, start=0.5)
    assert torch.equal(base(inputs(step=3)), model(inputs(late, step=3)))
    assert not torch.equal(base(inputs(step=4)), model(inputs(late, step=4)))


class AheadArgs(Payload):
    needs = "none"


class Ahead(Extension):
    """Appends three tokens in front of the echo's."""

    payload = AheadArgs

    def prepare(self, model, payload, inputs, tokens):
        return tokens.appended(tokens.x[:, -3:].clone(), tokens.rope[:3]), None


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_term_behind_a_block_is_the_mean_of_its_own_tokens(echo, ahead):
    case = echo["tests/echo/cases.py"].CASES["echo"]
    model = build(*((Ahead(),) if ahead else ()), case.extension, config=WanConfig(**case.config.__dict__))[1]
    entered, left = [], []
    model.blocks[0].register_forward_hook(lambda block, args, out: left.append(out))
    model.blocks[1].register_forward_pre_hook(lambda block, args: entered.append(args[0]))
    model.blocks[0].register_forward_pre_hook(lambda block, args: entered.append(args[0]))
    given = inputs(*((AheadArgs(),) if ahead else ()), case.payload)
    model(given)
    first, second = entered
    video = video_tokens((3, 2, 2))
    assert first.shape[1] == video + ahead + 4
    torch.testing.assert_close(first[:, video + ahead :], first[:, :4] + model.echo.mark)
    term = 0.5 * left[0][:, video + ahead :].mean(dim=1, keepdim=True)
    torch.testing.assert_close(second[:, :video], left[0][:, :video] + term)
    assert torch.equal(second[:, video:], left[0][:, video:])


def test_its_node_hands_on_what_it_took_and_leaves_it_as_it_was(echo):
    node = echo["echo/nodes.py"].NODE_CLASS_MAPPINGS["EchoEmbeds"]
    declared = node.INPUT_TYPES()["required"]
    assert all(options[0]["tooltip"] for _, *options in declared.values())
    EchoArgs = echo["echo/extension.py"].EchoArgs
    earlier = EchoArgs(torch.tensor(1.0))
    embeds = ImageEmbeds(latent_shape=(16, 3, 4, 4), num_frames=9, payloads=(earlier,))
    (out,) = node().process(embeds, 0.25, 0.1, 0.6)
    assert embeds.payloads == (earlier,) and out.payloads[0] is earlier
    mine = out.payloads[1]
    assert (float(mine.strength), mine.start, mine.end) == (0.25, 0.1, 0.6)
    assert replace(out, payloads=embeds.payloads) == embeds
    assert EchoArgs(torch.tensor(0.5)).without(frozenset({"text"})) is None
