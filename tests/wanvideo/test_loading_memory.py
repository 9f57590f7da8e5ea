"""Loading takes the memory of what is kept and of one layer, and reads what is converted from the mapped file."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from loading_memory import held
from memory_count import LiveBytes
from safetensors.torch import load_file, save_file
from saved_models import quantizable
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.quantized.fp8 import Fp8Linear, quantize_rows
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo import loading, tensor_file
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.model import WanModel

TESTS = Path(__file__).parents[1]
HOST = StandaloneHost(device="cpu")
DIM, FFN = 512, 2048
LARGEST = DIM * FFN * 2
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A model of 50 MB in bfloat16, with layers of 2 MB, and the same in FP8."""
    with torch.device("meta"):
        config = WanConfig(dim=DIM, ffn_dim=FFN, num_heads=4, num_layers=6, in_dim=16, text_dim=tiny.TEXT_DIM)
        shapes = {name: p.shape for name, p in WanModel(config).named_parameters()}
    tensors = {name: torch.randn(shape, dtype=BF16) * 0.02 for name, shape in shapes.items()}
    folder, metadata = tmp_path_factory.mktemp("large"), {"wanvideo.num_heads": "4"}
    save_file(tensors, folder / "bf16.safetensors", metadata=metadata)
    for name in [name for name, value in tensors.items() if quantizable(name, value)]:
        tensors[name], tensors[f"{name}_scale"] = quantize_rows(tensors[name], torch.float8_e4m3fn)
    save_file(tensors, folder / "fp8.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("name", "option", "base", "more"),
    [
        ("bf16", "disabled", BF16, 0), ("bf16", "disabled", torch.float32, 1), ("bf16", "fp8_e4m3fn", BF16, 1),
        # NVFP4 is made in float32, in several steps.
        ("bf16", "fp4_scaled", BF16, 2.75), ("fp8", "disabled", BF16, 0), ("fp8", "fp8_e4m3fn_scaled_fast", BF16, 0),
        ("fp8", "fp4_scaled", BF16, 1.75),
    ],
)  # fmt: skip
def test_no_second_copy_of_a_layer(file, name, option, base, more):
    """more: what the peak may be above all that is kept, in weights of the largest layer as the file has them."""
    with LiveBytes() as live:
        model = load_wan_model(
            file / f"{name}.safetensors", LoadOptions(base_dtype=base, quantization=option), HOST, SYSTEMS
        )
    kept = held(model.transformer)
    assert kept > 12e6 and live.now == kept
    assert live.peak - kept <= more * LARGEST


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_the_process_takes_what_is_kept_and_some_layers(file, tmp_path):
    """What torch does not count as well: pages of mapped files, and bytes that Python holds."""
    first, measured = tmp_path / "first.safetensors", file / "bf16.safetensors"
    tiny.transformer(in_dim=16).save(first)
    command = [sys.executable, TESTS / "loading_memory.py", first, measured]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert 0 < taken["loading"] < 8 * LARGEST < 0.4 * measured.stat().st_size
    assert taken["mapped"] < 3 * LARGEST


def test_no_second_copy_where_a_lora_is_merged(file, tmp_path):
    pairs = {
        f"diffusion_model.blocks.{block}.ffn.{layer}.lora_{half}.weight": torch.randn(shape) * 0.02
        for block in range(6)
        for layer, (rows, columns) in ((0, (FFN, DIM)), (2, (DIM, FFN)))
        for half, shape in (("A", (4, columns)), ("B", (rows, 4)))
    }
    save_file(pairs, tmp_path / "l.safetensors")
    options = LoadOptions(
        base_dtype=BF16, quantization="fp8_e4m3fn", loras=(LoraFile(path=tmp_path / "l.safetensors"),)
    )
    with LiveBytes() as live:
        model = load_wan_model(file / "bf16.safetensors", options, HOST, SYSTEMS)
    assert live.now == held(model.transformer) and live.peak - live.now < 5.5 * LARGEST


def test_what_is_mapped_is_what_is_read(file):
    checkpoint = open_checkpoint(file / "bf16.safetensors")
    for name in [name for name in checkpoint.shapes if name.endswith("ffn.0.weight")]:
        assert torch.equal(checkpoint.tensor(name, mapped=True), checkpoint.tensor(name))


@pytest.mark.parametrize("aligned", [True, False])
def test_large_weights_are_views_of_the_file_where_kernels_take_its_addresses(aligned, tmp_path, monkeypatch):
    """In a file of the library's, whose header ends at a multiple of 8 bytes."""
    monkeypatch.setattr(tensor_file, "LEAST_MAPPED", 4096)
    tensors = {"large": torch.randn(64, 64).bfloat16(), "small": torch.randn(8, 8).bfloat16()}
    for length in range(8, 25, 8):
        save_file(tensors, tmp_path / "m.safetensors", metadata={"pad": "x" * length})
        data = (tmp_path / "m.safetensors").read_bytes()
        if (int.from_bytes(data[:8], "little") + 8) % 16 == (0 if aligned else 8):
            break
    views, mapped = [], tensor_file._mapped
    monkeypatch.setattr(tensor_file, "_mapped", lambda *place: views.append(place[2]) or mapped(*place))
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        value = checkpoint.tensor(name)
        assert torch.equal(value, tensor) and value.data_ptr() % 16 == 0
    assert views == ([64 * 64 * 2] if aligned else [])


@pytest.mark.parametrize("stretch", [2**23, 1000], ids=["at once", "in stretches"])
def test_a_file_that_became_shorter_is_named(stretch, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "STRETCH", stretch)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(9, 7).bfloat16(), "b": torch.randn(64, 64).bfloat16()}, path)
    checkpoint = open_checkpoint(path)
    want = {name: checkpoint.tensor(name) for name in ("a", "b")}
    assert all(torch.equal(checkpoint.tensor(name, mapped=True), value) for name, value in want.items())
    assert torch.equal(want["b"], load_file(path)["b"])
    path.write_bytes(path.read_bytes()[:-1])
    for mapped in (True, False):
        with pytest.raises(ValueError, match=r"^m\.safetensors became shorter while it was read; download it again\.$"):
            [checkpoint.tensor(name, mapped=mapped) for name in want]


def test_layers_are_made_ahead_for_a_gpu(file, monkeypatch):
    """In order, by threads that use the loader's GPU; a fault of one is the loader's."""
    used, threads = [], set()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)

    class Plan:
        device = torch.device("cuda")
        fault = None

        def layer(self, checkpoint, name, plain, merged, *, in_block):
            threads.add(threading.get_ident())
            if name == self.fault:
                raise ValueError(f"{name} is broken.")
            return Fp8Linear.quantize(torch.randn(4, 32), None, torch.float8_e4m3fn) if in_block else None

    with torch.device("meta"):
        config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=2, in_dim=16, text_dim=tiny.TEXT_DIM)
        model = WanModel(config)
    plan, names = Plan(), [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    made = list(loading._layers(model, None, plan, None))
    assert [name for name, _ in made] == names and threading.get_ident() not in threads
    assert all((layer is not None) == loading.quantizable(model, name) for name, layer in made)
    assert set(used) == {3} and len(used) <= loading.AT_ONCE
    plan.fault = names[-2]
    with pytest.raises(ValueError, match="is broken"):
        list(loading._layers(model, None, plan, None))
