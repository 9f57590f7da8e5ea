"""Control LoRAs: a text-to-video model reads a control video, and changes only in the steps that have one."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import STEPS, Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fun_control.extension import ControlSignal
from wanvideo_wrapper.host import get_host
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model, with_loras
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.lora.beside import Beside
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, RANK, STRENGTH = 3, 4, 0.7
LAYER = "blocks.1.self_attn.q"


def rand(*shape, scale=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


VIDEO = rand(1, 16, FRAMES, 4, 4, scale=1)
TENSORS = {
    "diffusion_model.patch_embedding.lora_A.weight": rand(RANK, 32 * 4),
    "diffusion_model.patch_embedding.lora_B.weight": rand(128, RANK),
    f"diffusion_model.{LAYER}.lora_A.weight": rand(RANK, 128),
    f"diffusion_model.{LAYER}.lora_B.weight": rand(128, RANK) * 0.5,
}


@pytest.fixture
def runs(tmp_path):
    path = tmp_path / "loras/control.safetensors"
    path.parent.mkdir()
    save_file(TENSORS, path)
    with Runs(tmp_path) as runs:
        yield runs


def load(folder, *files, **options):
    path = folder / "diffusion_models/t2v.safetensors"
    return load_wan_model(path, LoadOptions(base_dtype=torch.float32, loras=files, **options), get_host(), SYSTEMS)


def control(folder, **more):
    return LoraFile(path=folder / "loras/control.safetensors", strength=STRENGTH, **more)


def inputs(latents, *payloads, step=0):
    return ModelInputs(
        latents=latents, timestep=torch.tensor([600.0]), text=(rand(5, 64),), payloads=payloads,
        step=Step(index=step, total=STEPS),
    )  # fmt: skip


def by_hand(base, strength):
    """The base model with the changes added in float64, its patch embedding reading 32 channels."""
    model = WanModel(replace(base.config, in_dim=32))
    state = {name: value.detach().double() for name, value in base.state_dict().items()}
    old = state["patch_embedding.weight"]
    patch = torch.zeros(128, 32, 1, 2, 2, dtype=torch.float64)
    patch[:, :16] = old
    down, up = (TENSORS[f"diffusion_model.patch_embedding.lora_{side}.weight"].double() for side in "AB")
    state["patch_embedding.weight"] = patch + strength * (up @ down).view_as(patch)
    down, up = (TENSORS[f"diffusion_model.{LAYER}.lora_{side}.weight"].double() for side in "AB")
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"] + strength * up @ down
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
def test_reads_the_control_video_within_its_steps_and_is_the_base_model_outside(runs, tmp_path, merge):
    model, base = load(tmp_path, control(tmp_path, merge=merge)), load(tmp_path)
    assert model.config == replace(base.config, in_dim=32) and not model.loras[0].merge
    latents = rand(1, 16, FRAMES, 4, 4, scale=1)
    signal = ControlSignal(VIDEO, start=0.0, end=0.5)
    with model.active() as transformer, base.active() as plain:
        model.set_step(1)
        got = transformer(inputs(latents, signal, step=1))
        want = by_hand(plain, STRENGTH)(inputs(torch.cat((latents, VIDEO), 1)))
        assert (got - want).norm() / want.norm() < 1e-5
        model.set_step(3, filled=False)
        got, want = transformer(inputs(latents, signal, step=3)), plain(inputs(latents))
        assert (got - want).norm() / want.norm() < 1e-6


def test_the_sampler_switches_it_off_outside_its_range(runs, tmp_path, monkeypatch):
    runs.model, strengths = load(tmp_path, control(tmp_path)), []

    def noting(self, *args, **more):
        set_step(self, *args, **more)
        strengths.append(self._now[0])

    set_step = Beside.set_step
    monkeypatch.setattr(Beside, "set_step", noting)
    for start, end, want in [(0.0, 1.0, [1, 1, 1, 1]), (0.0, 0.5, [1, 1, 1, 0]), (0.6, 1.0, [0, 0, 0, 1])]:
        (embeds,) = N["WanVideoControlEmbeds"]().process({"samples": VIDEO}, start, end)
        strengths.clear()
        assert runs.sample(image_embeds=embeds).isfinite().all()
        assert strengths == [STRENGTH * on for on in want]


def test_a_range_without_steps_is_the_base_model(runs, tmp_path):
    plain = runs.sample(frames=9)
    runs.model = load(tmp_path, control(tmp_path))
    (embeds,) = N["WanVideoControlEmbeds"]().process({"samples": VIDEO}, 0.9, 0.95)
    assert torch.allclose(runs.sample(image_embeds=embeds), plain, atol=1e-5)


def test_where_it_cannot_work_is_said(runs, tmp_path):
    base = load(tmp_path)
    with pytest.raises(ValueError, match=r"control.safetensors is a control LoRA.*connect it to WanVideoModelLoader"):
        with_loras(base, (control(tmp_path, merge=False),))
    widest = {**TENSORS, "diffusion_model.patch_embedding.lora_A.weight": rand(RANK, 48 * 4)}
    save_file(widest, tmp_path / "loras/wider.safetensors")
    other = LoraFile(path=tmp_path / "loras/wider.safetensors")
    with pytest.raises(ValueError, match=r"control.safetensors reads 32 channels but wider.safetensors 48"):
        load(tmp_path, control(tmp_path), other)
    tiny.transformer(in_dim=36).save(tmp_path / "diffusion_models/t2v.safetensors")
    with pytest.raises(ValueError, match=r"reads 48 channels where this model reads 36 already"):
        load(tmp_path, other)


def test_a_layer_filter_leaves_the_model_as_wide_as_it_is(runs, tmp_path):
    model = load(tmp_path, control(tmp_path, skip_layers=("patch_embedding",), merge=False))
    assert model.config.in_dim == 16 and not model.loras[0].widens
