"""What reaches linear layers and attention lies densely, and weights are aligned, whatever memory they come from.

Linear layers and attention kernels of others get their arguments straight from the model, with no operator between.
"""

from contextlib import contextmanager

import pytest
import torch
from layouts import Layout, bits
from saved_models import save_comfy_fp8, save_nvfp4
from torch import nn
from wanvideo_wrapper.attention import sdpa
from wanvideo_wrapper.clip_image.extension import ClipImage, ClipImageExtension
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk.extension import AudioWindow, MultiTalk
from wanvideo_wrapper.multitalk.multitalk import AudioProjModel, SingleStreamMultiAttention
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.tensor_layout import is_kernel_ready
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.device_copies import SLAB_ALIGNMENT, OrderedCopies
from wanvideo_wrapper.wanvideo.host_slabs import Unit
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.safetensors_file import SafetensorsFile
from wanvideo_wrapper.wanvideo.swapper import Swapper
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HOST = StandaloneHost(device="cpu")
CPU = torch.device("cpu")
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=4)
SPEECH = MultiTalk(features=12, intermediate_dim=10, context_tokens=4, output_dim=12, voiced=(0,))
PROJECTIONS = ("q", "k", "v", "k_img", "v_img", "q_linear", "kv_linear")
# Values in memory of another order, whose last dimension is not dense.
turned = Layout("permuted", 0, 0).place


def in_wider_rows(out):
    """[B, L, H, D] whose heads and channels join into a view, but whose rows do not follow each other."""
    wide = out.new_zeros(*out.shape[:2], out.shape[2] + 1, out.shape[3])
    return wide[:, :, :-1].copy_(out)


class LooseAttention:
    """A backend that requires what kernels do, and whose own output lies as `place` puts it."""

    name = "loose"

    def __init__(self, place):
        self.place, self.calls = place, 0

    def __call__(self, q, k, v):
        self.calls += 1
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        out = self.place(sdpa()(q, k, v))
        assert not out.is_contiguous()
        return out


@contextmanager
def loosened(module, place):
    """Inside, attention and its projections give loose memory; the linear layers whose input was not dense."""
    found, hooks = [], []
    for name, layer in module.named_modules():
        if hasattr(layer, "attention"):
            layer.attention = LooseAttention(place)
        if isinstance(layer, nn.Linear):
            hooks.append(layer.register_forward_pre_hook(
                lambda _, given, name=name: None if given[0].is_contiguous() else found.append(name)
            ))  # fmt: skip
        if name.split(".")[-1] in PROJECTIONS:
            hooks.append(layer.register_forward_hook(lambda _, __, out: turned(out)))
    yield found
    assert all(layer.attention.calls for layer in module.modules() if hasattr(layer, "attention"))
    for hook in hooks:
        hook.remove()


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


both_places = pytest.mark.parametrize("place", [turned, in_wider_rows], ids=["turned", "in_wider_rows"])


@torch.no_grad()
@both_places
@pytest.mark.parametrize("speakers", [1, 2])
def test_every_linear_layer_of_a_talking_video(speakers, place):
    model = randomise(WanModel(CONFIG, (ClipImageExtension(clip_dim=16), SPEECH)))
    inputs = ModelInputs(
        latents=torch.randn(2, 16, 3, 4, 4), timestep=torch.tensor([500.0, 500.0]),
        text=(torch.randn(4, 8), torch.randn(3, 8)),
        payloads=(
            ClipImage(torch.randn(1, 7, 16)),
            AudioWindow(torch.randn(1, speakers, 9, 5, 2, 6), torch.tensor(1.0)),
        ),
    )  # fmt: skip
    want = model(inputs)
    with loosened(model, place) as found:
        got = model(inputs)
    assert not found and (got - want).norm() < 1e-4 * want.norm()


