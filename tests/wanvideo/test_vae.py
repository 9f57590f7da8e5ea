"""The VAE against a whole-clip float64 form of the published architectures, which knows no chunks and no cache."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from wanvideo_wrapper.host import CancelledError, StandaloneHost
from wanvideo_wrapper.wanvideo.modules.vae import MEAN_FIELD, STD_FIELD, Tile, load_vae
from wanvideo_wrapper.wanvideo.modules.vae_stream import VaeStream

KEYS = Path(__file__).resolve().parents[1] / "data" / "checkpoints"
# Widths from the first number on are divided by the second: base width 8, everything else as published.
NARROW = {
    "wan21_vae": {"encoder": (96, 12), "decoder": (96, 12)},
    "wan22_vae": {"encoder": (160, 20), "decoder": (256, 32)},
}
FACTOR = {"wan21_vae": 8, "wan22_vae": 16}
CHANNELS = {"wan21_vae": 16, "wan22_vae": 48}


def tiny_tensors(name, seed=0):
    """Random weights of a published VAE at a twelfth or less of its widths, float32."""
    generator = torch.Generator().manual_seed(seed)
    published = json.loads((KEYS / f"{name}.json").read_text())
    tensors = {}
    for key, shape in published.items():
        if key == "_meta":
            continue
        least, divisor = NARROW[name].get(key.split(".")[0], (10**9, 1))
        shape = [size // divisor if size >= least else size for size in shape]
        noise = torch.randn(shape, generator=generator)
        if key.endswith("gamma"):
            tensors[key] = 1 + 0.2 * noise
        elif key.endswith("bias"):
            tensors[key] = 0.1 * noise
        else:
            tensors[key] = noise / noise[0].numel() ** 0.5
    return tensors


def statistics(name, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(CHANNELS[name], generator=generator)
    return mean, 0.5 + torch.rand(CHANNELS[name], generator=generator)


@pytest.fixture(scope="module", params=sorted(NARROW))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(name):
    return tiny_tensors(name)


@pytest.fixture(scope="module")
def path(name, tensors, tmp_path_factory):
    mean, std = statistics(name)
    file = tmp_path_factory.mktemp("vae") / f"{name}.safetensors"
    save_file(tensors, file, metadata={MEAN_FIELD: json.dumps(mean.tolist()), STD_FIELD: json.dumps(std.tolist())})
    return file


@pytest.fixture(scope="module")
def vae(path):
    return load_vae(path, dtype=torch.float32, host=StandaloneHost(device="cpu"))


def video_of(vae, frames, rows=2, columns=3, seed=2):
    factor = vae.spatial_factor
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, frames, rows * factor, columns * factor, generator=generator) * 2 - 1


def latents_of(vae, frames, rows=2, columns=3, seed=3):
    return torch.randn(vae.latent_channels, frames, rows, columns, generator=torch.Generator().manual_seed(seed))


# The whole-clip form. w: tensors by published name in float64; x: [channels, frames, height, width].


def conv(w, name, x):
    """Zero padding: all in front in time, on both sides in space."""
    weight = w[name + ".weight"]
    time, height, width = weight.shape[2:]
    x = F.pad(x, (width // 2, width // 2, height // 2, height // 2, time - 1, 0))
    return F.conv3d(x, weight, w[name + ".bias"])


def norm(w, name, x):
    return x / x.square().mean(dim=0, keepdim=True).sqrt() * w[name + ".gamma"].reshape(-1, 1, 1, 1)


def residual(w, name, x):
    y = conv(w, name + ".residual.2", F.silu(norm(w, name + ".residual.0", x)))
    y = conv(w, name + ".residual.6", F.silu(norm(w, name + ".residual.3", y)))
    return y + (conv(w, name + ".shortcut", x) if name + ".shortcut.weight" in w else x)


def attention(w, name, x):
    """Every frame for itself, one head."""
    qkv = torch.einsum("oc,cfhw->ofhw", w[name + ".to_qkv.weight"].flatten(1), norm(w, name + ".norm", x))
    q, k, v = rearrange(qkv + w[name + ".to_qkv.bias"].reshape(-1, 1, 1, 1), "(n c) f h w -> n f (h w) c", n=3)
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
    y = y @ w[name + ".proj.weight"].flatten(1).T + w[name + ".proj.bias"]
    return x + rearrange(y, "f (h w) c -> c f h w", h=x.shape[2])


def middle(w, name, x):
    return residual(w, name + ".2", attention(w, name + ".1", residual(w, name + ".0", x)))


def spatial(w, name, x, **options):
    weight, bias = w[name + ".resample.1.weight"], w[name + ".resample.1.bias"]
    return F.conv2d(x.movedim(1, 0), weight, bias, **options).movedim(0, 1)


def down(w, name, x):
    """Half the size; with a time convolution the first frame stays, and each pair after it joins its predecessor."""
    x = spatial(w, name, F.pad(x, (0, 1, 0, 1)), stride=2)
    if name + ".time_conv.weight" not in w or x.shape[1] == 1:
        return x
    joined = F.conv3d(x, w[name + ".time_conv.weight"], w[name + ".time_conv.bias"], stride=(2, 1, 1))
    return torch.cat((x[:, :1], joined), dim=1)


def up(w, name, x):
    """Twice the size; with a time convolution every frame but the first becomes two, from frames but the first."""
    if name + ".time_conv.weight" in w and x.shape[1] > 1:
        pairs = rearrange(conv(w, name + ".time_conv", x[:, 1:]), "(n c) f h w -> c (f n) h w", n=2)
        x = torch.cat((x[:, :1], pairs), dim=1)
    return spatial(w, name, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), padding=1)


def averaged(x, channels, time, space):
    """Blocks of time x space x space, and of channels, become their mean; the first frame's block is half empty."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[1] % time, 0))
    x = rearrange(x, "c (f t) (h p) (w q) -> (c t p q) f h w", t=time, p=space, q=space)
    return rearrange(x, "(c g) f h w -> c g f h w", c=channels).mean(dim=1)


