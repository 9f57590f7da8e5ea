"""A text encoder on a GPU that is too small for it: its blocks go there one at a time, and it says the same."""

import pytest
import torch
from swap_stand_in import DEVICE, CountedCopies
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, residence
from wanvideo_wrapper.wanvideo import streaming
from wanvideo_wrapper.wanvideo.device_copies import CudaCopies
from wanvideo_wrapper.wanvideo.modules import t5

PROMPTS = ["a person talks to the camera", "soft light"]


@pytest.fixture
def encoder(tmp_path):
    tiny.text_encoder().save(tmp_path / "t5.safetensors", torch.float32)
    return t5.load_text_encoder(
        tmp_path / "t5.safetensors", dtype=torch.float32, host=StandaloneHost(models=tmp_path, device=str(DEVICE))
    )


def sized(monkeypatch, free):
    """Another name for the CPU gets copies, as a device with so many free bytes would."""
    copies = CountedCopies(free=free)
    copies.measures = True
    monkeypatch.setattr(streaming, "copies_for", lambda device: copies)
    monkeypatch.setattr(residence.Staging, "copy", lambda self, source: source.clone())


def addresses(module):
    return {tensor.data_ptr() for tensor in residence.tensors_of(module)}


def watch(model, homes):
    """Notes how many of a block's tensors are away from home as each block runs, the running block's own first."""
    seen, blocks = [], list(model.encoder.block)

    def look(block, _):
        away = [len(addresses(each) - homes) for each in sorted(blocks, key=lambda each: each is not block)]
        seen.append(away)

    # Behind the hooks that bring a block.
    for block in blocks:
        block.layer[0].register_forward_pre_hook(lambda _, args, block=block: look(block, args))
    return seen


@pytest.mark.parametrize("room", [-1, 0])
def test_blocks_come_one_at_a_time_where_not_all_fit(encoder, room, monkeypatch, caplog):
    want, model = encoder.encode(PROMPTS, device=torch.device("cpu")), encoder.managed.module
    homes, size = addresses(model), sum(tensor.nbytes for tensor in residence.tensors_of(model))
    # What else is on the device is never read from main memory.
    rest = addresses(model) - addresses(model.encoder.block)
    sized(monkeypatch, size + streaming.HEADROOM + room)
    caplog.set_level("INFO", logger="wanvideo")
    seen = watch(model, homes)
    got = encoder.encode(PROMPTS)
    assert all(map(torch.equal, got, want)) and not addresses(model) & rest
    count = len(residence.tensors_of(model.encoder.block[0]))
    here, elsewhere = (count, 0) if room else (count, count)
    assert seen == [[here, elsewhere]] * 4
    assert addresses(model.encoder.block) <= homes if room else not addresses(model) & homes
    assert ("blocks go there one at a time" in caplog.text) == bool(room)
    encoder.managed.release()
    assert addresses(model) == homes
    assert all(map(torch.equal, encoder.encode(PROMPTS, device=torch.device("cpu")), want))


def test_a_block_goes_home_after_an_error(encoder, monkeypatch):
    model = encoder.managed.module
    homes = addresses(model)
    sized(monkeypatch, 0)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.encoder.block[1].layer[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(PROMPTS)
    hook.remove()
    assert addresses(model.encoder.block) <= homes
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.encoder.block)


@pytest.mark.cuda
def test_free_memory_is_what_torch_may_take():
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(0.1, device)
    try:
        held = torch.empty(2**24, dtype=torch.uint8, device=device)
        want = total // 10 - torch.cuda.memory_allocated(device)
        assert abs(CudaCopies(torch.device("cuda")).free() - want) < 2**21
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
    assert held.is_cuda
