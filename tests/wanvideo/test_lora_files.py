"""What a LoRA file changes: every naming and kind against float64, and what becomes of every key."""

import json
import logging

import lora_files
import pytest
import torch
from lora_files import KINDS, NAMINGS, PAIRS, peft_header, randn, save, spelled
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.lora import LoraFile, open_lora, read_lora
from wanvideo_wrapper.wanvideo.lora.reading import ABSENT, CLAIMED, MISFIT, NOT_SELECTED, TEXT, UNKNOWN, USED
from wanvideo_wrapper.wanvideo.modules.model import WanModel

LAYERS = ("blocks.0.self_attn.q", "blocks.1.self_attn.o", "blocks.2.cross_attn.k", "blocks.1.ffn.0", "blocks.0.ffn.2",
          "time_projection.1", "text_embedding.0", "head.head")  # fmt: skip
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=3, in_dim=16, text_dim=tiny.TEXT_DIM)
    built = WanModel(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.requires_grad_(False)


def close(got, want):
    assert want.norm() > 0
    return ((got.double() - want).norm() / want.norm()).item() < 2e-6


def changed(lora, model, layer):
    """The change of a layer's weight that `lora` makes at strength 1."""
    weight = model.get_submodule(layer).weight
    return sum(change.weight(weight.shape, lambda: weight) for change in lora.changes[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_naming(model, kind, tmp_path):
    cases = list(zip(NAMINGS, (LAYERS * 2)[: len(NAMINGS)], [8] * len(NAMINGS), strict=True))
    for naming, layer, rank in (*cases, *((name, Q, r) for name in ("kijai", "musubi") for r in (4, 32, 128))):
        parts, want = KINDS[kind](model.get_submodule(layer).weight, rank)
        tensors = spelled(naming, layer, parts)
        # Without any alpha, PEFT's own files have a factor of their own (below).
        path = save(tmp_path / "l.safetensors", tensors, peft_header(rank, rank) if "peft" in naming else None)
        lora = read_lora(LoraFile(path=path), model)
        assert list(lora.changes) == [layer], naming
        assert {fate.kind for fate in lora.fates.values()} == {USED} and set(lora.fates) == set(tensors)
        assert close(changed(lora, model, layer), want), naming


@pytest.mark.parametrize("spelling", PAIRS)
def test_every_spelling_of_a_pair(model, spelling, tmp_path):
    (down, up), (down_key, up_key) = (randn(4, 128), randn(128, 4)), PAIRS[spelling]
    for naming, layer in (("kijai", Q), ("musubi", Q), ("diffusers", Q)):
        tensors = spelled(naming, layer, {down_key: down, up_key: up, ".alpha": torch.tensor(2.0)})
        lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
        # Stand-In's alpha would be one of a plain pair.
        factor = 1.0 if spelling == "stand-in" else 0.5
        assert close(changed(lora, model, Q), factor * up.double() @ down.double())
        left = {key for key, fate in lora.fates.items() if fate.kind != USED}
        assert left == ({key for key in tensors if key.endswith("alpha")} if spelling == "stand-in" else set())


def test_stand_in_beside_a_plain_pair_and_a_core_are_both_used(model, tmp_path, caplog):
    plain, want = lora_files.mid(model.get_submodule(Q).weight, 4)
    down, up = randn(4, 128), randn(128, 4)
    tensors = spelled("kijai", Q, plain | {"_loras.down.weight": down, "_loras.up.weight": up})
    with caplog.at_level(logging.INFO, logger="wanvideo"):
        lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert {fate.kind for fate in lora.fates.values()} == {USED}
    assert close(changed(lora, model, Q), want + up.double() @ down.double())
    assert "Stand-In's pairs" in caplog.text
    # The system that they belong to takes them, and leaves the plain pair.
    lora = read_lora(LoraFile(path=tmp_path / "l.safetensors", claimed=("*_loras",)), model)
    assert {key for key, fate in lora.fates.items() if fate.kind == CLAIMED} == {k for k in tensors if "_loras" in k}
    assert close(changed(lora, model, Q), want)


def test_small_parameters_and_biases(model, tmp_path):
    values = {
        "norm3.diff": randn(128), "norm3.diff_b": randn(128), "self_attn.norm_q.w_norm": randn(128),
        "diff_m": randn(1, 6, 128), "self_attn.q.diff_b": randn(128), "ffn.0.b_norm": randn(256),
    }  # fmt: skip
    tensors = {f"diffusion_model.blocks.1.{key}": value for key, value in values.items()}
    tensors["transformer.scale_shift_table.diff"] = randn(1, 2, 128)
    tensors["lora_unet_patch_embedding.lora_down.weight"] = down = randn(4, 16, 1, 2, 2)
    tensors["lora_unet_patch_embedding.lora_up.weight"] = up = randn(128, 4, 1, 1, 1)
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert {fate.kind for fate in lora.fates.values()} == {USED}
    got = {name: changes[0] for name, changes in lora.changes.items()}
    block = "blocks.1."
    for name, key in ((f"{block}norm3", "norm3.diff"), (f"{block}self_attn.norm_q", "self_attn.norm_q.w_norm"),
                      (f"{block}modulation", "diff_m")):  # fmt: skip
        assert torch.equal(got[name].delta(values[key].shape), values[key])
    for name, key in (("norm3", "norm3.diff_b"), ("self_attn.q", "self_attn.q.diff_b"), ("ffn.0", "ffn.0.b_norm")):
        assert torch.equal(got[block + name].bias, values[key])
    assert torch.equal(got["head.modulation"].delta((1, 2, 128)), tensors["transformer.scale_shift_table.diff"])
    want = (up.flatten(1).double() @ down.flatten(1).double()).reshape(128, 16, 1, 2, 2)
    assert close(got["patch_embedding"].delta(want.shape), want)


def test_bias_of_a_peft_pair_takes_the_factor(model, tmp_path):
    tensors = spelled("kijai", Q, {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4),
                                   ".lora_B.bias": randn(128), ".alpha": torch.tensor(8.0)})  # fmt: skip
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert torch.equal(lora.changes[Q][0].bias, 2 * tensors[f"diffusion_model.{Q}.lora_B.bias"])


def factor_of(lora, tensors):
    down, up = (next(v.double() for k, v in tensors.items() if name in k) for name in ("lora_A", "lora_B"))
    got, unit = lora.changes[Q][0].delta((128, 128)).double(), up @ down
    return ((got * unit).sum() / unit.square().sum()).item()


@pytest.mark.parametrize(
    ("header", "factor"),
    [
        (peft_header(64, 16), 4.0),
        (peft_header(64, 16, use_rslora=True), 16.0),
        (peft_header(64, 16, alpha_pattern={"self_attn.q": 8}), 0.5),
        (peft_header(64, 16, alpha_pattern={"attn.q": 8}), 4.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 16, "transformer.lora_alpha": 32})}, 2.0),
        ({"lora_adapter_metadata": json.dumps({"text_encoder.r": 16, "text_encoder.lora_alpha": 32})}, 1.0),
        (None, 1.0),
    ],
)
def test_alpha_of_the_header(model, header, factor, tmp_path):
    tensors = spelled("kijai", Q, {".lora_A.weight": randn(16, 128), ".lora_B.weight": randn(128, 16)})
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors, header)), model)
    assert factor_of(lora, tensors) == pytest.approx(factor, rel=1e-5)
    tensors |= {f"diffusion_model.{Q}.alpha": torch.tensor(24.0)}
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors, header)), model)
    assert factor_of(lora, tensors) == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize(("rank", "factor"), [(4, 2.0), (8, 2.75), (32, 5.65625), (64, 8.0), (128, 11.3125)])