@torch.no_grad()
@both_places
@pytest.mark.parametrize("trailing", [0, 1])
@pytest.mark.parametrize("speakers", [1, 2])
def test_every_linear_layer_of_audio_attention(speakers, trailing, place):
    module, shape, count = randomise(SingleStreamMultiAttention(24, 12, 2)), (3, 2, 5), (3 + trailing) * 10
    x, audio = torch.randn(1, count, 24), torch.randn(3, speakers * 4, 12)
    scores = torch.rand(1, count, speakers + 1)
    want = module(x, audio, shape, scores, speakers)
    with loosened(module, place) as found:
        assert all(t.is_contiguous() for t in module.speaker_keys_values(turned(audio), speakers))
        got = module(turned(x), turned(audio), shape, turned(scores), speakers)
    assert not found and got.is_contiguous() and (got - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("place", [turned, lambda t: t.to(memory_format=torch.channels_last_3d)],
                         ids=["turned", "channels_last"])  # fmt: skip
def test_every_linear_layer_of_the_audio_projection(place):
    module, found = randomise(AudioProjModel(12, 10, 4, 12)), []
    first, later = torch.randn(2, 1, 5, 2, 6), torch.randn(2, 3, 8, 2, 6)
    want = module(first, later)
    for layer in (module.proj1, module.proj1_vf):
        layer.register_forward_pre_hook(lambda _, given: found.append(given[0].is_contiguous()))
    assert torch.allclose(module(place(first), place(later)), want, atol=1e-5) and found == [True, True]


def misplace(module, offset):
    """Let the parameters start that many elements into their memory."""
    for parameter in module.parameters():
        parameter.data = Layout("offset", offset, 0).place(parameter.data)
    return [parameter.data for parameter in module.parameters()]


@pytest.mark.parametrize("offset", [1, 3, 5])
def test_swapped_blocks_are_aligned(offset):
    block = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).bfloat16())
    values = [value.clone() for value in misplace(block, offset)]
    copies, unit = OrderedCopies(CPU), Unit(block)
    unit.gather(copies)
    waiting = [parameter.data_ptr() for parameter in block.parameters()]
    with Swapper([unit], copies).visit(block):
        for parameter, value, address in zip(block.parameters(), values, waiting, strict=True):
            assert parameter.data_ptr() != address and parameter.data_ptr() % SLAB_ALIGNMENT == 0
            assert is_kernel_ready(parameter, strided=False) and torch.equal(parameter, value)
    assert [parameter.data_ptr() for parameter in block.parameters()] == waiting


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model file for each way to read weights: as they are, or as the file quantized them."""
    folder, model = tmp_path_factory.mktemp("stored"), tiny.transformer(in_dim=16)
    model.save(folder / "plain.safetensors", torch.float32)
    save_comfy_fp8(model, folder / "fp8.safetensors", input_scale=0.02)
    save_nvfp4(model, folder / "nvfp4.safetensors", input_scale=0.02)
    return folder


@pytest.mark.parametrize(
    ("file", "option"),
    [
        ("plain", "disabled"), ("plain", "fp8_e4m3fn"), ("fp8", "fp8_e4m3fn_scaled"), ("fp8", "fp8_e4m3fn_scaled_fast"),
        ("nvfp4", "fp4_scaled"), ("nvfp4", "fp4_scaled_fast"),
    ],
)  # fmt: skip
def test_views_of_a_file_are_aligned_at_load(stored, file, option, monkeypatch):
    read = SafetensorsFile.read
    def shifted(self, name, *, mapped=False):
        return Layout("offset", 1, 0).place(read(self, name, mapped=mapped))

    monkeypatch.setattr(SafetensorsFile, "read", shifted)
    options = LoadOptions(base_dtype=torch.float32, quantization=option)
    loaded = load_wan_model(stored / f"{file}.safetensors", options, HOST, SYSTEMS).transformer.state_dict()
    assert all(is_kernel_ready(t, strided=False) for t in loaded.values())
    monkeypatch.undo()
    plain = load_wan_model(stored / f"{file}.safetensors", options, HOST, SYSTEMS).transformer.state_dict()
    assert all(torch.equal(bits(t), bits(plain[name])) for name, t in loaded.items())
