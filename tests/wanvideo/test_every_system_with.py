"""Every system with what changes how a model runs: waiting blocks, LoRAs, a step cache, windows."""

from dataclasses import replace

import pytest
import torch
from contract import ALL_CASES, inputs, randomize
from safetensors.torch import save_file
from swap_stand_in import DEVICE, LateCopies
from torch import nn
from wanvideo_wrapper.cache_methods.teacache import TeaCache
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat_avatar.extension import LongCatAvatar
from wanvideo_wrapper.ovi.extension import Ovi
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs, Placement
from wanvideo_wrapper.wanvideo.conditioning import Step, Window
from wanvideo_wrapper.wanvideo.guidance import Conditions
from wanvideo_wrapper.wanvideo.loading import quantizable
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.lora.beside import beside
from wanvideo_wrapper.wanvideo.memory import Work, footprint_of
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs
from windowed import LEAST, blended, denoisers, windowed

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=ALL_CASES.values(), ids=ALL_CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return randomize(WanModel(case.config, (case.extension,)))


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_waiting_blocks(case, model):
    """Of every list, and the embeddings: equal to the bit, and nothing stays on the device."""
    copies = LateCopies()
    given = [inputs(case.at_step(step), step=step) for step in range(2)]
    want = [model(each) for each in given]
    placement = Placement(model, CPU, copies_for=lambda device: copies)
    placement.swap = BlockSwapArgs(share=1.0)
    placement(DEVICE)
    with placement.swapping(DEVICE):
        got = [model(each) for each in given]
    assert all(map(torch.equal, got, want))
    blocks = sum(map(len, model.stacks().values()))
    assert copies.copied >= 2 * blocks and copies.bytes_on_device() == 0


@torch.no_grad()
def test_a_step_that_teacache_leaves_out(case, model):
    """With the same inputs it is the step before."""
    memory, ran = TeaCache(threshold=1.0, use_coefficients=False).maker(None)(CPU), []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    given = [replace(inputs(case.payload), step=Step(index=2, total=8, in_run=place)) for place in (2, 3)]
    first, second = (model(each, memory) for each in given)
    hook.remove()
    assert len(ran) == 1 and memory.skipped == [3]
    assert (second - first).norm() < 1e-5 * first.norm()


# Each is made in one piece: its parts are longer runs, given frames and sound.
IN_ONE_PIECE = (LongCat, LongCatAvatar, Ovi)
# Of three latent frames, the first two and the last two, and how much each counts. A window's first latent frame is one
# pixel frame.
OVERLAPPING = (
    (Window((0, 1), (0, 1, 2, 3, 4), total=3), (1.0, 1.0)),
    (Window((1, 2), (4, 5, 6, 7, 8), total=3), (LEAST, 1.0)),
)
# Behind a reference, one latent frame each.
BEHIND = (
    (Window((0, 1), (0,), leading=1, total=3), (1.0, 1.0)),
    (Window((0, 2), (4,), leading=1, total=3), (1.0, 1.0)),
)


@torch.no_grad()
def test_context_windows(case, model):
    """The velocity of two windows is that of their frames alone, each under its part of the payload."""
    prompt, latents, time = rand(4, 8, seed=1), rand(16, 3, 4, 4, seed=2), torch.tensor(731.0)
    video, step = (case.video or case.payload).fitted(case.config), Step(index=2, total=8, in_run=2)
    conditions = Conditions(positive=prompt, payloads=(video,))
    velocity = windowed(conditions, denoisers(model), size=1 if case.leading else 5, leading=case.leading)
    if isinstance(case.extension, IN_ONE_PIECE):
        with pytest.raises(ValueError, match="disconnect .*context"):
            velocity(latents, time, step)
        return
    parts = []
    for window, shares in BEHIND if case.leading else OVERLAPPING:
        part = video.window(window)
        given = ModelInputs(
            latents=latents[None, :, list(window.latents)], timestep=time[None], text=(prompt,), prompts=(prompt,),
            payloads=() if part is None else (part,), step=step,
        )  # fmt: skip
        parts.append((window.latents, shares, model(given)[0]))
    torch.testing.assert_close(velocity(latents, time, step), blended(parts, 3))


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "windows"])
@pytest.mark.parametrize("size", [(6, 4, 4), (3, 6, 4)], ids=["longer", "higher"])
def test_a_video_of_another_size_runs_or_is_refused_in_a_sentence(case, model, size, whole):
    """What was encoded for three latent frames of 4x4 meets another video: torch itself never has to refuse."""
    video, leading = (case.video or case.payload).fitted(case.config), case.leading
    latents, step = rand(16, *size, seed=2), Step(index=2, total=8, in_run=2)
    try:
        part = video.window(whole_window(size[0], leading)) if whole else video
        conditions = Conditions(positive=rand(4, 8, seed=1), payloads=() if part is None else (part,))
        make = denoisers(model)
        denoiser = make(conditions) if whole else windowed(conditions, make, size=5, leading=leading)
        velocity = denoiser(latents, torch.tensor(731.0), step)
    except ValueError as error:
        assert str(error).endswith(".")
    else:
        assert velocity.shape == latents.shape and velocity.isfinite().all()


def test_its_memory_is_counted(model):
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert footprint_of(model, Work(12)).peak(0) > weights


@torch.no_grad()
def test_a_lora_beside_all_layers_equals_one_in_the_weights(case, model, tmp_path):
    given, pairs, sums = inputs(case.payload), {}, {}
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and quantizable(model, name)]
    for seed, name in enumerate(layers):
        weight = model.get_submodule(name).weight
        down, up = rand(2, weight.shape[1], seed=seed) * 0.5, rand(weight.shape[0], 2, seed=1000 + seed) * 0.5
        pairs |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        sums[name] = weight + 0.7 * up @ down
    save_file(pairs, tmp_path / "lora.safetensors")
    plain = model(given)
    with beside(model, [LoraFile(path=tmp_path / "lora.safetensors", strength=0.7, merge=False)], CPU, torch.float32):
        got = model(given)
    assert torch.equal(model(given), plain)
    for name, weight in sums.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    want = model(given)
    assert (want - plain).norm() > 2e-4 * plain.norm() and (got - want).norm() < 1e-5 * want.norm()
