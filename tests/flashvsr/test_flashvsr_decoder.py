"""FlashVSR's decoder against its published layers on a whole video in float64, what it sees, and its files."""

import pytest
import torch
import torch.nn.functional as F
from published_keys import keys_of
from safetensors.torch import save_file
from tiny_runs import prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.flashvsr.decoder import DecoderLayout, FlashVsrDecoder, load_decoder, read_decoder_layout
from wanvideo_wrapper.flashvsr.extension import FlashVsr
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.modules.vae import Tile
from wanvideo_wrapper.wanvideo.request import TextEmbeds

LAYOUT = DecoderLayout((8, 6, 4, 4), (1, 2, 2))
NAME = "Wan2_1_FlashVSR_TCDecoder_fp32.safetensors"
HOST = StandaloneHost(device="cpu")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights():
    model = FlashVsrDecoder(LAYOUT)
    state = enumerate(model.state_dict().items())
    return {name: rand(*value.shape, seed=i) / max(value[0].numel(), 25) ** 0.5 for i, (name, value) in state}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vae" / NAME
    path.parent.mkdir()
    save_file(weights(), path)
    return path


@pytest.fixture(scope="module")
def vae(file):
    return load_decoder(file, dtype=torch.float32, host=HOST)


def samples(frames=3, side=32):
    """As the sampler gives them: the video, its last frame four times."""
    video = rand(1, 3, 4 * frames - 3, side, side, seed=1).clamp(-1, 1)
    seen = torch.cat((video, video[:, :, -1:].expand(-1, -1, 3, -1, -1)), dim=2)
    return {"samples": rand(1, 16, frames, side // 8, side // 8, seed=2), "low_quality": seen}


def published(given):
    """The original pack's video, its first frame twice and its last one four times, filled up in front to whole fours,
    of which latents have one each; then the published list of layers, all frames at once."""
    w = {name: value.double() for name, value in weights().items()}
    latents, seen = given["samples"][0].double(), given["low_quality"][0].double()
    frames = torch.cat((seen[:, :1], seen), dim=1)
    frames = torch.cat((frames[:, :1].expand(-1, 4 - frames.shape[1] % 4, -1, -1), frames), dim=1)
    _, count, height, width = latents.shape
    cells = [
        [frames[c, 4 * t + i, y::8, x::8] for c in range(3) for i in range(4) for y in range(8) for x in range(8)]
        for t in range(count)
    ]
    x = torch.cat((torch.stack([torch.stack(cell) for cell in cells]), latents.movedim(1, 0)), dim=1)
    x = F.conv2d(torch.tanh(x / 3) * 3, w["decoder.1.weight"], w["decoder.1.bias"], padding=1).relu()
    x = F.conv2d(x, w["decoder.3.weight"], padding=1).relu()
    for first, strides in ((5, 1), (11, 2), (17, 2)):
        for layer in range(first, first + 3):
            y = torch.cat((x, F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]), dim=1)
            for leaf in (0, 2, 4):
                name = f"decoder.{layer}.conv.{leaf}"
                y = F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
                y = y.relu() if leaf < 4 else y
            x = (x + y).relu()
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = torch.stack(F.conv2d(x, w[f"decoder.{first + 4}.conv.weight"]).chunk(strides, dim=1), dim=1).flatten(0, 1)
        x = F.conv2d(x, w[f"decoder.{first + 5}.weight"], padding=1)
    x = F.conv2d(x.relu(), w["decoder.24.weight"], padding=1).relu()
    return F.conv2d(x, w["decoder.26.weight"], w["decoder.26.bias"], padding=1)[3:].movedim(1, -1)


@pytest.mark.parametrize("frames", [1, 3])
def test_decoding_equals_the_published_layers(vae, frames):
    given = samples(frames)
    want = published(given)
    got = vae.decode(vae.latents_of(given)).movedim(0, -1)
    assert got.shape == (4 * frames - 3, 32, 32, 3)
    torch.testing.assert_close(got.double(), want * 2 - 1, rtol=1e-4, atol=1e-5)
    (images,) = N["WanVideoDecode"]().decode(vae, given, False, 272, 272, 144, 128)
    torch.testing.assert_close(images.double(), want.clamp(0, 1), rtol=1e-4, atol=1e-5)
    others = vae.latents_of({**given, "low_quality": -given["low_quality"]})
    assert (vae.decode(others) - got.movedim(-1, 0)).abs().mean() > 1e-3


def test_tiles_see_their_part_of_the_video(vae):
    latents = vae.latents_of(samples(2, side=64))
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=Tile(x=48, y=48, stride_x=32, stride_y=32))
    assert tiled.shape == whole.shape
    for rows in (slice(0, 6), slice(4, 8)):
        alone = vae.decode(latents[:, :, rows, :6])
        # What no other tile covers.
        inside = slice(0, 16) if rows.start == 0 else slice(-16, None)
        torch.testing.assert_close(tiled[:, :, inside, :16], alone[:, :, inside, :16], rtol=0, atol=1e-5)


