"""Tiny VAEs: streamed layers against the whole video at once, published names and sizes, files and refusals."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.modules.tiny_vae import (
    TinyAutoencoder,
    TinyLayout,
    load_tiny_vae,
    read_tiny_layout,
)
from wanvideo_wrapper.wanvideo.modules.vae import MEAN_21, STD_21, Tile

SMALL = TinyLayout(16, 1, 4, (8, 6, 4, 4), (2, 2, 1), (1, 2, 2))
SMALL_22 = TinyLayout(48, 2, 4, (8, 4, 4, 4), (2, 2, 1), (1, 2, 2))


def weights(layout, seed=0):
    torch.manual_seed(seed)
    values = TinyAutoencoder(layout).state_dict()
    return {name: value + 0.05 * torch.randn_like(value) for name, value in values.items()}


def load(folder, layout=SMALL, name="taew2_1.safetensors", dtype=torch.float32):
    save_file(weights(layout), folder / name)
    return load_tiny_vae(folder / name, dtype=dtype, host=StandaloneHost(device="cpu"))


def at_once(values, prefix, frames):
    """The published layers on all frames [T, C, H, W] at once, from the tensors' names alone, in float64."""
    names = sorted({int(key.split(".")[1]) for key in values if key.startswith(prefix)})
    grown = {7, 13, 19} if prefix == "decoder" else set()
    pooled = {2, 7, 12} if prefix == "encoder" else set()
    if prefix == "decoder":
        frames = torch.tanh(frames / 3) * 3
    for index in names:
        get = lambda leaf, index=index: values[f"{prefix}.{index}.{leaf}"].double()  # noqa: E731
        if f"{prefix}.{index}.conv.0.weight" in values:
            before = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            x = torch.cat((frames, before), dim=1)
            for leaf in (0, 2, 4):
                x = F.conv2d(x, get(f"conv.{leaf}.weight"), get(f"conv.{leaf}.bias"), padding=1)
                x = F.relu(x) if leaf < 4 else x
            frames = F.relu(x + frames)
        elif index in pooled:
            kernel = get("conv.weight")
            stride = kernel.shape[1] // frames.shape[1]
            frames = F.conv2d(torch.cat([frames[start::stride] for start in range(stride)], dim=1), kernel)
        elif index in grown:
            frames = F.interpolate(frames, scale_factor=2, mode="nearest")
            parts = F.conv2d(frames, get("conv.weight")).chunk(get("conv.weight").shape[0] // frames.shape[1], dim=1)
            frames = torch.stack(parts, dim=1).flatten(0, 1)
        else:
            bias = get("bias") if f"{prefix}.{index}.bias" in values else None
            halves = prefix == "encoder" and bias is None
            last = index == max(names)
            frames = F.relu(frames) if last and prefix == "decoder" else frames
            frames = F.conv2d(frames, get("weight"), bias, stride=2 if halves else 1, padding=1)
            frames = F.relu(frames) if index == (0 if prefix == "encoder" else 1) else frames
    return frames


@pytest.mark.parametrize("layout", [SMALL, SMALL_22])
@pytest.mark.parametrize("length", [1, 3])
def test_decoding_equals_the_layers_on_the_whole_video(layout, length, tmp_path):
    vae = load(tmp_path, layout)
    latents = torch.randn(layout.z_dim, length, 4, 6)
    whole = at_once(weights(layout), "decoder", latents.double().movedim(1, 0))
    want = F.pixel_shuffle(whole, layout.patch)[3:].mul(2).sub(1).movedim(0, 1)
    side = vae.spatial_factor
    assert side == 8 * layout.patch and want.shape == (3, 4 * length - 3, 4 * side, 6 * side)
    got = vae.decode(latents)
    assert want.std() > 0.01
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    chunks = list(vae.decode_chunks(latents))
    assert [chunk.shape[1] for chunk in chunks] == [1] + [4] * (length - 1)
    assert torch.equal(torch.cat(chunks, dim=1), got)


@pytest.mark.parametrize("layout", [SMALL, SMALL_22])
@pytest.mark.parametrize("length", [1, 9])
def test_encoding_equals_the_layers_on_the_whole_video(layout, length, tmp_path):
    vae = load(tmp_path, layout)
    video = torch.rand(3, length, 32, 64) * 2 - 1
    # The published encoder repeats the last frame up to whole groups of four.
    filled = torch.cat((video, video[:, -1:].expand(-1, 3, -1, -1)), dim=1).double()
    folded = F.pixel_unshuffle((filled.movedim(1, 0) + 1) / 2, layout.patch)
    want = at_once(weights(layout), "encoder", folded).movedim(0, 1)
    got = vae.encode(video)
    assert got.shape == (layout.z_dim, (length - 1) // 4 + 1, 32 // vae.spatial_factor, 64 // vae.spatial_factor)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_light_files_work_on_raw_latents(tmp_path):
    plain, light = load(tmp_path), load(tmp_path, name="lighttaew2_1.safetensors")
    latents = torch.randn(16, 2, 4, 4)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN_21, STD_21))
    torch.testing.assert_close(light.decode(latents), plain.decode(latents * std + mean), rtol=1e-4, atol=1e-5)
    video = torch.rand(3, 5, 32, 32)
    torch.testing.assert_close(light.encode(video), (plain.encode(video) - mean) / std)


