"""The VAE on a GPU: the same numbers as on the CPU, and no more memory for a longer video."""

import pytest
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.wanvideo.modules.vae import Tile, load_vae

pytestmark = pytest.mark.cuda
MIB = 2**20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    tiny.vae().save(file, torch.float32)
    return file


def latents_of(frames, rows, columns):
    return torch.randn(16, frames, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tile", [None, Tile(x=64, y=64, stride_x=48, stride_y=48)])
def test_equals_the_cpu(path, tile, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu, gpu = (load_vae(path, dtype=torch.float32, host=StandaloneHost(device=name)) for name in ("cpu", "cuda"))
    latents = latents_of(3, 9, 12)
    want = cpu.decode(latents, tile=tile)
    got = gpu.decode(latents, tile=tile)
    assert got.device.type == "cpu" and (got - want).abs().max() < 1e-3 * want.abs().max()
    want, got = cpu.encode(want, tile=tile), gpu.encode(want, tile=tile)
    assert got.device.type == "cpu" and (got - want).abs().max() < 1e-3 * want.abs().max()


def peak_of(work):
    """Peak of GPU memory in bytes over what was allocated before, by other tests too."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_does_not_grow_with_the_length(path):
    vae = load_vae(path, dtype=torch.bfloat16, host=StandaloneHost(device="cuda"))
    short, long = latents_of(4, 32, 32), latents_of(24, 32, 32)
    vae.decode(short)
    # A chunk of four frames in float32 is 3 MiB; one more of them may be on its way to the host.
    assert peak_of(lambda: vae.decode(long)) < peak_of(lambda: vae.decode(short)) + 4 * MIB
    short, long = (torch.zeros(3, frames, 256, 256) for frames in (13, 93))
    assert peak_of(lambda: vae.encode(long)) < peak_of(lambda: vae.encode(short)) + 4 * MIB


def test_tiles_need_less_memory(path):
    vae = load_vae(path, dtype=torch.bfloat16, host=StandaloneHost(device="cuda"))
    latents = latents_of(3, 64, 64)
    tile = Tile(x=128, y=128, stride_x=96, stride_y=96)
    assert peak_of(lambda: vae.decode(latents, tile=tile)) < peak_of(lambda: vae.decode(latents)) / 4