def test_rank_stabilized_files_of_peft(model, rank, factor, tmp_path):
    tensors = spelled("peft", Q, {".lora_A.weight": randn(rank, 128), ".lora_B.weight": randn(128, rank)})
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert factor_of(lora, tensors) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(
    ("naming", "name", "rank", "others", "factor"),
    [
        ("peft", "adapter_model.safetensors", 16, False, 2.0),
        ("peft", "renamed.safetensors", 16, True, 2.0),
        ("kijai", "adapter_model.safetensors", 16, True, 2.0),
        ("kijai", "only.safetensors", 16, False, 2.0),
        ("kijai", "one of many.safetensors", 16, True, 1.0),
        ("kijai", "adapter_model.safetensors", 8, False, 1.0),
    ],
)
def test_alpha_of_a_neighbouring_configuration(model, naming, name, rank, others, factor, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32, "alpha_pattern": {}}))
    if others:
        (tmp_path / "other.safetensors").touch()
    tensors = spelled(naming, Q, {".lora_A.weight": randn(rank, 128), ".lora_B.weight": randn(128, rank)})
    lora = read_lora(LoraFile(path=save(tmp_path / name, tensors)), model)
    assert factor_of(lora, tensors) == pytest.approx(factor, rel=1e-5)


def test_a_damaged_configuration_is_named(model, tmp_path):
    tensors = spelled("kijai", Q, {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4)})
    for text in ("{", "[1]", "[" * 100_000):
        path = save(tmp_path / "adapter_model.safetensors", tensors, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="alpha is unknown"):
            read_lora(LoraFile(path=path), model)