def test_tiles_and_half_precision(tmp_path):
    vae = load(tmp_path)
    latents = torch.randn(16, 2, 8, 8)
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=Tile(x=48, y=48, stride_x=32, stride_y=32))
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.3 * whole.std()
    half = load(tmp_path, dtype=torch.bfloat16).decode(latents)
    assert (half - whole).norm() / whole.norm() < 0.05


@pytest.mark.parametrize(("z", "patch"), [(16, 1), (48, 2)])
def test_published_sizes(z, patch):
    layout = TinyLayout(z, patch, 64, (256, 128, 64, 64), (2, 2, 1), (1, 2, 2))
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in TinyAutoencoder(layout).state_dict().items()}
    assert read_tiny_layout(shapes) == layout
    # As taew2_1.pth and taew2_2.pth have them.
    assert shapes["encoder.2.conv.weight"] == (64, 128, 1, 1) and shapes["encoder.12.conv.weight"] == (64, 64, 1, 1)
    assert shapes["encoder.17.weight"] == (z, 64, 3, 3) and shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1) and shapes["decoder.22.bias"] == (3 * patch**2,)


def test_other_files_are_named(tmp_path):
    host = StandaloneHost(device="cpu")
    values = weights(SMALL)
    for change, says in (
        ({"decoder.1.weight": torch.rand(8, 12, 3, 3)}, "12 channels"),
        ({"decoder.13.conv.weight": torch.rand(6, 6, 1, 1)}, "makes 2 frames of a latent"),
        ({"encoder.4.conv.0.weight": None}, "lacks 1 of the"),
        ({"encoder.2.conv.weight": None}, "is no tiny VAE"),
    ):
        content = {name: value for name, value in (values | change).items() if value is not None}
        save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=says):
            load_tiny_vae(tmp_path / "x.safetensors", dtype=torch.float32, host=host)


def test_the_nodes_take_it_in_the_place_of_a_vae(tmp_path):
    before = get_host()
    (tmp_path / "vae_approx").mkdir()
    save_file(weights(SMALL), tmp_path / "vae_approx/taew2_1.safetensors")
    set_host(StandaloneHost(models=tmp_path, device="cpu"))
    try:
        (vae,) = N["WanVideoTinyVAELoader"]().loadmodel("taew2_1.safetensors", "fp32")
        (samples,) = N["WanVideoEncode"]().encode(vae, torch.rand(5, 32, 48, 3), False, 272, 272, 144, 128)
        (images,) = N["WanVideoDecode"]().decode(vae, samples, False, 272, 272, 144, 128)
    finally:
        set_host(before)
    assert images.shape == (5, 32, 48, 3) and images.min() >= 0 and images.max() <= 1
