"""Both towers against a float64 form, files of both shapes, and a run against the published loop."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract import SIZES, build, inputs
from tiny_runs import prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.ovi.extension import FusedText, Ovi
from wanvideo_wrapper.ovi.run import SoundRun
from wanvideo_wrapper.ovi.stream import OviSound, OviText, SoundStream
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.slg.extension import SkippedBlocks
from wanvideo_wrapper.wanvideo.conditioning import Row, Step, Window
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.request import TextEmbeds
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.tokens import ModelInputs, Text

spec = importlib.util.spec_from_file_location("ovi_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

OVI = Ovi(channels=20, hidden=8, kernel=7)
NO_TEXT = frozenset({"text"})
STEPS, LENGTH = 3, 6


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("times", [(500.0,) * 3, (0.0, 500.0, 500.0)])
@pytest.mark.parametrize("missing", [frozenset(), NO_TEXT])
def test_both_velocities_are_those_of_the_float64_form(times, missing):
    _, model = build(OVI)
    audio, avoided = torch.randn(LENGTH, 20), torch.randn(3, 8)
    stream = SoundStream(audio)
    given = inputs(OviSound(stream, (avoided,), missing))
    if len(set(times)) > 1:
        given = type(given)(**{**given.__dict__, "timestep": torch.tensor([times])})
    got = model(given)[0]
    towers = reference.Towers(model.state_dict(), SIZES["num_heads"], SIZES["text_len"])
    heard = avoided if missing else given.text[0]
    video, sound = towers(given.latents[0], audio, torch.tensor(times), given.text[0], heard)
    assert relative(got, video) < 1e-5
    assert relative(stream.velocities[missing][0], sound) < 1e-5


def test_blocks_that_are_skipped_are_skipped_in_both_towers():
    slg = next(e for e in SYSTEMS.extensions if e.__name__ == "SkipLayerGuidance")
    _, model = build(slg(), OVI)
    stream = SoundStream(torch.randn(LENGTH, 20))
    given = inputs(SkippedBlocks((1,), unprompted=True), OviSound(stream))
    got = model(given)[0]
    towers = reference.Towers(model.state_dict(), SIZES["num_heads"], SIZES["text_len"])
    video, sound = towers(given.latents[0], stream.audio, torch.tensor([500.0] * 3), *given.text * 2, skip=(1,))
    assert relative(got, video) < 1e-5 and relative(stream.velocities[frozenset()][0], sound) < 1e-5


def test_lengths_hide_what_stands_behind_them():
    _, model = build(OVI)
    cross, q = model.blocks[0].cross_attn, torch.randn(2, 4, 2, 12)
    target, ropes = torch.randn(2, 7, 24), [model.rope((1, 1, n)) for n in (4, 7)]
    text = Text(torch.randn(2, 4, 24))
    short = FusedText(text, target[:, :5], ropes[0], ropes[1][:5]).attend(cross, q)
    torch.testing.assert_close(FusedText(text, target, *ropes, (5, 5)).attend(cross, q), short)
    assert not torch.allclose(FusedText(text, target, *ropes).attend(cross, q), short)


@pytest.mark.parametrize(
    ("text", "own", "want"), [(5.0, None, 4.0), (4.0, None, 4.0), (5.0, (3.0,), 3.0), (0.5, (9.0, 7.0, 8.0), 7.0)]
)
def test_sound_has_a_scale_of_its_own(text, own, want):
    cond, uncond = torch.randn(1, 4, 20), torch.randn(1, 4, 20)
    stream = SoundStream(torch.randn(4, 20), own, {frozenset(): cond, NO_TEXT: uncond})
    stream.guide((Row(text), Row(1 - text, NO_TEXT)), Step(in_run=1))
    torch.testing.assert_close(stream.velocity, (uncond + want * (cond - uncond))[0])
    stream.guide((Row(1.0),), Step())
    assert torch.equal(stream.velocity, cond[0])


def test_parts_of_the_video_are_refused():
    with pytest.raises(ValueError, match="in one piece"):
        OviSound(SoundStream(torch.randn(4, 20))).window(Window((0, 1), (0, 1, 2, 3, 4)))


def test_passes_with_other_texts_do_not_share_a_forward():
    sound = OviSound(SoundStream(torch.randn(4, 20)))
    with pytest.raises(ValueError, match="batched_cfg"):
        sound.stack([sound.without(NO_TEXT)])
    assert sound.stack([sound]) is sound


class Models:
    """A tiny Ovi as its authors' file, and as the two files of the halves."""

    def __init__(self, folder, layers=2):
        self.folder = folder / "diffusion_models"
        whole = tiny.transformer(in_dim=48, out_dim=48, extensions=(OVI,), layers=layers)
        self.tensors = whole.tensors
        halves = [
            {k: v for k, v in whole.tensors.items() if k.startswith("audio_model.") is wanted}
            for wanted in (False, True)
        ]
        authors = {self.authors_name(k): v for k, v in whole.tensors.items()}
        for name, tensors in (("whole", authors), ("video", halves[0]), ("audio", halves[1])):
            tiny.Tiny(tensors=tensors, metadata=whole.metadata).save(self.folder / f"{name}.safetensors", torch.float32)

    @staticmethod
    def authors_name(key):
        key = key if key.startswith("audio_model.") else f"video_model.{key}"
        return key.replace(".modulation", ".modulation.modulation") if ".blocks." in key else key

    def load(self, name, *modules, device="cpu", dtype=torch.float32, **options):
        files = tuple(ModuleFile(self.folder / f"{module}.safetensors") for module in modules)
        options = LoadOptions(base_dtype=dtype, modules=files, **options)
        return load_wan_model(self.folder / f"{name}.safetensors", options, StandaloneHost(device=device), SYSTEMS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ovi")
    before = get_host()
    set_host(StandaloneHost(models=folder, device="cpu"))
    yield Models(folder)
    set_host(before)


def test_files_of_both_shapes_are_one_model(models):
    whole, halves = models.load("whole"), models.load("video", "audio")
    state = whole.transformer.state_dict()
    assert set(state) == set(models.tensors) and not whole.report.unused and not halves.report.unused
    for name, value in halves.transformer.state_dict().items():
        assert torch.equal(value, models.tensors[name]) and torch.equal(value, state[name])


def test_halves_alone_are_refused(models):
    with pytest.raises(ValueError, match="video's half of Ovi: connect the audio half by WanVideoExtraModelSelect"):
        models.load("video")
    with pytest.raises(ValueError, match="Ovi audio module, not a Wan transformer; load it with 'WanVideo Extra Model"):
        models.load("audio")


def embeds(scale=2.0, negative=True):
    text = TextEmbeds(positive=(prompt(1),), negative=(prompt(0),))
    avoided = TextEmbeds(positive=(prompt(2),)) if negative else None
    return N["WanVideoOviCFG"]().process(text, scale, avoided)[0]


def sample(model, **options):
    (image,) = N["WanVideoEmptyEmbeds"]().process(9, 64, 64)
    settings = dict(steps=STEPS, cfg=3.0, shift=5.0, seed=1, force_offload=True, scheduler="unipc")
    settings |= {"riflex_freq_index": 0, "text_embeds": embeds(), **options}
    return N["WanVideoSampler"]().process(model, image, **settings)[0]


@torch.no_grad()
@pytest.mark.parametrize(("scheduler", "steps", "share"), [("unipc", STEPS, 1), ("rcm", 1, 120 / 121)])
def test_a_run_is_the_published_loop(models, scheduler, steps, share):
    """Two solvers side by side, a guidance scale for each stream, one forward for both.

    share: of noise that both begin with.
    """
    model = models.load("whole")
    (length,) = N["WanVideoEmptyMMAudioLatents"]().decode(LENGTH)
    got = sample(model, samples=length, scheduler=scheduler, steps=steps)
    towers = reference.Towers(models.tensors, 2, 512)
    generator = torch.Generator().manual_seed(1)
    video, sound = (share * torch.randn(*size, generator=generator) for size in ((48, 3, 4, 4), (LENGTH, 20)))
    solvers = [make_schedule(ScheduleSpec(name=scheduler, steps=steps, shift=5.0)).fresh() for _ in range(2)]
    for index, time in enumerate(solvers[0].timesteps):
        times = time.expand(3)
        cond = towers(video, sound, times, prompt(1), prompt(1))
        uncond = towers(video, sound, times, prompt(0), prompt(2))
        velocities = [u + scale * (c - u) for c, u, scale in zip(cond, uncond, (3.0, 2.0), strict=True)]
        video, sound = (
            solver.step(v.float(), index, x, torch.Generator())
            for solver, v, x in zip(solvers, velocities, (video, sound), strict=True)
        )
    assert relative(got["samples"][0], video) < 1e-4
    assert relative(got["latent_ovi_audio"][0].T, sound) < 1e-4


def test_sound_of_other_lengths_and_of_its_own_start(models):
    model = models.load("whole")
    assert sample(model, cfg=1.0)["latent_ovi_audio"].shape == (1, 20, 157)
    first = sample(model, cfg=1.0, end_step=1, samples={"latent_ovi_audio": torch.zeros(LENGTH, 20)})
    second = sample(model, cfg=1.0, start_step=1, samples=first, scheduler="euler")
    assert second["latent_ovi_audio"].shape == (1, 20, LENGTH) and second["latent_ovi_audio"].isfinite().all()
    given = torch.randn(1, 20, LENGTH)
    (joined,) = N["WanVideoAddOviAudioToLatents"]().decode(
        {"samples": torch.randn(1, 48, 3, 4, 4)}, {"latent_ovi_audio": given}
    )
    kept = sample(model, cfg=1.0, samples=joined, start_step=2)
    assert (kept["latent_ovi_audio"] - given).abs().max() < (given - torch.randn(1, 20, LENGTH)).abs().max()
    with pytest.raises(ValueError, match="where this model has 20 channels"):
        sample(model, samples={"latent_ovi_audio": torch.randn(1, 21, LENGTH)})


def test_sound_that_is_given_is_as_noisy_as_the_model_is_told():
    schedule, given = make_schedule(ScheduleSpec(name="unipc", steps=7, shift=5.0, start_step=3)), torch.randn(1, 20, 6)
    told = float(schedule.timesteps[0]) / 1000
    assert told < float(schedule.sigmas[0]) - 1e-4
    request = SimpleNamespace(samples={"latent_ovi_audio": given}, schedule=schedule, noises_samples=True)
    drawn, seeded = (torch.Generator().manual_seed(3) for _ in range(2))
    want = told * torch.randn(6, 20, generator=seeded) + (1 - told) * given[0].T
    torch.testing.assert_close(SoundRun(20)._start(request, drawn), want, rtol=0, atol=1e-6)


def test_guidance_of_sound_on_a_model_without_it_says_so(models, caplog):
    tiny.transformer(in_dim=48, out_dim=48).save(models.folder / "plain.safetensors", torch.float32)
    result = sample(models.load("plain"))
    assert "latent_ovi_audio" not in result and "makes no sound, so that WanVideoOviCFG has no effect" in caplog.text


def test_the_node_of_guidance(caplog):
    text = embeds(3.0, negative=False)
    assert text.payloads == (OviText(text.positive, (3.0,)),)
    (again,) = N["WanVideoOviCFG"]().process(text, [5.0, 2.0])
    assert [p.scales for p in again.payloads] == [(5.0, 2.0)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])])
