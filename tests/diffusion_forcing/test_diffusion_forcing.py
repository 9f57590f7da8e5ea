"""The frame rate and the times of frames, against diffusers' SkyReels V2 and its published loop."""

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel
from tiny_runs import Runs, prompt
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper import tensor_layout
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.diffusion_forcing.extension import FrameRate, FrameRateEmbedding
from wanvideo_wrapper.diffusion_forcing.nodes import _extended
from wanvideo_wrapper.diffusion_forcing.prefix import KnownFrames
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.guidance import Conditions
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, TextEmbeds
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule
from wanvideo_wrapper.wanvideo.tokens import ModelInputs
from windowed import LEAST, blended, denoisers, windowed

HEADS, HEAD, TEXT = 3, 24, 40
STEPS, SHIFT, FRAMES = 3, 4.0, 4
PUBLISHED = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "fps_projection.net.0.proj": "fps_projection.0",
    ".attn1.": ".self_attn.", ".attn2.": ".cross_attn.", ".to_q": ".q", ".to_k": ".k", ".to_v": ".v",
    ".to_out.0": ".o", ".norm2.": ".norm3.", ".ffn.net.0.proj": ".ffn.0", ".net.2": ".2", "proj_out": "head.head",
}  # fmt: skip


def published(key):
    for theirs, name in PUBLISHED.items():
        key = key.replace(theirs, name)
    return "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")


@pytest.fixture(scope="module")
def pair():
    """diffusers' model and this one, of the same random weights."""
    torch.manual_seed(4)
    reference = SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=16, out_channels=16, text_dim=TEXT,
        freq_dim=256, ffn_dim=96, num_layers=2, inject_sample_info=True,
    ).eval()  # fmt: skip
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    state = {published(k): v for k, v in reference.state_dict().items()}
    config = WanConfig(dim=HEADS * HEAD, ffn_dim=96, num_heads=HEADS, num_layers=2, text_dim=TEXT, text_len=9)
    model = WanModel(config, SYSTEMS.detect({k: tuple(v.shape) for k, v in state.items()}))
    model.load_state_dict(state, strict=True)
    return reference, model


@torch.no_grad()
@pytest.mark.parametrize(("fps", "row"), [(16.0, 0), (16.001, 0), (24.0, 1), (16.5, 1)])
@pytest.mark.parametrize("timestep", [torch.tensor([[0.0, 20.0, 611.0]]), torch.tensor([611.0])])
def test_the_model_is_that_of_diffusers(pair, fps, row, timestep):
    reference, model = pair
    latents, text = torch.randn(1, 16, 3, 4, 6), torch.randn(9, TEXT)
    want = reference(
        latents, timestep, text[None], fps=torch.tensor([row]), enable_diffusion_forcing=timestep.dim() == 2,
        return_dict=False,
    )[0]  # fmt: skip
    got = model(ModelInputs(latents=latents, timestep=timestep, text=(text,), payloads=(FrameRate.of(fps),)))
    assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_known_frames_are_noised_anew_in_every_step_and_have_a_time_of_their_own():
    seen = []
    known = KnownFrames(first=1, count=2, noise=40, seed=9)
    velocity = known.around_velocity(lambda x, times, step: seen.append((x, times)) or x * 0)
    latents = torch.randn(4, 5, 64, 64)
    for _ in range(2):
        velocity(latents, torch.tensor(731.0), Step())
    for x, times in seen:
        assert times.tolist() == [731.0, 40.0, 40.0, 731.0, 731.0]
        assert torch.equal(x[:, [0, 3, 4]], latents[:, [0, 3, 4]])
        noise = (x[:, 1:3] - 0.96 * latents[:, 1:3]) / 0.04
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert not torch.equal(seen[0][0], seen[1][0])
    again = KnownFrames(first=1, count=2, noise=40, seed=9).around_velocity(lambda x, times, step: x)
    assert torch.equal(again(latents, torch.tensor(731.0), Step()), seen[0][0])
    clean = KnownFrames(first=0, count=2, noise=0, seed=9).around_velocity(lambda x, times, step: x)
    assert clean(latents, torch.tensor(5.0), Step()) is latents