def good():
    """A change that fits."""
    return spelled("kijai", Q, {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4)})


K = "diffusion_model.blocks.1.self_attn.k"
ODD = {
    "another width": ({".lora_A.weight": randn(4, 64), ".lora_B.weight": randn(64, 4)}, MISFIT, "made for 64 x 64"),
    "half": ({".lora_A.weight": randn(4, 128)}, MISFIT, "half of its pair is missing"),
    "ranks": ({".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 8)}, MISFIT, "ranks 4 and 8"),
    "lone alpha": ({".alpha": torch.tensor(4.0)}, MISFIT, "no change belongs to it"),
    "lone dora": ({".dora_scale": randn(128, 1)}, MISFIT, "no change belongs to it"),
    "not finite": (
        {".lora_A.weight": torch.full((4, 128), float("nan")), ".lora_B.weight": randn(128, 4)}, MISFIT, "finite",
    ),
    "whole numbers": (
        {".lora_A.weight": torch.ones(4, 128, dtype=torch.int8), ".lora_B.weight": randn(128, 4)}, MISFIT, "I8",
    ),
    "dora of another width": (
        {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4), ".dora_scale": randn(64, 1)}, MISFIT,
        "64 lengths",
    ),
    "core of another rank": (
        {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4), ".lora_mid.weight": randn(8, 8)}, MISFIT,
        "lora_mid",
    ),
    "no dimensions": ({".lora_A.weight": torch.tensor(1.0), ".lora_B.weight": randn(128, 4)}, MISFIT, "shape ()"),
    "empty": ({".lora_A.weight": torch.empty(0, 128), ".lora_B.weight": torch.empty(128, 0)}, MISFIT, "shape"),
    "transposed difference": ({".diff": randn(128, 64)}, MISFIT, "made for 128 x 64"),
    "LoHa of two sizes": (
        {".hada_w1_a": randn(128, 2), ".hada_w1_b": randn(2, 128), ".hada_w2_a": randn(128, 2), ".hada_w2_b":
         randn(2, 64)}, MISFIT, "differ in size",
    ),
    "LoKr without its second": ({".lokr_w1": randn(8, 8)}, MISFIT, "neither the whole nor both"),
    "unknown kind": ({".oft_blocks": randn(4, 8, 8)}, UNKNOWN, ""),
    "an alpha of two values": (
        {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4), ".alpha": randn(2)}, MISFIT, "2 values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_parts_that_do_not_fit_are_left_out_and_named(model, case, tmp_path, caplog):
    parts, kind, reason = ODD[case]
    odd = {K + suffix: value for suffix, value in parts.items()}
    path = save(tmp_path / "l.safetensors", good() | odd)
    with caplog.at_level(logging.DEBUG, logger="wanvideo"):
        lora = read_lora(LoraFile(path=path), model)
    assert list(lora.changes) == [Q] and set(lora.fates) == set(good() | odd)
    assert {lora.fates[key].kind for key in odd} == {kind}
    assert any(reason in lora.fates[key].reason for key in odd)
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1 and f"left out {len(odd)} keys {kind}" in lines[0].getMessage()
    assert all(key in caplog.text for key in odd)


def test_layers_of_another_model_a_text_encoder_and_another_system(model, tmp_path, caplog):
    pair = {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4)}
    control = {"diffusion_model.patch_embedding.lora_A.weight": randn(4, 32, 1, 2, 2),
               "diffusion_model.patch_embedding.lora_B.weight": randn(128, 4, 1, 1, 1)}  # fmt: skip
    absent = spelled("kijai", "blocks.7.self_attn.q", pair)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1" + suffix: value for suffix, value in pair.items()}
    path = save(tmp_path / "l.safetensors", good() | control | absent | text | {"dwpose_embedding.0.weight": randn(2)})
    with caplog.at_level(logging.INFO, logger="wanvideo"):
        lora = read_lora(LoraFile(path=path), model)
    for keys, kind in ((control, MISFIT), (absent, ABSENT), (text, TEXT), (["dwpose_embedding.0.weight"], UNKNOWN)):
        assert {lora.fates[key].kind for key in keys} == {kind}
        assert f"keys {kind} (first '{next(iter(keys))}'" in caplog.text
    assert [left.layer for left in lora.left_out if left.keys == tuple(control)] == ["patch_embedding"]

    # Another system claims them, and takes the tensors.
    file = LoraFile(path=path, claimed=("patch_embedding", "dwpose_embedding.*"))
    lora = read_lora(file, model)
    assert {lora.fates[key].kind for key in (*control, "dwpose_embedding.0.weight")} == {CLAIMED}
    assert not any(left.layer == "patch_embedding" for left in lora.left_out)
    source = open_lora(path)
    parts = source.parts("diffusion_model.patch_embedding")
    assert torch.equal(parts["down"], control["diffusion_model.patch_embedding.lora_A.weight"])
    assert source.strays == ("dwpose_embedding.0.weight",)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({"blocks.0.self_attn.q.weight": randn(4, 4), "patch_embedding.weight": randn(4)}, "a Wan transformer"),
        ({"double_blocks.0.img_attn.qkv.lora_A.weight": randn(4, 64)}, "first 'double_blocks.0.img_attn.qkv'"),
        ({f"{K}.lora_A.weight": randn(4, 64), f"{K}.lora_B.weight": randn(64, 4)},
         "another size of model: its change of 'blocks.1.self_attn.k' is left out, as it is made for 64 x 64"),
        ({f"{K}.lora_A.weight": randn(4, 128)},
         "it may be damaged: its change of 'blocks.1.self_attn.k' is left out, as half of its pair is missing"),
    ],
)  # fmt: skip
def test_a_file_of_which_nothing_fits_is_refused_by_what_it_holds(model, tensors, words, tmp_path):
    with pytest.raises(ValueError, match=r"l\.safetensors") as error:
        read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert words in str(error.value)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(model, length, tmp_path):
    path = save(tmp_path / "l.safetensors", good(), {"fill": ""})
    missing = length - int.from_bytes(path.read_bytes()[:8], "little")
    save(path, good(), {"fill": "x" * missing})
    assert path.read_bytes()[0] == 0x80 and path.read_bytes()[1] in (2, 3, 4, 5)
    assert list(read_lora(LoraFile(path=path), model).changes) == [Q]