@pytest.mark.parametrize(("quantization", "tolerance"), [("fp8_e4m3fn_fast", 0.1), ("fp4_scaled", 0.3)])
def test_quantized_blocks(models, quantization, tolerance, device, monkeypatch):
    """For a memory checker, too: two blocks of both towers.

    Of six tokens of sound the error is a third more or less from draw to draw, of sixteen draws a twentieth.
    """
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    draws = [(torch.randn(1, 48, 3, 8, 8), torch.randn(LENGTH, 20)) for _ in range(16)]

    def velocities(transformer, device, dtype, latents, audio):
        stream = SoundStream(audio)
        given = ModelInputs(
            latents=latents.to(device), timestep=torch.tensor([600.0], device=device),
            text=(prompt(1).to(device, dtype),), payloads=(OviSound(stream),),
        )  # fmt: skip
        return transformer(given).cpu(), stream.velocities[frozenset()].cpu()

    def run(device, dtype, **options):
        with models.load("whole", device=device, dtype=dtype, **options).active() as transformer:
            made = [velocities(transformer, device, dtype, *draw) for draw in draws]
        return [torch.stack(parts) for parts in zip(*made, strict=True)]

    want, got = run("cpu", torch.float32), run(device, torch.bfloat16, quantization=quantization)
    assert all(relative(a, b) < tolerance for a, b in zip(got, want, strict=True))


def test_every_linear_layer_reads_dense_rows():
    _, model = build(OVI)
    read = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: read.append((name, given[0].is_contiguous())))
    model(inputs(OviSound(SoundStream(torch.randn(LENGTH, 20))), batch=2))
    assert all(dense for name, dense in read if "blocks" in name)
    assert {name for name, _ in read} == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
