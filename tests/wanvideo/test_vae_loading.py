"""Names, sizes and files of the Wan VAEs."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.modules.vae import MEAN_FIELD, STD_FIELD, build_vae, load_vae
from wanvideo_wrapper.wanvideo.modules.vae_keys import VaeLayout, file_names, read_layout, to_diffusers

KEYS = Path(__file__).resolve().parents[1] / "data" / "checkpoints"
WAN_21 = VaeLayout(
    base_dim=96,
    decoder_base_dim=96,
    z_dim=16,
    stages=(1, 2, 4, 4),
    res_blocks=2,
    temporal=(False, True, True),
    channels=3,
    nested=False,
)
LAYOUTS = {
    "wan21_vae": WAN_21,
    "wan21_lightvae_pruned75": replace(WAN_21, base_dim=24, decoder_base_dim=24),
    "wan22_vae": replace(WAN_21, base_dim=160, decoder_base_dim=256, z_dim=48, channels=12, nested=True),
}
SMALL = {
    "2.1 of one block": replace(WAN_21, base_dim=8, decoder_base_dim=8, res_blocks=1),
    "2.1 of three blocks and stages": replace(
        WAN_21, base_dim=4, decoder_base_dim=8, res_blocks=3, stages=(1, 2, 3), temporal=(True, True)
    ),
    "2.2 of one block": replace(LAYOUTS["wan22_vae"], base_dim=8, decoder_base_dim=16, res_blocks=1),
    "2.2 whose first stage widens": replace(
        LAYOUTS["wan22_vae"], base_dim=4, decoder_base_dim=4, stages=(2, 4, 8, 8), temporal=(True, False, True)
    ),
}


def published(name):
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items() if key != "_meta"}


def meta_vae(layout):
    with torch.device("meta"):
        return build_vae(layout)


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.fixture
def host():
    return StandaloneHost(device="cpu")


@pytest.fixture
def tensors():
    return tiny.vae().tensors


def save(tmp_path, tensors, **metadata):
    path = tmp_path / "vae.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_published_key_is_one_parameter(name, prefix):
    shapes = published(name)
    names = file_names(prefix + key for key in shapes)
    layout = read_layout({new: shapes[key.removeprefix(prefix)] for new, key in names.items()})
    assert layout == LAYOUTS[name]
    parameters = shapes_of(meta_vae(layout))
    assert set(names) == set(parameters)
    assert sorted(names.values()) == sorted(prefix + key for key in shapes)
    for parameter, key in names.items():
        plain = key.removeprefix(prefix)
        assert parameters[parameter] == shapes[plain]
        assert to_diffusers(plain, layout) == parameter


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *SMALL.values()], ids=[*LAYOUTS, *SMALL])
def test_sizes_from_diffusers_names(layout):
    shapes = shapes_of(meta_vae(layout))
    assert file_names(shapes) == {key: key for key in shapes}
    assert read_layout(shapes) == layout


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("upsamples.2.resample.1.bias", "up_blocks.0.upsamplers.0.resample.1.bias"),
        ("upsamples.3.residual.6.bias", "up_blocks.1.resnets.0.conv2.bias"),
        ("upsamples.7.shortcut.bias", "up_blocks.2.resnets.1.conv_shortcut.bias"),
    ],
)
def test_units_are_counted_by_the_blocks_of_a_stage(key, name):
    assert to_diffusers(f"decoder.{key}", SMALL["2.1 of one block"]) == f"decoder.{name}"


def test_a_small_vae_of_one_block_loads(tmp_path, host):
    layout = SMALL["2.1 of one block"]
    torch.manual_seed(0)
    state = build_vae(layout).state_dict()
    flat = [f"decoder.upsamples.{i}.{leaf}" for i in range(11) for leaf in leaves()]
    flat += [f"encoder.downsamples.{i}.{leaf}" for i in range(7) for leaf in leaves()]
    flat += [key for key in published("wan21_vae") if "samples." not in key]
    path = save(tmp_path, {key: state[to_diffusers(key, layout)] for key in flat if to_diffusers(key, layout) in state})
    vae = load_vae(path, dtype=torch.float32, host=host)
    assert vae.layout == layout
    assert all(torch.equal(value, state[key]) for key, value in vae.model.state_dict().items())
    assert vae.decode(vae.encode(torch.rand(3, 5, 16, 16))).shape == (3, 5, 16, 16)


def leaves():
    for part in ("residual.2", "residual.6", "shortcut", "resample.1", "time_conv"):
        yield from (f"{part}.weight", f"{part}.bias")
    yield from ("residual.0.gamma", "residual.3.gamma")


def test_all_namings_are_the_same_model(tmp_path, tensors, host):
    plain = load_vae(save(tmp_path, tensors), dtype=torch.float32, host=host)
    layout = plain.layout
    for renamed in (
        {f"model.{key}": value for key, value in tensors.items()},
        {to_diffusers(key, layout): value for key, value in tensors.items()},
        {key: value.flatten() if key.endswith("gamma") else value for key, value in tensors.items()},
    ):
        other = load_vae(save(tmp_path, renamed), dtype=torch.float32, host=host)
        assert all(torch.equal(value, plain.model.state_dict()[key]) for key, value in other.model.state_dict().items())


def test_loads_in_the_type_asked_for_without_training(tmp_path, tensors, host):
    path = save(tmp_path, {key: value.half() for key, value in tensors.items()})
    model = load_vae(path, dtype=torch.bfloat16, host=host).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_says_what_matched(tmp_path, tensors, host, caplog):
    with caplog.at_level(logging.INFO, "wanvideo"):
        load_vae(save(tmp_path, {**tensors, "loss.weight": torch.ones(2)}), dtype=torch.float32, host=host)
    assert "194 tensors matched, none missing, 1 unused" in caplog.text


def test_refuses_other_files(tmp_path, tensors, host):
    def load(tensors):
        return load_vae(save(tmp_path, tensors), dtype=torch.float32, host=host)

    with pytest.raises(ValueError, match="is no Wan VAE .*encoder.conv_in.weight"):
        load({"blocks.0.self_attn.q.weight": torch.ones(2, 2), "patch_embedding.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="is no Wan VAE"):
        load({key: value for key, value in tensors.items() if key.startswith("encoder.")})
    with pytest.raises(ValueError, match="is no Wan VAE .*time compression"):
        load({key: value for key, value in tensors.items() if "upsamples.3.time_conv" not in key})
    with pytest.raises(ValueError, match="lacks 1 of the 194 .*mid_block.attentions.0.proj.bias"):
        load({key: value for key, value in tensors.items() if key != "decoder.middle.1.proj.bias"})
    with pytest.raises(ValueError, match="encoder.head.2.bias"):
        load({**tensors, "encoder.head.2.bias": torch.ones(7)})
    with pytest.raises(FileNotFoundError):
        load_vae(tmp_path / "absent.safetensors", dtype=torch.float32, host=host)


def test_refuses_a_truncated_file(tmp_path, tensors, host):
    path = save(tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_vae(path, dtype=torch.float32, host=host)


def test_published_statistics(tmp_path, tensors, host):
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        config = AutoencoderKLWan().config
    path = save(tmp_path, tensors)
    plain = load_vae(path, dtype=torch.float32, host=host)
    zero_and_one = {MEAN_FIELD: json.dumps([0.0] * 16), STD_FIELD: json.dumps([1.0] * 16)}
    raw = load_vae(save(tmp_path, load_file(path), **zero_and_one), dtype=torch.float32, host=host)
    video = torch.rand(3, 5, 16, 16) * 2 - 1
    mean, std = (torch.tensor(values).reshape(16, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    assert torch.allclose(plain.encode(video) * std + mean, raw.encode(video), atol=1e-6)
    latents = torch.randn(16, 2, 2, 2)
    assert torch.allclose(plain.decode(latents), raw.decode(latents * std + mean), atol=1e-6)


@pytest.mark.parametrize("field", [MEAN_FIELD, STD_FIELD])
@pytest.mark.parametrize("value", [None, "[1.0, 2.0]", "3", "no json", '["a"]'])
def test_refuses_wrong_statistics(tmp_path, tensors, host, field, value):
    right = {MEAN_FIELD: json.dumps([0.0] * 16), STD_FIELD: json.dumps([1.0] * 16)}
    stated = {key: text for key, text in {**right, field: value}.items() if text is not None}
    with pytest.raises(ValueError, match=f"{field} must be a JSON list of 16 numbers"):
        load_vae(save(tmp_path, tensors, **stated), dtype=torch.float32, host=host)


def test_an_unknown_number_of_channels_needs_statistics(tmp_path, host):
    layout = replace(SMALL["2.1 of one block"], z_dim=6)
    state = build_vae(layout).state_dict()
    with pytest.raises(ValueError, match="6 latent channels"):
        load_vae(save(tmp_path, state), dtype=torch.float32, host=host)
    own = {MEAN_FIELD: json.dumps([0.5] * 6), STD_FIELD: json.dumps([2.0] * 6)}
    assert load_vae(save(tmp_path, state, **own), dtype=torch.float32, host=host).latent_channels == 6