def test_a_file_of_which_nearly_nothing_fits_is_refused(model, tmp_path):
    others = {f"double_blocks.{i}.lora_{half}.weight": randn(4, 4) for i in range(20) for half in "AB"}
    with pytest.raises(ValueError, match="fits only 1 layers of this model: it holds changes of 21 layers"):
        read_lora(LoraFile(path=save(tmp_path / "l.safetensors", good() | others)), model)
    fewer = dict(list(others.items())[:36])
    assert list(read_lora(LoraFile(path=save(tmp_path / "l.safetensors", good() | fewer)), model).changes) == [Q]


def test_blocks_and_layers_that_the_nodes_leave(model, tmp_path):
    pair = {".lora_A.weight": randn(4, 128), ".lora_B.weight": randn(128, 4)}
    inside = {n: spelled("musubi", f"blocks.{n}.self_attn.q", pair) for n in range(3)}
    outside = spelled("kijai", "time_embedding.2", pair)
    path = save(tmp_path / "l.safetensors", inside[0] | inside[1] | inside[2] | outside)

    def layers(**options):
        lora = read_lora(LoraFile(path=path, **options), model)
        assert set(lora.fates) == {*inside[0], *inside[1], *inside[2], *outside}
        assert {fate.kind for fate in lora.fates.values()} <= {USED, NOT_SELECTED}
        return set(lora.changes)

    assert layers() == {f"blocks.{n}.self_attn.q" for n in range(3)} | {"time_embedding.2"}
    assert layers(blocks=("blocks.1.",)) == {"blocks.1.self_attn.q", "time_embedding.2"}
    assert layers(blocks=()) == {"time_embedding.2"}
    assert layers(skip_layers=("self_attn",)) == {"time_embedding.2"}
    with pytest.raises(ValueError, match="block selection leaves"):
        layers(blocks=(), skip_layers=("time_embedding",))


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.linspace(0.5, 2, 128)])
def test_fp8_pairs_with_a_scale(model, scale, tmp_path):
    down, up = randn(4, 128), randn(128, 4).to(torch.float8_e4m3fn)
    tensors = spelled("kijai", Q, {".lora_A.weight": down, ".lora_B.weight": up, ".lora_B.scale_weight": scale})
    lora = read_lora(LoraFile(path=save(tmp_path / "l.safetensors", tensors)), model)
    assert {fate.kind for fate in lora.fates.values()} == {USED} and set(lora.fates) == set(tensors)
    want = (up.double() * scale.double().reshape(-1, 1)) @ down.double()
    assert close(lora.changes[Q][0].delta((128, 128)), want)