def repeated(x, channels, time, space):
    x = x.repeat_interleave(channels * time * space**2 // x.shape[0], dim=0)
    return rearrange(x, "(c t p q) f h w -> c (f t) (h p) (w q)", t=time, p=space, q=space)[:, time - 1 :]


def unit(w, name, x):
    if name + ".resample.1.weight" in w:
        return (down if ".downsamples." in name else up)(w, name, x)
    return residual(w, name, x)


def units(w, prefix):
    numbers = {key.removeprefix(prefix).split(".")[0] for key in w if key.startswith(prefix)}
    return [prefix + number for number in sorted(numbers, key=int)]


def stage(w, name, x):
    """A stage of 2.2 with the shortcut around it."""
    inner = units(w, f"{name}.{name.split('.')[1]}.")
    y = x
    for part in inner:
        y = unit(w, part, y)
    space = 2 if inner[-1] + ".resample.1.weight" in w else 1
    time = 2 if inner[-1] + ".time_conv.weight" in w else 1
    if name.startswith("encoder"):
        return y + averaged(x, y.shape[0], time, space)
    return y if space == 1 else y + repeated(x, y.shape[0], time, space)


def trunk(w, prefix, x):
    for part in units(w, prefix):
        nested = any(key.startswith(f"{part}.{prefix.split('.')[1]}.") for key in w)
        x = (stage if nested else unit)(w, part, x)
    return x


def reference_encode(w, video, mean, std):
    if w["encoder.conv1.weight"].shape[1] == 12:
        video = rearrange(video, "c f (h q) (w r) -> (c r q) f h w", q=2, r=2)
    x = middle(w, "encoder.middle", trunk(w, "encoder.downsamples.", conv(w, "encoder.conv1", video)))
    x = conv(w, "conv1", conv(w, "encoder.head.2", F.silu(norm(w, "encoder.head.0", x))))
    return (x[: len(mean)] - mean.reshape(-1, 1, 1, 1)) / std.reshape(-1, 1, 1, 1)


def reference_decode(w, latents, mean, std):
    x = conv(w, "conv2", latents * std.reshape(-1, 1, 1, 1) + mean.reshape(-1, 1, 1, 1))
    x = trunk(w, "decoder.upsamples.", middle(w, "decoder.middle", conv(w, "decoder.conv1", x)))
    x = conv(w, "decoder.head.2", F.silu(norm(w, "decoder.head.0", x)))
    return rearrange(x, "(c r q) f h w -> c f (h q) (w r)", q=2, r=2) if x.shape[0] == 12 else x


def assert_close(got, want, tolerance=1e-4):
    """Relative to the largest value; NaN fails."""
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() < tolerance * want.abs().max()


@pytest.fixture(scope="module")
def reference(name, tensors):
    w = {key: value.double() for key, value in tensors.items()}
    mean, std = (s.double() for s in statistics(name))
    return lambda form, x: form(w, x.double(), mean, std)


@pytest.mark.parametrize("frames", [1, 9, 13])
def test_encodes_as_the_whole_clip_form(vae, reference, frames):
    video = video_of(vae, frames)
    assert_close(vae.encode(video), reference(reference_encode, video))


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_decodes_as_the_whole_clip_form(vae, reference, frames):
    latents = latents_of(vae, frames)
    assert_close(vae.decode(latents), reference(reference_decode, latents))


def test_sizes(vae, name):
    assert (vae.latent_channels, vae.spatial_factor) == (CHANNELS[name], FACTOR[name])


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_round_trip_shapes(vae, frames):
    video = video_of(vae, frames)
    latents = vae.encode(video)
    assert latents.shape == (vae.latent_channels, (frames + 3) // 4, 2, 3)
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    for result in (latents, decoded):
        assert result.dtype == torch.float32 and result.device.type == "cpu" and result.is_contiguous()
        assert result.isfinite().all() and not result.requires_grad


def test_accepts_views_and_leaves_them_alone(vae):
    video = video_of(vae, 5)
    view = video.movedim(0, -1).contiguous().movedim(-1, 0)
    before = view.clone()
    assert torch.equal(vae.encode(view), vae.encode(video))
    assert torch.equal(view, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(vae, path, dtype):
    half = load_vae(path, dtype=dtype, host=StandaloneHost(device="cpu"))
    latents = latents_of(vae, 2)
    assert_close(half.decode(latents), vae.decode(latents), tolerance=0.1)
    video = video_of(vae, 5)
    assert_close(half.encode(video), vae.encode(video), tolerance=0.1)


@pytest.fixture
def chunks(monkeypatch):
    """Frames of every chunk that goes through an encoder or a decoder."""
    seen = []

    def noting(name):
        forward = getattr(VaeStream, name)

        def call(self, module, chunk):
            seen.append(chunk.shape[2])
            return forward(self, module, chunk)

        monkeypatch.setattr(VaeStream, name, call)

    noting("encode")
    noting("decode")
    return seen


def test_frames_are_handed_over_as_they_are_made(vae, chunks):
    latents, made, frames = latents_of(vae, 4), [], []
    for chunk in vae.decode_chunks(latents):
        frames.append(chunk)
        made.append(len(chunks))
    assert made == [1, 2, 3, 4] and [chunk.shape[1] for chunk in frames] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(frames, dim=1), vae.decode(latents))


def test_no_call_sees_more_than_a_chunk(vae, chunks):
    vae.decode(vae.encode(video_of(vae, 13)))
    assert chunks == [1, 4, 4, 4, 1, 1, 1, 1]


class CancellingHost(StandaloneHost):
    """Cancels at the third question; notes the progress."""

    def __init__(self):
        super().__init__(device="cpu")
        self.asked = 0
        self.steps = []

    def check_cancelled(self):
        self.asked += 1
        if self.asked == 3:
            raise CancelledError("Cancelled.")

    def progress(self, total, label=""):
        bar = super().progress(total, label)
        bar.update = lambda done, **kwargs: self.steps.append((done, total))
        return bar


def test_cancel_stops_between_chunks(path):
    host = CancellingHost()
    vae = load_vae(path, dtype=torch.float32, host=host)
    with pytest.raises(CancelledError):
        vae.decode(latents_of(vae, 5))
    assert host.steps == [(1, 5), (2, 5)]


def test_a_tile_that_covers_all_changes_nothing(vae):
    tile = Tile(x=1024, y=1024, stride_x=512, stride_y=512)
    video, latents = video_of(vae, 5), latents_of(vae, 2)
    assert torch.equal(vae.encode(video, tile=tile), vae.encode(video))
    assert torch.equal(vae.decode(latents, tile=tile), vae.decode(latents))


def blend(left, right, overlap, axis):
    """Two tiles that share `overlap` cells: the share of the right one rises linearly."""
    rise = (torch.arange(overlap) + 1) / (overlap + 1)
    rise = rise.reshape([-1 if i == axis % 4 else 1 for i in range(4)])
    before, a = left.split([left.shape[axis] - overlap, overlap], dim=axis)
    b, after = right.split([overlap, right.shape[axis] - overlap], dim=axis)
    return torch.cat((before, a * (1 - rise) + b * rise, after), dim=axis)


def test_tiles_are_blended_linearly(vae):
    factor = vae.spatial_factor
    tile = Tile(x=4 * factor + 3, y=3 * factor, stride_x=2 * factor + 5, stride_y=2 * factor)
    latents = latents_of(vae, 2, rows=5, columns=6)
    rows = []
    for top in (slice(0, 3), slice(2, 5)):
        left, right = (vae.decode(latents[:, :, top, columns]) for columns in (slice(0, 4), slice(2, 6)))
        rows.append(blend(left, right, 2 * factor, -1))
    assert_close(vae.decode(latents, tile=tile), blend(*rows, factor, -2), tolerance=1e-5)

    pixels = video_of(vae, 5, rows=5, columns=6)
    rows = []
    for top in (slice(0, 3 * factor), slice(2 * factor, 5 * factor)):
        parts = [slice(0, 4 * factor), slice(2 * factor, 6 * factor)]
        rows.append(blend(*(vae.encode(pixels[:, :, top, columns]) for columns in parts), 2, -1))
    assert_close(vae.encode(pixels, tile=tile), blend(*rows, 1, -2), tolerance=1e-5)


@pytest.mark.parametrize("columns", [5, 6, 7, 8, 11])
def test_tiles_cover_any_size(vae, columns):
    factor = vae.spatial_factor
    tile = Tile(x=3 * factor, y=3 * factor, stride_x=factor, stride_y=2 * factor)
    latents = latents_of(vae, 1, rows=2, columns=columns)
    assert vae.decode(latents, tile=tile).isfinite().all()
    assert vae.decode(latents, tile=tile).shape == (3, 1, 2 * factor, columns * factor)


def test_end_image_is_a_latent_frame_of_its_own(vae, reference):
    video = video_of(vae, 6)
    latents = vae.encode_with_end(video)
    assert latents.shape[1] == 3
    assert_close(latents[:, :2], reference(reference_encode, video[:, :5]))
    assert_close(latents[:, 2:], reference(reference_encode, video[:, 5:]))


def test_refuses_what_it_cannot_encode(vae):
    factor = vae.spatial_factor
    with pytest.raises(ValueError, match="4n.1 frames but got 7; give 5"):
        vae.encode(video_of(vae, 7))
    with pytest.raises(ValueError, match="end image but got 5 frames"):
        vae.encode_with_end(video_of(vae, 5))
    with pytest.raises(ValueError, match=f"divide by {factor} .* resize the images to {factor}x{factor}"):
        vae.encode(torch.zeros(3, 1, factor, factor + 2))
    for shape in ((4, 1, factor, factor), (1, factor, factor, 3), (3, 0, factor, factor), (3, factor, factor)):
        with pytest.raises(ValueError, match="3, frames, height, width"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"latents of {vae.latent_channels} channels"):
        vae.decode(torch.zeros(vae.latent_channels + 1, 1, 2, 2))
    with pytest.raises(ValueError, match="leave gaps"):
        Tile(x=64, y=64, stride_x=72, stride_y=32)