def test_the_noise_of_known_frames_is_not_that_of_the_start():
    embeds = ImageEmbeds(latent_shape=(4, 5, 8, 8), num_frames=17)
    _, known = _extended(embeds, {"samples": torch.randn(1, 4, 2, 8, 8)}, noise=1000, seed=7)
    seen = known.around_velocity(lambda x, times, step: x)(torch.randn(4, 5, 8, 8), torch.tensor(5.0), Step())
    start = torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(7))
    assert (seen[:, :2].flatten()[:64] - start.flatten()[:64]).abs().min() > 0


@torch.no_grad()
def test_windows_are_the_same_frames_alone_at_their_times(pair):
    """The first one begins with known frames, the second has none."""
    _, model = pair
    latents, time, payloads = torch.randn(16, 5, 4, 6), torch.tensor(731.0), (FrameRate.of(16.0),)
    conditions = Conditions(positive=torch.randn(9, TEXT), payloads=payloads)
    known = KnownFrames(first=0, count=2, noise=40, seed=3)
    got = known.around_velocity(windowed(conditions, denoisers(model), size=9))(latents, time, Step())
    seen, times = known.around_velocity(lambda *given: given[:2])(latents, time, Step())

    def alone(*places):
        given = dict(latents=seen[None, :, places], timestep=times[None, list(places)], payloads=payloads)
        return model(ModelInputs(text=(conditions.positive,), **given))[0]

    parts = [((0, 1, 2), (1.0, 1.0, 1.0), alone(0, 1, 2)), ((2, 3, 4), (LEAST, 1.0, 1.0), alone(2, 3, 4))]
    assert times.tolist() == [40.0, 40.0, 731.0, 731.0, 731.0]
    torch.testing.assert_close(got, blended(parts, 5))


