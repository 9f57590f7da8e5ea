"""The nodes that choose LoRAs."""

import pytest
import torch
from lora_files import save
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model

SELECT, BY_NAME, BLOCKS, MULTI, SET = (
    NODE_CLASS_MAPPINGS[f"WanVideo{name}"]()
    for name in ("LoraSelect", "LoraSelectByName", "LoraBlockEdit", "LoraSelectMulti", "SetLoRAs")
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


def test_multi_takes_what_is_chosen_and_has_a_strength():
    (before,) = SELECT.getlorapath("light.safetensors", 2.0)
    (blocks,) = BLOCKS.select(**{f"blocks.{n}.": n == 3 for n in range(40)})
    names_and_strengths = ("light rank64.safetensors", -0.5, "none", 1.0, "light.safetensors", 0.0,
                           "light rank32.safetensors", 0.25, "", 1.0)  # fmt: skip
    (loras,) = MULTI.getlorapath(*names_and_strengths, prev_lora=before, blocks=blocks, merge_loras=False)
    assert names(loras) == ["light", "light rank64", "light rank32"]
    assert [lora.strength for lora in loras] == [2.0, -0.5, 0.25]
    assert [lora.merge for lora in loras] == [True, False, False]
    assert [lora.selects("blocks.1.ffn.0") for lora in loras] == [True, False, False]


def foreign(tmp_path, **changes):
    """As nodes of other packs build it for the original pack."""
    given = {"path": str(tmp_path / "loras/light rank32.safetensors"), "strength": 0.5, "name": "light rank32"}
    return given | {"blocks": {}, "layer_filter": "", "low_mem_load": False, "merge_loras": False} | changes


def test_loras_of_other_packs_are_those_of_this_one(tmp_path):
    (own,) = SELECT.getlorapath("light rank32.safetensors", 0.5, merge_loras=False)[0]
    (blocks,) = BLOCKS.select(layer_filter="ffn", **{f"blocks.{n}.": n == 3 for n in range(40)})
    selected = {"blocks": blocks["selected_blocks"], "layer_filter": blocks["layer_filter"], "strength": [1.0, 0.25]}
    (some,) = SELECT.getlorapath("light rank32.safetensors", [1.0, 0.25], blocks=blocks)[0]
    foreign_some = foreign(tmp_path, merge_loras=True, **selected)
    before = [foreign(tmp_path), foreign_some, foreign(tmp_path, strength=0.0)]
    for found in (
        SELECT.getlorapath("light.safetensors", 1.0, prev_lora=before)[0],
        BY_NAME.getlorapath("light.safetensors", 1.0, prev_lora=before)[0],
        MULTI.getlorapath("light.safetensors", 1.0, *("none", 1.0) * 4, prev_lora=before)[0],
    ):
        assert found[:2] == (own, some) and names(found) == ["light rank32", "light rank32", "light"]
    for node in (SELECT, BY_NAME):
        assert node.getlorapath("light.safetensors", 0.0, prev_lora=before)[0] == (own, some)
    with pytest.raises(ValueError, match=r"LoRAs as str without a path and a strength.*WanVideo Lora Select"):
        SELECT.getlorapath("light.safetensors", 1.0, prev_lora=["light rank32"])


def test_models_take_loras_of_other_packs(tmp_path):
    tiny.transformer(in_dim=16).save(tmp_path / "diffusion_models/m.safetensors", torch.float32)
    layer, down, up = "blocks.0.self_attn.q", torch.randn(4, 128), torch.randn(128, 4)
    keys = {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    save(tmp_path / "loras/light rank32.safetensors", keys)
    load = NODE_CLASS_MAPPINGS["WanVideoModelLoader"]().loadmodel
    (plain,) = load("m.safetensors", "fp32", "offload_device", "disabled")
    (merged,) = load("m.safetensors", "fp32", "offload_device", "disabled", lora=[foreign(tmp_path, merge_loras=True)])
    change = [model.transformer.get_submodule(layer).weight for model in (merged, plain)]
    torch.testing.assert_close(change[0] - change[1], 0.5 * up @ down, rtol=1e-4, atol=1e-4)
    assert SET.setlora(plain, [foreign(tmp_path)])[0].loras[0].strength == 0.5


def test_set_loras_takes_only_what_runs_beside(tmp_path):
    tiny.transformer(in_dim=16).save(tmp_path / "m.safetensors", torch.float32)
    options = LoadOptions(base_dtype=torch.float32)
    model = load_wan_model(tmp_path / "m.safetensors", options, StandaloneHost(device="cpu"), SYSTEMS)
    assert SET.setlora(model) == (model,)
    (beside,) = SELECT.getlorapath("light.safetensors", 0.5, merge_loras=False)
    (changed,) = SET.setlora(model, beside)
    assert changed.loras == beside and changed.transformer is model.transformer and model.loras == ()
    # What was set before goes.
    assert SET.setlora(changed, ())[0].loras == ()
    with pytest.raises(ValueError, match=r"light\.safetensors has merge_loras on, which only works in WanVideoModel"):
        SET.setlora(model, SELECT.getlorapath("light.safetensors", 0.5)[0])
