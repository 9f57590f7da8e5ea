"""FantasyTalking's nodes on tiny models: speech against the public encoder, files, runs, and what users are told."""

import logging

import numpy as np
import pytest
import torch
from fantasy_models import CONTEXT, TALKING, talking_module
from published import relative
from tiny_runs import Runs, prompt
from transformers import Wav2Vec2FeatureExtractor
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fantasytalking.frame_attention import latent_ranges
from wanvideo_wrapper.fantasytalking.projection import load_fantasytalking
from wanvideo_wrapper.host import get_host
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.request import TextEmbeds


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fantasytalking")
    module = talking_module()
    module.save(folder / "diffusion_models/talk.safetensors", torch.float32)
    whole = tiny.transformer(in_dim=16)
    tiny.Tiny(tensors=whole.tensors | module.tensors, metadata=whole.metadata).save(
        folder / "diffusion_models/merged.safetensors", torch.float32
    )
    talking_module(features=80).save(folder / "diffusion_models/wide.safetensors")
    talking_module(layers=4).save(folder / "diffusion_models/four.safetensors")
    tiny.wav2vec().save(folder / "wav2vec2/w.safetensors", torch.float32)
    with Runs(folder) as runs:
        yield runs


@pytest.fixture(scope="module")
def wav2vec(runs):
    return N["Wav2VecModelLoader"]().loadmodel("w.safetensors", "fp32", "main_device")[0]


def load_module(name="talk", precision="fp32"):
    return N["FantasyTalkingModelLoader"]().loadmodel(f"{name}.safetensors", precision)[0]


def load_model(name="t2v", **more):
    return N["WanVideoModelLoader"]().loadmodel(f"{name}.safetensors", "fp32", "offload_device", "disabled", **more)[0]


def sound(seconds, channels=1, seed=0):
    samples = np.random.default_rng(seed).standard_normal((1, channels, round(seconds * 16000))) * 0.1 + 0.02
    return {"waveform": torch.from_numpy(samples).float(), "sample_rate": 16000}


def embeds(wav2vec, audio, frames=9, fps=23.0, scale=1.0, cfg=1.0, module=None):
    process = N["FantasyTalkingWav2VecEmbeds"]().process
    return process(wav2vec, module or load_module(), fps, frames, scale, cfg, audio)[0]


@torch.no_grad()
@pytest.mark.parametrize(("frames", "channels"), [(9, 1), (21, 2)])
def test_speech_is_that_of_the_public_encoder(wav2vec, frames, channels):
    """Processor and encoder of transformers, then the projection in float64 and the authors' ranges."""
    audio = sound(3, channels)
    heard = audio["waveform"][0].mean(dim=0).numpy()[: int(frames / 23.0 * 16000)]
    values = Wav2Vec2FeatureExtractor(do_normalize=True)(heard, sampling_rate=16000, return_tensors="pt").input_values
    features = wav2vec.model(values).last_hidden_state[0].double()
    p = {k: v.double() for k, v in talking_module().tensors.items()}
    hidden = features @ p["proj_model.proj.weight"].T
    hidden = hidden - hidden.mean(-1, keepdim=True)
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * p["proj_model.norm.weight"] + p["proj_model.norm.bias"]

    made = embeds(wav2vec, audio, frames, scale=0.5, cfg=[4.0, 2.0])
    assert (made.scale, made.cfg_scale, made.leading) == (0.5, [4.0, 2.0], 0)
    ranges = latent_ranges(len(hidden), frames)
    assert made.context.shape[:2] == (1, len(ranges)) and made.context.shape[3] == CONTEXT
    for context, count, (first, last) in zip(made.context[0], made.lengths[0], ranges, strict=True):
        want = hidden[max(first - 4, 0) : last + 5]
        assert count == len(want) and relative(context[:count].double(), want) < 1e-5
        assert not context[count:].any()


def test_a_cut_of_the_sound_is_named(wav2vec, caplog):
    embeds(wav2vec, sound(1.0), 9)
    assert "audio lasts 1.00 s, of which num_frames leaves the first 0.39 s" in caplog.text