class ForcedRuns(Runs):
    """Runs of the node on a tiny model that has the embedding, or on a plain one."""

    def __enter__(self):
        super().__enter__()
        forced = tiny.transformer(in_dim=16, extensions=(FrameRateEmbedding(),))
        forced.save(self.folder / "diffusion_models/df.safetensors", torch.float32)
        self.plain = self.model
        (self.model,) = N["WanVideoModelLoader"]().loadmodel("df.safetensors", "fp32", "offload_device", "disabled")
        return self

    def forced(self, **options):
        (embeds,) = N["WanVideoEmptyEmbeds"]().process(4 * FRAMES - 3, 32, 32)
        text = TextEmbeds(positive=(prompt(1),), negative=(prompt(0),))
        settings = dict(model=self.model, text_embeds=text, image_embeds=embeds, addnoise_condition=0, fps=24.0)
        settings |= dict(steps=STEPS, cfg=3.0, shift=SHIFT, seed=1, force_offload=True, scheduler="unipc") | options
        return N["WanVideoDiffusionForcingSampler"]().process(**settings)[0]["samples"][0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with ForcedRuns(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


def velocity_of(runs, latents, times):
    """Guided by hand."""
    passes = []
    with runs.model.active() as transformer:
        for text in (prompt(1), prompt(0)):
            inputs = ModelInputs(
                latents=latents[None], timestep=times[None], text=(text,), payloads=(FrameRate.of(24.0),)
            )
            passes.append(transformer(inputs)[0])
    return passes[1] + 3.0 * (passes[0] - passes[1])


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_run_is_the_published_loop(runs, count):
    """Every frame with a solver of its own, by diffusers' table of times."""
    prefix = torch.randn(16, count, 4, 4)
    schedules = [make_schedule(ScheduleSpec(name="unipc", steps=STEPS, shift=SHIFT)).fresh() for _ in range(FRAMES)]
    matrix, _, updates, intervals = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None, FRAMES, schedules[0].timesteps, FRAMES, 0, count, 1
    )
    assert set(intervals) == {(0, FRAMES)} and len(matrix) == STEPS
    latents = torch.randn(16, FRAMES, 4, 4, generator=torch.Generator().manual_seed(1))
    latents[:, :count] = prefix
    for index, (times, update) in enumerate(zip(matrix, updates, strict=True)):
        velocity = velocity_of(runs, latents, times.float())
        for frame in range(FRAMES):
            if update[frame]:
                one = slice(frame, frame + 1)
                latents[:, one] = schedules[frame].step(
                    velocity[:, one], index, latents[:, one].clone(), torch.Generator()
                )
    got = runs.forced(**({"prefix_samples": {"samples": prefix[None]}} if count else {}))
    torch.testing.assert_close(got, latents, rtol=1e-5, atol=1e-5)


def test_noise_on_known_frames_changes_the_others_only(runs):
    prefix = {"samples": torch.randn(1, 16, 2, 4, 4)}
    clean, noised = (runs.forced(prefix_samples=prefix, addnoise_condition=noise) for noise in (0, 300))
    assert torch.equal(clean[:, :2], prefix["samples"][0]) and torch.equal(noised[:, :2], prefix["samples"][0])
    assert (clean[:, 2:] - noised[:, 2:]).abs().max() > 1e-3
    assert torch.equal(noised, runs.forced(prefix_samples=prefix, addnoise_condition=300)), "the noise has a seed"


def test_the_frame_rate_acts_and_a_model_without_it_says_so(runs, caplog):
    assert not torch.equal(runs.forced(fps=16.0), runs.forced(fps=24.0))
    assert not caplog.records or "fps" not in caplog.text
    plain = [runs.forced(model=runs.plain, fps=fps) for fps in (16.0, 24.0)]
    assert torch.equal(*plain) and "no 'fps_embedding', so that fps has no effect" in caplog.text


def test_samples_act_below_full_strength_only(runs, caplog):
    samples = {"samples": torch.randn(1, 16, FRAMES, 4, 4)}
    assert torch.equal(runs.forced(samples=samples), runs.forced())
    assert "samples have no effect where denoise_strength is 1" in caplog.text
    part = runs.forced(model=runs.plain, samples=samples, denoise_strength=0.5, steps=2)
    runs.model, forced = runs.plain, runs.model
    same = dict(frames=4 * FRAMES - 3, scheduler="unipc", shift=SHIFT, samples=samples, denoise_strength=0.5)
    assert torch.equal(part, runs.sample(**same, steps=4)), "as the plain sampler, which counts the whole way"
    runs.model = forced


def test_what_leaves_nothing_to_make_is_refused(runs):
    with pytest.raises(ValueError, match="4 latent frames and the whole video 4, so that none is left"):
        runs.forced(prefix_samples={"samples": torch.randn(1, 16, FRAMES, 4, 4)})
    (embeds,) = N["WanVideoEmptyEmbeds"]().process(13, 32, 32)
    with pytest.raises(ValueError, match="makes one stretch of video"):
        runs.forced(image_embeds=type(embeds)(**{**embeds.__dict__, "loop": object()}))
    with pytest.raises(ValueError, match="extra latents are"):
        runs.forced(prefix_samples={"samples": torch.randn(1, 16, 1, 6, 4)})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sm89])])
@pytest.mark.parametrize("quantization", ["fp8_e4m3fn_fast", "fp4_scaled"])
def test_quantized_blocks(quantization, device, tmp_path, monkeypatch):
    """For a memory checker, too: two blocks, frames at times of their own."""
    monkeypatch.setattr(tensor_layout, "CHECKING", True)
    path = tmp_path / "df.safetensors"
    tiny.transformer(in_dim=16, extensions=(FrameRateEmbedding(),), layers=2).save(path)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(5, tiny.TEXT_DIM)

    def run(device, **options):
        model = load_wan_model(path, LoadOptions(**options), StandaloneHost(device=device), SYSTEMS)
        with model.active() as transformer:
            dtype = options["base_dtype"]
            inputs = ModelInputs(
                latents=latents.to(device), timestep=torch.tensor([[0.0, 600.0, 600.0]], device=device),
                text=(text.to(device, dtype),), payloads=(FrameRate.of(24.0).to(torch.device(device), dtype),),
            )  # fmt: skip
            return transformer(inputs).cpu()

    want = run("cpu", base_dtype=torch.float32)
    got = run(device, base_dtype=torch.bfloat16, quantization=quantization)
    assert ((got - want).norm() / want.norm()).item() < 0.25
