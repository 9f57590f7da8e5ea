"""A model whose parts wait computes the same to the bit, in two slabs and what stays, and leaves nothing behind."""

import contextlib
import gc
import warnings
import weakref
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import pytest
import torch
from contract import SIZES, build, inputs, randomize
from limits import memory, trim
from safetensors.torch import save_file
from saved_models import save_comfy_fp8, save_gguf, save_nvfp4
from swap_stand_in import DEVICE, CountedCopies, LateCopies
from torch import nn
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.host.residence import Staging
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.block_swap import AUTOMATIC, BlockSwapArgs, Placement, spread
from wanvideo_wrapper.wanvideo.compilation import CompileArgs
from wanvideo_wrapper.wanvideo.conditioning import Payload
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.device_copies import OrderedCopies
from wanvideo_wrapper.wanvideo.extension import Extension
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model, with_loras
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.memory import AT_ONCE, WORKSPACES, Work
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

CPU = torch.device("cpu")
FILES = {
    "plain": lambda model, path: model.save(path, torch.bfloat16),
    "fp8": lambda model, path: save_comfy_fp8(model, path, input_scale=0.02),
    "nvfp4": lambda model, path: save_nvfp4(model, path, input_scale=0.02),
    "gguf": save_gguf,
}
STORED = [
    ("plain", "disabled"), ("plain", "fp8_e4m3fn"), ("plain", "fp4_experimental"), ("fp8", "fp8_e4m3fn_scaled"),
    ("nvfp4", "fp4_scaled"), ("gguf", "disabled"),
]  # fmt: skip
FAST = [("plain", "fp8_e4m3fn_fast"), ("fp8", "fp8_e4m3fn_scaled_fast")]
ALL = BlockSwapArgs(blocks_to_swap=40)
WITH_TEXT = BlockSwapArgs(blocks_to_swap=40, embeddings=("text_embedding", "img_emb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("stored"), tiny.transformer(in_dim=16)
    for name, save in FILES.items():
        save(model, folder / f"{name}.{'gguf' if name == 'gguf' else 'safetensors'}")
    difference = {}
    for i in range(3):
        for layer, name in (("norm3.weight", "norm3.diff"), ("modulation", "diff_m")):
            shape = model.tensors[f"blocks.{i}.{layer}"].shape
            difference[f"diffusion_model.blocks.{i}.{name}"] = 0.1 * torch.randn(shape)
    pairs = {}
    for i in range(3):
        key, shape = f"diffusion_model.blocks.{i}.self_attn.q", model.tensors[f"blocks.{i}.self_attn.q.weight"].shape
        pairs[f"{key}.lora_A.weight"] = torch.randn(4, shape[1]) * 0.1
        pairs[f"{key}.lora_B.weight"] = torch.randn(shape[0], 4) * 0.1
    save_file(difference | pairs, folder / "lora.safetensors")
    return folder


def loaded(folder, stored=("plain", "disabled"), *, device="cpu:0", copies=None, **options):
    name, option = stored
    path = folder / f"{name}.{'gguf' if name == 'gguf' else 'safetensors'}"
    options = LoadOptions(base_dtype=torch.bfloat16, quantization=option, **options)
    model = load_wan_model(path, options, StandaloneHost(device=device), SYSTEMS)
    if copies is not None:
        model.placement.copies_for = lambda device: copies
    return model


def given(seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(5, tiny.TEXT_DIM, generator=generator)
    return ModelInputs(
        latents=latents.to(device), timestep=torch.tensor([700.0], device=device), text=(text.to(device),)
    )


@torch.no_grad()
def run(model, steps=3, device="cpu"):
    """Forwards of several steps in one run."""
    with model.active() as transformer:
        results = []
        for step in range(steps):
            model.set_step(step)
            results.append(transformer(given(step, device)).cpu())
        return torch.stack(results)


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("kind", [CountedCopies, LateCopies])
@pytest.mark.parametrize("stored", STORED, ids="-".join)
def test_bit_identical_to_resident(folder, stored, kind):
    copies = kind()
    model = loaded(folder, stored, copies=copies)
    want = run(model)
    for blocks, ahead in ((1, 0), (2, 0), (3, 0), (40, 0), (3, 1), (3, 2)):
        swap = BlockSwapArgs(blocks_to_swap=blocks, prefetch_blocks=ahead, embeddings=WITH_TEXT.embeddings)
        assert torch.equal(run(replace(model, block_swap=swap)), want)
    assert copies.copied > 40
    assert torch.equal(run(model), want) and not copies.pinned


@torch.no_grad()
@pytest.mark.parametrize("stored", STORED, ids="-".join)
def test_every_byte_is_accounted_for(folder, stored):
    """During a run the device holds what stays and two slabs, main memory one copy of what waits, exactly."""
    copies, seen = CountedCopies(), []
    model = replace(loaded(folder, stored, copies=copies), block_swap=WITH_TEXT)
    parameters = {name: (id(p), p.dtype, p.shape) for name, p in model.transformer.named_parameters()}
    with model.active() as transformer:
        waiting = [*transformer.blocks, transformer.text_embedding]
        padded = [sum(-(-t.nbytes // 256) * 256 for t in tensors_of(part)) for part in waiting]
        inside = {id(t) for part in waiting for t in tensors_of(part)}
        resident = storages(t for t in tensors_of(transformer) if id(t) not in inside)
        in_slabs = storages(t for t in tensors_of(transformer) if id(t) in inside)
        assert len(in_slabs) == 4 and sorted(in_slabs.values()) == sorted(size + 4096 for size in padded)
        assert sorted(copies.pinned.values()) == sorted(padded)

        def look(module, _):
            now = storages(tensors_of(transformer))
            on_device = now.keys() - resident.keys() - in_slabs.keys()
            own = storages(tensors_of(module))
            seen.append((len(on_device), own.keys() == on_device, copies.bytes_on_device()))

        hooks = [part.register_forward_pre_hook(look) for part in waiting]
        for step in range(3):
            transformer(given(step))
        assert seen == [(1, True, 2 * max(padded))] * 12 and len(copies.slabs) == 2
        for hook in hooks:
            hook.remove()
    assert copies.bytes_on_device() == 0
    assert parameters == {name: (id(p), p.dtype, p.shape) for name, p in model.transformer.named_parameters()}
    model.managed.release()
    assert not copies.pinned and storages(t for t in tensors_of(transformer) if id(t) in inside) == in_slabs


@pytest.mark.parametrize("stored", [("plain", "disabled"), ("plain", "fp8_e4m3fn")], ids="-".join)
@pytest.mark.parametrize("strength", [0.7, (0.0, 0.7, 0.2)], ids=["constant", "by_step"])
@pytest.mark.parametrize("kind", [CountedCopies, LateCopies])
def test_loras_beside(folder, stored, strength, kind):
    copies = kind()
    plain = loaded(folder, stored, copies=copies)
    lora = LoraFile(path=folder / "lora.safetensors", strength=strength, merge=False)
    want, bare = run(with_loras(plain, (lora,))), run(plain)
    assert not torch.equal(want, bare)
    swapped = replace(plain, block_swap=WITH_TEXT)
    assert torch.equal(run(with_loras(swapped, (lora,))), want)
    pinned = sum(copies.pinned.values())
    assert torch.equal(run(swapped), bare) and torch.equal(run(with_loras(swapped, (lora,))), want)
    assert sum(copies.pinned.values()) == pinned and copies.bytes_on_device() == 0
    assert torch.equal(run(plain), bare)


class StopError(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("where", ["block", "text_embedding", "between"])
def test_nothing_is_left_after_an_error(folder, where):
    copies = LateCopies()
    model = replace(loaded(folder, copies=copies), block_swap=WITH_TEXT)
    want, transformer = run(model), model.transformer
    addresses = [p.data_ptr() for p in transformer.blocks.parameters()]
    broken = {"block": transformer.blocks[1].ffn, "text_embedding": transformer.text_embedding[1]}.get(where)

    def fail(*_):
        raise StopError

    hook = None if broken is None else broken.register_forward_pre_hook(fail)
    with pytest.raises(StopError), model.active():
        transformer(given())
        raise StopError
    if hook is not None:
        hook.remove()
    gc.collect()
    assert copies.bytes_on_device() == 0 and not copies.pinned
    assert [p.data_ptr() for p in transformer.blocks.parameters()] == addresses
    assert not transformer.text_embedding._forward_pre_hooks and transformer.visit is contextlib.nullcontext
    assert torch.equal(run(model), want)


def test_loads_unloads_and_cancels_give_everything_back(folder):
    copies, counts = CountedCopies(), [0, 1, 2, 3, 2, 40]
    model = loaded(folder, copies=copies)
    want = run(model)
    for turn in range(20):
        swapped = replace(model, block_swap=replace(WITH_TEXT, blocks_to_swap=counts[turn % len(counts)]))
        assert torch.equal(run(swapped, steps=3), want)
        if turn % 3 == 1:
            with pytest.raises(KeyboardInterrupt), swapped.active():
                raise KeyboardInterrupt
        model.managed.release()
        assert not copies.pinned and copies.bytes_on_device() == 0
    total = sum(t.nbytes for t in tensors_of(model.transformer))
    held = sum(storages(tensors_of(model.transformer)).values())
    assert held < total + 4 * 4096 + 256 * len(tensors_of(model.transformer))


def test_two_models_in_turn(folder):
    """As Wan 2.2 runs them: each has its own slabs, and those on the device only while it runs."""
    copies = CountedCopies()
    models = [loaded(folder, stored, copies=copies) for stored in (STORED[0], STORED[1])]
    want = [run(model) for model in models]
    swapped = [replace(model, block_swap=WITH_TEXT) for model in models]
    assert not torch.equal(*want)
    for _ in range(2):
        for model, wanted in zip(swapped, want, strict=True):
            assert torch.equal(run(model), wanted) and copies.bytes_on_device() == 0
    assert len(copies.pinned) == 2 * 4
    for left, model in zip((4, 0), models, strict=True):
        model.managed.release()
        assert len(copies.pinned) == left


def cancelled(model, random, device):
    """A run that is stopped at the door of some block in some step, or ends."""
    left = random.randrange(10)

    def stop(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError

    hooks = [block.register_forward_pre_hook(stop) for block in model.transformer.blocks]
    with contextlib.suppress(StopError):
        run(model, device=device)
    for hook in hooks:
        hook.remove()


def tensor_bytes():
    gc.collect()
    return sum(storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)).values())


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_twenty_loads_cancels_and_unloads_leave_nothing(device, tmp_path, new_objects):
    """Of a model of 12 MB: what one turn left behind would be 50 MB in twenty, if it were a block."""
    wide = randomize(WanModel(WanConfig(**{**SIZES, "dim": 384, "ffn_dim": 1024, "text_dim": tiny.TEXT_DIM})))
    file = tiny.Tiny(tensors=dict(wide.state_dict()), metadata={"wanvideo.num_heads": "3"})
    file.save(tmp_path / "plain.safetensors", torch.bfloat16)
    del wide, file
    random, models, pinned, sizes = Random(7), [], [], []
    for turn in range(20):
        copies = CountedCopies() if device == "cpu:0" else None
        model = loaded(tmp_path, device=device, copies=copies)
        cancelled(replace(model, block_swap=replace(WITH_TEXT, blocks_to_swap=random.randrange(4))), random, device)
        if turn % 2:
            model.managed.release()
        if copies is not None:
            assert copies.bytes_on_device() == 0 and not (turn % 2 and copies.pinned)
            pinned.append(copies.pinned)
        models.append(weakref.ref(model.transformer))
        del model
        if turn in (1, 19):
            tensors = tensor_bytes()
            trim()
            sizes.append((tensors, 0 if copies else torch.cuda.memory_allocated(), memory("VmRSS")))
    assert not any(model() for model in models) and not any(pinned)
    tensors, allocated, resident = (after - before for before, after in zip(*sizes, strict=True))
    assert abs(tensors) < 2**20 and abs(allocated) < 2**20 and resident < 50e6


@dataclass(frozen=True)
class Extra(Payload):
    needs: ClassVar[str] = "none"


@dataclass(frozen=True)
class OwnBlocks(Extension):
    """Two blocks of its own, each of which runs behind a block of the transformer."""

    payload: ClassVar[type] = Extra

    def build(self, model):
        model.own = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])
        model.own_scale = nn.Parameter(torch.ones(()))

    def stacks(self, model):
        return {"own": model.own}

    def after_block(self, model, index, x, inputs, state):
        if index > 1:
            return x
        with model.visit(model.own[index]):
            return x + model.own_scale * model.own[index](x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CountedCopies, LateCopies])
@pytest.mark.parametrize(("main", "own"), [(0, 2), (2, 1), (3, 2), (3, 0)])
def test_further_block_lists(kind, main, own):
    _, model = build(OwnBlocks())
    steps = [inputs(Extra(), step=step, seed=step) for step in range(4)]
    want = [model(given) for given in steps]
    copies = kind()
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.swap = BlockSwapArgs(blocks_to_swap=main, others={"own": own})
    placement(DEVICE)
    with placement.swapping(DEVICE):
        assert len(placement.waiting_blocks()) == main + own == len(copies.pinned)
        first = model(steps[0])
        missed = copies.misses()
        got = [first, *(model(given) for given in steps[1:])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert copies.misses() <= missed + 1


@pytest.mark.parametrize(
    ("total", "count", "waits"),
    [(4, 0, []), (4, 4, [0, 1, 2, 3]), (4, 40, [0, 1, 2, 3]), (4, 2, [1, 3]), (6, 2, [2, 5]), (3, 2, [1, 2]),
     (8, 6, [1, 2, 3, 5, 6, 7])],
)  # fmt: skip
def test_blocks_that_stay_lie_evenly_among_those_that_wait(total, count, waits):
    blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(total))
    assert [list(blocks).index(block) for block in spread(blocks, count)] == waits


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("staying", [0, 1, 3, 8])
def test_as_many_blocks_wait_as_free_memory_asks_for(staying, ahead):
    """What stays, the slabs and the activations of the run fit, and one block more would not."""
    _, model = build(config=WanConfig(**{**SIZES, "num_layers": 8}))
    placement = Placement(model, CPU)
    placement.work = Work(40_000)
    footprint, slabs = placement.footprint(), max(ahead, 1) + 1
    free = footprint.resident_in_pieces if staying == 8 else footprint.peak(8 - staying, slabs)
    less = {0: None, 1: 0, 3: 2, 8: 7 - slabs}[staying]
    for copies, stay in ((CountedCopies(free=free), staying), (CountedCopies(free=free - 1), less)):
        placement = Placement(model, CPU, copies_for=lambda device, copies=copies: copies)
        placement.work, placement.swap = Work(40_000), BlockSwapArgs(blocks_to_swap=AUTOMATIC, prefetch_blocks=ahead)
        if stay is None:
            with pytest.raises(ValueError, match=r"needs \d+\.\d GB of GPU memory even with all 8 blocks.*smaller"):
                placement(DEVICE)
            continue
        placement(DEVICE)
        # The choice holds while the model is there, whatever else comes.
        copies.left = 0
        placement(DEVICE)
        assert len(placement.waiting_blocks()) == 8 - stay == len(copies.pinned)
        placement(CPU)


def test_what_is_reserved_for_others_is_left_alone():
    _, model = build(config=WanConfig(**{**SIZES, "num_layers": 8}))
    work, reserved = Work(40_000), 10**9
    plain = Placement(model, CPU)
    plain.work = work
    free = plain.footprint().peak(3, 2)
    there = free + reserved
    for kept, left, waiting in ((reserved, there, 3), (reserved, there - 1, 4), (0, there, 0)):
        placement = Placement(model, CPU, reserved=kept, copies_for=lambda device, left=left: CountedCopies(free=left))
        placement.work, placement.swap = work, BlockSwapArgs(blocks_to_swap=AUTOMATIC, prefetch_blocks=1)
        placement(DEVICE)
        assert len(placement.waiting_blocks()) == waiting
        placement(CPU)


@pytest.mark.parametrize(("share", "waiting"), [(0.0, 0), (0.01, 2), (0.5, 3), (0.6, 4), (1.0, 5)])
def test_a_share_is_of_every_list_and_the_whole_of_the_embeddings_too(share, waiting):
    _, model = build(OwnBlocks())
    copies = CountedCopies()
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.swap = BlockSwapArgs(share=share)
    placement(DEVICE)
    assert len(placement.waiting_blocks()) == waiting
    assert len(copies.pinned) == waiting + 2 * (share == 1)


@pytest.mark.parametrize(("waiting", "short", "pieces"), [(0, False, False), (0, True, True), (1, False, True)])
def test_tokens_run_in_pieces_where_blocks_wait_or_memory_is_short(waiting, short, pieces):
    _, model = build()
    copies = CountedCopies()
    copies.measures = True
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.work, placement.swap = Work(40_000), BlockSwapArgs(blocks_to_swap=waiting)
    copies.left = placement.footprint().all_at_once + WORKSPACES - short
    placement(DEVICE)
    assert placement.at_once == (AT_ONCE if pieces else 0)


def test_a_device_that_does_not_tell_its_free_memory_is_named(folder):
    model = replace(loaded(folder), block_swap=BlockSwapArgs(blocks_to_swap=AUTOMATIC))
    with pytest.raises(ValueError, match="'cpu:0' cannot be measured.*give a number"):
        run(model)


def test_without_room_to_pin_there_is_one_notice(folder, caplog):
    copies = LateCopies(pins=False)
    model = loaded(folder, copies=copies)
    want = run(model)
    for _ in range(3):
        assert torch.equal(run(replace(model, block_swap=WITH_TEXT)), want)
        model.managed.release()
    assert [r.getMessage().count("refuses to pin the memory of 4 of 4") for r in caplog.records].count(1) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks(folder, backend):
    torch._dynamo.reset()
    copies = LateCopies()
    args = CompileArgs(backend=backend, fullgraph=True)
    model = loaded(folder, copies=copies, compile=args)
    want = run(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for blocks in (3, 2, 0):
        assert torch.equal(run(replace(model, block_swap=replace(WITH_TEXT, blocks_to_swap=blocks))), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_debug_logs_each_copy(folder, caplog):
    caplog.set_level("INFO", logger="wanvideo")
    copies = CountedCopies()
    swap = replace(ALL, block_swap_debug=True)
    run(replace(loaded(folder, copies=copies), block_swap=swap))
    assert sum("MB to the GPU" in record.getMessage() for record in caplog.records) == copies.copied > 0


def on_cuda(folder, stored, **options):
    return loaded(folder, stored, device="cuda", **options)


@pytest.mark.cuda
@pytest.mark.sm89
@pytest.mark.parametrize("stored", STORED + FAST, ids="-".join)
def test_bit_identical_on_cuda(folder, stored):
    model = on_cuda(folder, stored)
    want = run(model, device="cuda")
    for blocks, ahead in ((1, 0), (2, 0), (3, 0), (3, 2)):
        swap = BlockSwapArgs(blocks_to_swap=blocks, prefetch_blocks=ahead, embeddings=WITH_TEXT.embeddings)
        assert torch.equal(run(replace(model, block_swap=swap), device="cuda"), want)
    units = list(model.placement._units.values())
    assert units and all(unit.pinned for unit in units)
    model.managed.release()
    assert not any(p.is_cuda for p in model.transformer.parameters()) and not any(unit.pinned for unit in units)


def synchronizations(call):
    """How often the host waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("strength", [None, 0.7, (0.0, 0.7, 0.2)])
def test_the_host_waits_no_more_often_than_for_a_resident_model(folder, strength):
    model = on_cuda(folder, ("plain", "disabled"))
    files = () if strength is None else (LoraFile(path=folder / "lora.safetensors", strength=strength, merge=False),)
    model, steps, counts = with_loras(model, files), [given(step, "cuda") for step in range(4)], []
    for swap in (None, WITH_TEXT):
        counts.append([])
        swapped = replace(model, block_swap=swap)
        with swapped.active() as transformer:
            assert {p.is_cuda for block in transformer.blocks for p in block.parameters()} == {swap is None}
            for step in range(4):
                swapped.set_step(step)
                counts[-1].append(synchronizations(lambda step=step: transformer(steps[step])))
    # The first forward waits for what is cached then, such as the table of positions.
    assert all(swapped <= resident for resident, swapped in zip(*counts, strict=True))


class Heavy(nn.Module):
    """A block whose product takes longer than its copy."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        for _ in range(16):
            x = self.layer(x).tanh()
        return x


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("pins", [True, False])
def test_copies_run_beside_the_computation_in_two_slabs(pins, monkeypatch):
    from wanvideo_wrapper.wanvideo.device_copies import CudaCopies
    from wanvideo_wrapper.wanvideo.host_slabs import Unit
    from wanvideo_wrapper.wanvideo.swapper import Swapper

    device = torch.device("cuda", torch.cuda.current_device())
    if not pins:
        monkeypatch.setattr(CudaCopies, "pin", lambda self, memory: False)
    blocks, x = [Heavy(4096) for _ in range(6)], torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
    copies, units = CudaCopies(device), [Unit(block) for block in blocks]
    for unit in units:
        unit.gather(copies)
    assert all(unit.pinned for unit in units) == pins
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    swapper = Swapper(units, copies)
    assert torch.cuda.memory_allocated() - base <= 2 * (units[0].nbytes + 2**21)

    def forward(visit):
        y = x
        for block in blocks:
            with visit(block):
                y = block(y)
        return y

    # From pageable memory the driver copies by way of its own, which the host waits for, but torch does not know.
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(swapper.visit)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def timed(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        results = [call() for _ in range(3)]
        end.record()
        end.synchronize()
        return results, start.elapsed_time(end)

    swapped, took = timed(lambda: forward(swapper.visit))
    swapper.close()
    for unit in units:
        unit.release()
    torch.cuda.synchronize()
    for block in blocks:
        block.to(device)
    want, alone = timed(lambda: forward(contextlib.nullcontext))
    assert all(torch.equal(a, b) for a, b in zip(swapped, want, strict=True))
    # The copies alone take longer than that allows: 6 x 32 MB a forward beside 6 x 16 products.
    assert took < 1.15 * alone


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (1.0, r"with [123] of 3 blocks swapped \(WanVideoBlockSwap, blocks_to_swap [123]\) it would fit\.$"),
        (0.4, r"even with all 3 blocks swapped it takes \d\.\d GB: make the video smaller or shorter, to \d+% of its"),
    ],
)
def test_without_memory_one_sentence_says_what_would_fit(folder, room, says):
    copies = CountedCopies()
    copies.measures = True
    model = loaded(folder, copies=copies)
    large = Work(2_000_000)
    model.placement.work = large
    footprint = model.placement.footprint()
    copies.left = int(footprint.peak(3) * room) + 1
    said = rf"^The GPU ran out of memory: .* run of 2000000 tokens.*{says}"
    with pytest.raises(torch.OutOfMemoryError, match=said), model.active(large):
        raise torch.OutOfMemoryError("no room")
    assert copies.bytes_on_device() == 0 and not copies.pinned


@pytest.mark.cuda
@torch.no_grad()
def test_loads_unloads_and_cancels_give_device_memory_back(folder):
    model, steps = on_cuda(folder, ("plain", "disabled")), [given(step, "cuda") for step in range(3)]
    swapped, after = replace(model, block_swap=WITH_TEXT), []
    for turn in range(20):
        with contextlib.suppress(StopError), swapped.active() as transformer:
            slabs = 2 * max(sum(-(-t.nbytes // 256) * 256 for t in tensors_of(b)) for b in transformer.blocks)
            stays = sum(t.nbytes for t in tensors_of(transformer) if t.is_cuda)
            assert stays == sum(t.nbytes for t in tensors_of(transformer)) - sum(
                t.nbytes for part in (*transformer.blocks, transformer.text_embedding) for t in tensors_of(part)
            )
            if turn == 5:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            for step in steps[: turn % 4]:
                transformer(step)
            if turn == 5:
                # Two slabs are there already; the rest is activations of a tiny video.
                assert before >= stays + slabs and torch.cuda.max_memory_allocated() - before < 2**25
            raise StopError
        model.managed.release()
        torch.cuda.synchronize()
        after.append(torch.cuda.memory_allocated())
    assert max(after[1:]) - min(after[1:]) < 2**20
    assert not any(p.is_cuda for p in transformer.parameters())
    assert not any(unit.pinned for unit in model.placement._units.values())


def test_the_plain_copies_are_in_order():
    copies = OrderedCopies(DEVICE)
    target, source = torch.zeros(4), torch.randn(4)
    copies.copy([(target, source)], after=copies.event(), done=copies.event())
    assert torch.equal(target, source)


@pytest.mark.parametrize("stays", [False, True])
def test_a_model_that_stays_on_the_device_leaves_main_memory(folder, stays, monkeypatch):
    monkeypatch.setattr(Staging, "copy", lambda self, source: source.clone())
    model = loaded(folder, keep_on_device=stays)
    if not stays:
        model.managed.acquire()
    weights = list(model.transformer.parameters())
    there = [weight.data_ptr() for weight in weights]
    model.managed.release()
    same = {weight.data_ptr() == address for weight, address in zip(weights, there, strict=True)}
    assert same == {stays}, "Memory outside the device that was given up cannot be where the weights return to."


@dataclass(frozen=True)
class Nested(Extension):
    """A list of blocks within a module of its own, beside other weights."""

    payload: ClassVar[type] = Payload

    def build(self, model):
        model.outer = nn.Module()
        model.outer.inner, model.outer.other = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 4)

    def stacks(self, model):
        return {"outer.inner": model.outer.inner}


def test_what_waits_within_a_module_does_not_come_with_it():
    _, model = build(Nested())
    placement = Placement(model, CPU, copies_for=lambda device: CountedCopies())
    placement.swap = BlockSwapArgs(blocks_to_swap=1, others={"outer.inner": 2})
    placement(DEVICE)
    units = placement._units
    assert len([block for block in model.outer.inner if block in units]) == 2 and len(units) == 3
    assert all(len(unit.layout()) == len(unit.tensors()) > 0 for unit in units.values())