def test_a_stretched_sound_is_warned_of(wav2vec, caplog):
    with caplog.at_level(logging.WARNING):
        embeds(wav2vec, sound(1.0), frames=25)
        assert "stretched" not in caplog.text
        embeds(wav2vec, sound(0.5), frames=25)
    assert "lasts 0.5 s and the video 1.1 s" in caplog.text and "give num_frames 11 or less" in caplog.text


@pytest.mark.parametrize(
    ("audio", "frames", "module", "says"),
    [
        (None, 9, "talk", "audio has no sound"),
        (sound(1), 4, "talk", "num_frames is 4: give at least 5"),
        (sound(1), 9, "wide", "wide.safetensors reads 80 features but the speech encoder gives 64"),
    ],
)
def test_what_does_not_fit_is_named(wav2vec, audio, frames, module, says):
    with pytest.raises(ValueError, match=says):
        embeds(wav2vec, audio, frames, module=load_module(module))


def test_other_files_are_named(runs):
    with pytest.raises(ValueError, match=r"t2v.safetensors is a Wan transformer, not a FantasyTalking module"):
        load_module("t2v")
    with pytest.raises(ValueError, match="at least 4 blocks, but the chosen one has 3"):
        load_model(fantasytalking_model=load_module("four"))
    with pytest.raises(ValueError, match=r"w.safetensors"):
        path = runs.folder / "wav2vec2/w.safetensors"
        load_fantasytalking(path, dtype=torch.float32, host=get_host(), systems=SYSTEMS)


def test_module_and_merged_file_make_one_model(runs):
    module = load_module()
    joined, merged = load_model(fantasytalking_model=module), load_model("merged")
    assert not joined.report.unused
    for model in (joined, merged):
        state = model.transformer.state_dict()
        assert all(
            torch.equal(state[k], v) for k, v in talking_module().tensors.items() if TALKING.owns(k) and k in state
        )
    assert [type(e).__name__ for e in merged.transformer.extensions] == [
        type(e).__name__ for e in joined.transformer.extensions
    ]
    assert "blocks.2.cross_attn.v_proj.weight" in joined.transformer.state_dict()
    # The projection of a merged file serves, too.
    assert load_module("merged").features == tiny.SPEECH_DIM


def sampled(runs, model, payload, **options):
    text = TextEmbeds(positive=(prompt(1),), negative=(prompt(0),))
    before, runs.model = runs.model, model
    try:
        return runs.sample(text_embeds=text, fantasytalking_embeds=payload, **options)
    finally:
        runs.model = before


def test_a_run_hears(runs, wav2vec):
    model = load_model(fantasytalking_model=load_module())
    audio = sound(1)
    plain = sampled(runs, model, None)
    heard = sampled(runs, model, embeds(wav2vec, audio))
    assert heard.isfinite().all() and relative(heard, plain) > 1e-3
    assert torch.equal(sampled(runs, model, embeds(wav2vec, audio, scale=0.0)), plain)
    other = sampled(runs, model, embeds(wav2vec, sound(1, seed=5)))
    assert relative(other, heard) > 1e-3
    guided = sampled(runs, model, embeds(wav2vec, audio, cfg=[4.0, 4.0, 1.0, 1.0]))
    assert guided.isfinite().all() and relative(guided, heard) > 1e-3


def test_windows_of_a_long_run(runs, wav2vec):
    model = load_model(fantasytalking_model=load_module())
    (context,) = N["WanVideoContextOptions"]().process("static_standard", 9, 4, 4, False, False)
    payload = embeds(wav2vec, sound(2), frames=25)
    long = sampled(runs, model, payload, frames=25, context_options=context, steps=2)
    assert long.shape[1] == 7 and long.isfinite().all()
    with pytest.raises(ValueError, match="speech for 3 latent frames, but the video has 7"):
        sampled(runs, model, embeds(wav2vec, sound(1)), frames=25, context_options=context, steps=2)


def test_a_model_without_the_module_is_named(runs, wav2vec):
    with pytest.raises(ValueError, match="connect FantasyTalkingModelLoader"):
        sampled(runs, load_model(), embeds(wav2vec, sound(1)))
