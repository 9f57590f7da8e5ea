"""The nodes that choose LoRAs."""

import pytest
import torch
from lora_files import save
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host

SELECT, BY_NAME, BLOCKS = (
    NODE_CLASS_MAPPINGS[name]()
    for name in ("WanVideoLoraSelect", "WanVideoLoraSelectByName", "WanVideoLoraBlockEdit")
)


@pytest.fixture(autouse=True)
def loras(tmp_path):
    before = get_host()
    (tmp_path / "loras").mkdir()
    for name in ("light rank32", "light rank64", "light"):
        save(tmp_path / "loras" / f"{name}.safetensors", {"a": torch.ones(1)})
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    yield
    set_host(before)


def names(loras):
    return [lora.path.stem for lora in loras]


def test_by_name_takes_a_part_of_the_name_or_all_of_it():
    (found,) = BY_NAME.getlorapath("rank32", 0.5, merge_loras=False)
    assert names(found) == ["light rank32"] and found[0].strength == 0.5 and not found[0].merge
    (found,) = BY_NAME.getlorapath("light.safetensors", 1.0, prev_lora=found)
    assert names(found) == ["light rank32", "light"]
    # Of several the last one, as in the original pack.
    assert names(BY_NAME.getlorapath(" rank ".strip(), 1.0)[0]) == ["light rank64"]
    assert BY_NAME.getlorapath("nothing like it", 0.0)[0] == ()
    for name in ("nothing like it", "", " "):
        with pytest.raises(ValueError, match=r"No LoRA in models/loras has '.*' in its name \(3 files"):
            BY_NAME.getlorapath(name, 1.0)


def test_block_edit_reaches_the_file():
    switches = {f"blocks.{n}.": n in (3, 11) for n in range(40)}
    (blocks,) = BLOCKS.select(layer_filter="ffn, cross_attn.k,", **switches)
    (lora,) = SELECT.getlorapath("light.safetensors", 1.0, blocks=blocks)[0]
    wanted = ("blocks.3.self_attn.q", "blocks.11.cross_attn.q", "head.head")
    others = ("blocks.3.ffn.0", "blocks.1.self_attn.q", "blocks.11.cross_attn.k", "blocks.30.self_attn.q")
    assert [layer for layer in (*wanted, *others) if lora.selects(layer)] == list(wanted)
    (none,) = BLOCKS.select(**dict.fromkeys(switches, False))
    (lora,) = SELECT.getlorapath("light.safetensors", 1.0, blocks=none)[0]
    assert not lora.selects("blocks.3.self_attn.q") and lora.selects("head.head")
    (lora,) = SELECT.getlorapath("light.safetensors", 1.0)[0]
    assert lora.selects("blocks.3.self_attn.q") and lora.selects("head.head")