def test_what_it_cannot_do_is_said(vae):
    given = samples()
    with pytest.raises(ValueError, match="these samples have none"):
        vae.latents_of({"samples": given["samples"]})
    with pytest.raises(ValueError, match=r"needs a video of low quality of \(8, 32, 32\).* but theirs has \(12, 32"):
        vae.latents_of({**given, "samples": given["samples"][:, :, 1:]})
    with pytest.raises(ValueError, match="cannot encode"):
        vae.encode(torch.rand(3, 5, 32, 32))


def test_published_sizes():
    shapes = keys_of("flashvsr_tcdecoder")
    layout = read_decoder_layout(shapes)
    assert layout == DecoderLayout((512, 256, 128, 128), (1, 2, 2))
    with torch.device("meta"):
        assert {k: tuple(v.shape) for k, v in FlashVsrDecoder(layout).state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder.1.weight": torch.rand(8, 16, 3, 3)}, "decodes 16 channels to 4 frames"),
        ({"decoder.15.conv.weight": torch.rand(6, 6, 1, 1)}, "to 2 frames"),
        ({"decoder.9.conv.weight": None}, "no decoder of FlashVSR"),
        ({"decoder.24.weight": None}, "lacks 1 of the"),
    ],
)
def test_other_files_are_named(tmp_path, change, says):
    content = {name: value for name, value in (weights() | change).items() if value is not None}
    save_file(content, tmp_path / NAME)
    with pytest.raises(ValueError, match=says):
        load_decoder(tmp_path / NAME, dtype=torch.float32, host=HOST)


def test_the_nodes_restore_a_video(file):
    """The sampler hands the frames on, in both of its results; a run without them gives none."""
    models, before = file.parents[1], get_host()
    tiny.transformer(in_dim=16, extensions=(FlashVsr(hidden=(8, 12), layers=1),)).save(
        models / "diffusion_models/vsr.safetensors"
    )
    set_host(StandaloneHost(models=models, device="cpu"))
    try:
        loader = N["WanVideoFlashVSRDecoderLoader"]
        assert loader.VALIDATE_INPUTS(model_name=NAME) is True
        with pytest.raises(ValueError, match="load it with 'WanVideo FlashVSR"):
            N["WanVideoVAELoader"].VALIDATE_INPUTS(model_name=NAME)
        (vae,) = loader().loadmodel(NAME, "fp32")
        (model,) = N["WanVideoModelLoader"]().loadmodel("vsr.safetensors", "fp32", "offload_device", "disabled")
        (empty,) = N["WanVideoEmptyEmbeds"]().process(9, 32, 32)
        (embeds,) = N["WanVideoAddFlashVSRInput"]().add(empty, torch.rand(9, 32, 32, 3), 1.0)
        settings = dict(steps=1, cfg=1.0, shift=5.0, seed=1, force_offload=True, scheduler="euler")
        settings |= {"riflex_freq_index": 0, "text_embeds": TextEmbeds(positive=(prompt(1),))}
        results = N["WanVideoSampler"]().process(model, embeds, **settings)
        assert all(torch.equal(result["low_quality"], embeds.payloads[0].frames) for result in results)
        (images,) = N["WanVideoDecode"]().decode(vae, results[0], False, 272, 272, 144, 128)
        assert images.shape == (9, 32, 32, 3) and images.isfinite().all()
        assert "low_quality" not in N["WanVideoSampler"]().process(model, empty, **settings)[0]
    finally:
        set_host(before)
