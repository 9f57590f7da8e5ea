"""LongCat-Video-Avatar equals a float64 form written from the authors' code; its node cuts speech and latents."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import HEIGHT, WIDTH, build, inputs
from float64_longcat import CONFIG, FRAMES, GRID, ROOM, ExactLongCat, all_seen
from float64_wan import places, relative
from saved_models import whisper
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.humo.whisper import load_whisper
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat.given import Continuation, GivenFrames
from wanvideo_wrapper.longcat_avatar.extension import LongCatAvatar
from wanvideo_wrapper.longcat_avatar.nodes import LongCatAvatarWhisperEmbeds, WanVideoLongCatAvatarExtendEmbeds
from wanvideo_wrapper.longcat_avatar.speech import LongCatSpeech, lengthened
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.extension import AudioWindow
from wanvideo_wrapper.wanvideo.conditioning import Window

AVATAR = LongCatAvatar(features=12, intermediate_dim=10, context_tokens=4, output_dim=12, voiced=(0, 1, 2), width=8)
WHOLE = Window(tuple(range(FRAMES)), tuple(range(17)), whole=True)


class ExactAvatar(ExactLongCat):
    """What each frame that is made hears of its own sound."""

    def hear(self, speakers, given, scale, repeat_first, masks=None):
        """speakers: audio [pixel frames, 5, layers, channels] of each. masks [P + 1, places]: where they are."""
        tokens = [self.audio_tokens(audio.double()) for audio in speakers]
        tokens = torch.cat(tokens, dim=1)
        self.audio = torch.cat((tokens[:1], tokens)) if repeat_first else tokens
        self.given, self.scale, self.masks = given, scale, masks

    def audio_tokens(self, audio):
        """[pixel frames, 5, layers, channels] -> [F, 4, 12]."""
        groups = audio[1:].unflatten(0, (-1, 4))
        later = torch.cat((groups[:, 0, :3], groups[:, 1, 2:3], groups[:, 2, 2:3], groups[:, 3, 2:]), dim=1)
        name = "multitalk_audio_proj"
        hidden = torch.cat((
            self.linear(f"{name}.proj1", audio[:1].flatten(1)).relu(),
            self.linear(f"{name}.proj1_vf", later.flatten(1)).relu(),
        ))  # fmt: skip
        tokens = self.linear(f"{name}.proj3", self.linear(f"{name}.proj2", hidden).relu()).unflatten(-1, (4, 12))
        weights = (self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"])
        return F.layer_norm(tokens, (12,), *weights, eps=1e-5)

    def speaker_places(self):
        """Rotary position of every token that is made: within 0..4 or 20..24 by how much it sees a speaker, else 12."""
        q, k = (part[0] for part in self.placed)
        q = q[self.given * ROOM :]
        seen = torch.einsum("qhd,khd->hqk", q, k[:ROOM]) * q.shape[-1] ** -0.5
        shares = seen.softmax(-1).mean(0) @ self.masks.double().t() / self.masks.sum(1)
        low, high = shares.amin(0), shares.amax(0)
        within = (shares - low) / (high - low) * 4 + torch.tensor([0.0, 20.0, 0.0])
        within[:, 2] = 12
        return within.gather(1, shares.argmax(1, keepdim=True))[:, 0]

    def on_a_line(self, x, positions):
        """Heads [1, L, H, D] turned to positions [L]."""
        size = x.shape[-1]
        angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        return self.turned(x, torch.polar(torch.ones_like(angles), angles))

    def between(self, index, x, e):
        name = f"blocks.{index}"
        heard, several = [], self.masks is not None
        placed = self.speaker_places() if several else None
        for number, frame in enumerate(range(self.given, FRAMES)):
            mine = x[:, frame * ROOM : (frame + 1) * ROOM]
            q = self.linear(f"{name}.audio_cross_attn.q_linear", self.norm(mine, f"{name}.norm_x"))
            q = self.heads(self.rms(f"{name}.audio_cross_attn.q_norm", q))
            k, v = self.linear(f"{name}.audio_cross_attn.kv_linear", self.audio[frame][None]).chunk(2, dim=-1)
            k = self.heads(self.rms(f"{name}.audio_cross_attn.k_norm", k))
            if several:
                q = self.on_a_line(q, placed[number * ROOM : (number + 1) * ROOM])
                k = self.on_a_line(k, torch.tensor([2.0, 22.0]).repeat_interleave(4))
            heard.append(self.linear(f"{name}.audio_cross_attn.proj", self.attention(q, k, self.heads(v))))
        rows = self.linear(f"{name}.audio_modulation.1", F.silu(e[:, self.given :]))
        shift, scale, gate = rows.repeat_interleave(ROOM, dim=1).chunk(3, dim=-1)
        y = (self.norm(torch.cat(heard, dim=1)) * (1 + scale) + shift) * gate * self.scale
        return torch.cat((x[:, : self.given * ROOM], x[:, self.given * ROOM :] + y), dim=1)


def model_of():
    return build(LongCat(width=8), AVATAR, config=CONFIG)[1]


def given_inputs(*payloads, frames=0):
    times = torch.full((1, FRAMES), 700.0)
    times[:, :frames] = 0
    return replace(
        inputs(*payloads), latents=torch.randn(1, 16, FRAMES, HEIGHT, WIDTH), timestep=times, text=(torch.randn(3, 8),)
    )


@pytest.mark.parametrize("parts", [0, 8])
@pytest.mark.parametrize("reference", [False, True])
def test_one_speaker(reference, parts):
    audio = torch.randn(1, 1, 17 - 4 * reference, 5, 2, 6)
    frames = GivenFrames(frames=1 + reference, apart=int(reference), position=7 if reference else None)
    model = model_of()
    given = given_inputs(AudioWindow(audio, torch.tensor(0.7)), frames, frames=frames.frames)
    exact, seen, positions = ExactAvatar(model), all_seen(), places(*map(range, GRID))
    if reference:
        seen[0, 1:] = seen[1, 0] = seen[1, 2:] = False
        positions = places((7,), *map(range, GRID[1:])) + places(range(FRAMES - 1), *map(range, GRID[1:]))
    else:
        seen[0, 1:] = False
    exact.hear(audio[0], frames.frames, 0.7, reference)
    want = exact.run(given.latents, given.timestep[0], given.text[0], frames.frames, seen, positions)
    with model.sparing(parts):
        assert relative(model(given), want) < 1e-5


def test_two_speakers():
    """Masks on the token grid, two wide and two high: one on the left, one in a corner, the rest is background."""
    model, masks = model_of(), torch.zeros(2, HEIGHT, WIDTH)
    masks[0, :, : WIDTH // 2] = masks[1, : HEIGHT // 2, WIDTH // 2 :] = 1
    audio = torch.randn(1, 2, 17, 5, 2, 6)
    frames = GivenFrames(frames=1)
    given = given_inputs(AudioWindow(audio, torch.tensor(0.7), masks), frames, frames=1)
    exact, seen = ExactAvatar(model), all_seen()
    seen[0, 1:] = False
    places_of = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    exact.hear(audio[0], 1, 0.7, False, places_of)
    want = exact.run(given.latents, given.timestep[0], given.text[0], 1, seen, places(*map(range, GRID)))
    assert relative(model(given), want) < 1e-5


def test_speech_of_another_length_is_refused():
    with pytest.raises(ValueError, match="covers 4 latent frames but the video has 5"):
        model_of()(given_inputs(AudioWindow(torch.randn(1, 1, 13, 5, 2, 6), torch.tensor(1.0))))


def test_windows_of_speech_are_two_features_a_frame():
    feature = torch.arange(50.0)[:, None, None].expand(-1, 2, 6)
    speech = LongCatSpeech(features=(feature,), start=6, frames=21, scale=0.5)
    got = speech.window(WHOLE)
    want = [[min(max(6 + 2 * f + near, 0), 49) for near in (-2, -1, 0, 1, 2)] for f in range(21)]
    assert got.audio[0, 0, :, :, 0, 0].tolist() == want and float(got.scale) == 0.5


def test_missing_speech_is_its_start_or_its_end_mirrored():
    feature = torch.arange(4.0)[:, None, None]
    for padding, want in (("pad_with_start", [0, 1, 2, 3, 0, 0]), ("mirror_from_end", [0, 1, 2, 3, 3, 2])):
        assert lengthened((feature,), 6, padding)[0].flatten().tolist() == want
    assert lengthened((feature,), 4, "pad_with_start")[0] is feature


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper") / "whisper.safetensors"
    whisper().save(path, torch.float32)
    return load_whisper(path, dtype=torch.float32, host=StandaloneHost(device="cpu"))


def heard_of(hearing, *seconds, fps=25.0, num_frames=50, kind="para"):
    sounds = [{"waveform": 0.1 * torch.randn(1, 1, int(s * 16000)), "sample_rate": 16000} for s in seconds]
    more = {f"audio_{number}": sound for number, sound in enumerate(sounds[1:], 2)}
    node = LongCatAvatarWhisperEmbeds()
    return sounds, node.process(hearing, sounds[0], False, num_frames, fps, 0.8, 2.0, kind, **more)


def test_avatar_1_5_hears_a_feature_a_frame(hearing):
    (sound,), (speech, mixed, frames) = heard_of(hearing, 3.0)
    assert torch.equal(speech.features[0], hearing.encode(sound["waveform"][0, 0, :32000].numpy()))
    assert torch.equal(mixed["waveform"], sound["waveform"][..., :32000]) and frames == 50
    assert (speech.scale, speech.cfg_scale, speech.silence) == (0.8, 2.0, None)
    node, latents = WanVideoLongCatAvatarExtendEmbeds(), {"samples": torch.randn(1, 16, 6, 4, 4)}
    embeds, _ = node.EXECUTE_NORMALIZED(latents, speech, 21, 5, 21, "pad_with_start", 4, 1)
    got = embeds.payloads[-1].window(WHOLE).audio[0, 0]
    want = [[speech.features[0][min(f + near, 49)] for near in (-2, -1, 0, 1, 2)] for f in range(16, 37)]
    assert got.shape == (21, 5, 5, hearing.width) and torch.equal(got, torch.stack([torch.stack(w) for w in want]))


def test_its_speakers_talk_at_once_or_in_turn(hearing):
    _, (once, mixed, _) = heard_of(hearing, 1.0, 0.4)
    assert [len(f) for f in once.features] == [25, 25] and mixed["waveform"].shape[-1] == 16000
    assert once.features[1][:10].abs().min() > 0 and not once.features[1][10:].any()
    _, (turns, mixed, _) = heard_of(hearing, 1.0, 0.4, kind="add")
    assert [len(f) for f in turns.features] == [35, 35] and mixed["waveform"].shape[-1] == 22400
    assert not turns.features[0][25:].any() and not turns.features[1][:25].any()


def test_at_another_rate_it_hears_in_time(hearing, caplog):
    """One second at 20 and at 25 frames a second: the first and the last feature are of the same moments."""
    sound = 0.1 * torch.randn(1, 1, 16000)
    at = {fps: LongCatAvatarWhisperEmbeds().process(
        hearing, {"waveform": sound, "sample_rate": 16000}, False, 50, fps, 1.0, 1.0, "para")[0].features[0]
        for fps in (20.0, 25.0)}  # fmt: skip
    assert [len(f) for f in at.values()] == [20, 25] and "trained at 25 fps; at 20.0" in caplog.text
    assert torch.allclose(at[20.0][[0, -1]], at[25.0][[0, -1]], atol=1e-5)


class Vae:
    """Latents that are the means of 8x8 pixels of every fourth picture."""

    class managed:  # noqa: N801
        released = 0

        @classmethod
        def release(cls):
            cls.released += 1

    def encode(self, video):
        return F.avg_pool2d(video[:, ::4], 8).repeat(6, 1, 1, 1)[:16]


def test_the_end_of_the_pictures_is_encoded_anew():
    pictures = torch.rand(30, 32, 32, 4)
    latents, (embeds, _) = embeds_of(prev_images=pictures, vae=Vae())
    want = Vae().encode(pictures[-5:, ..., :3].movedim(-1, 0) * 2 - 1)
    (run,) = embeds.modifiers
    assert torch.allclose(run.given, want) and run.given.shape == (16, 2, 4, 4) and Vae.managed.released == 1
    assert embeds.payloads[0] == embeds_of()[1][0].payloads[0]
    (run,) = embeds_of(prev_images=pictures, vae=None, overlap=0, ref_latent=latents)[1][0].modifiers
    assert run.given is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(prev_images=torch.rand(30, 32, 32, 3)), "connect WanVideo VAE Loader to 'vae'"),
        (dict(prev_images=torch.rand(4, 32, 32, 3), vae=Vae()), "overlap 5 takes as many of prev_images"),
        (dict(prev_images=torch.rand(30, 32, 48, 3), vae=Vae()), "give the decoded pictures of prev_latents"),
    ],
)
def test_pictures_that_cannot_go_before_a_part_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        embeds_of(**options)


def embeds_of(**more):
    options = dict(num_frames=21, overlap=5, frames_processed=21, if_not_enough_audio="pad_with_start",
                   ref_frame_index=4, ref_mask_frame_range=1)  # fmt: skip
    node = WanVideoLongCatAvatarExtendEmbeds()
    latents = {"samples": torch.randn(1, 16, 6, 4, 4)}
    speech = MultiTalkEmbeds(features=(torch.randn(90, 2, 6),), scale=0.8, cfg_scale=2.0)
    return latents, node.EXECUTE_NORMALIZED(latents, speech, **{**options, **more})


def test_the_node_goes_on_from_the_last_latents_behind_a_reference():
    picture = torch.randn(1, 16, 3, 4, 4)
    latents, (embeds, part) = embeds_of(ref_latent={"samples": picture})
    frames, speech = embeds.payloads
    # 6 latents, of which 2 are given; behind the reference's place 4, from 3 to 5 in the video, none sees it.
    assert frames == GivenFrames(frames=3, apart=1, position=4, unseeing=(4, 7)) and part is None
    assert (speech.start, speech.frames, speech.scale, speech.cfg_scale) == (2 * (21 - 5), 21, 0.8, 2.0)
    (run,) = embeds.modifiers
    assert torch.equal(run.given, latents["samples"][0, :, -2:]) and torch.equal(run.reference, picture[0, :, :1])
    assert embeds.latent_shape == (16, 6, 4, 4) and embeds.num_frames == 21


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (dict(overlap=1, frames_processed=0), GivenFrames(frames=1)),
        # A reference counts as a frame in front whether it is there or not, as in the authors' code.
        (dict(ref_frame_index=2), GivenFrames(frames=2, apart=1, unseeing=(2, 5))),
        (dict(ref_frame_index=2, ref_mask_frame_range=0), GivenFrames(frames=2, apart=1)),
        # Places that reach beyond what is made change nothing.
        (dict(ref_frame_index=1), GivenFrames(frames=2, apart=1)),
        (dict(ref_frame_index=4), GivenFrames(frames=2, apart=1)),
    ],
)
def test_who_does_not_see_what_is_apart(options, want):
    assert embeds_of(**options)[1][0].payloads[0] == want


def test_nothing_is_given_without_overlap_and_reference():
    embeds = embeds_of(overlap=0, frames_processed=0)[1][0]
    assert [type(payload) for payload in embeds.payloads] == [LongCatSpeech] and embeds.modifiers == ()


def test_samples_are_cut_to_the_part():
    whole = torch.randn(1, 16, 14, 4, 4)
    assert torch.equal(embeds_of(samples={"samples": whole})[1][1]["samples"], whole[:, :, 6:12])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(overlap=16, num_frames=13), "overlap 16 leaves nothing of 13 frames to make"),
        (dict(ref_latent={"samples": torch.randn(1, 16, 1, 6, 4)}), "encode the reference at the size of the video"),
    ],
)
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        embeds_of(**options)


def test_more_overlap_than_there_is_is_refused():
    node, short = WanVideoLongCatAvatarExtendEmbeds(), {"samples": torch.randn(1, 16, 1, 4, 4)}
    with pytest.raises(ValueError, match="takes 4 latent frames, but prev_latents has 1"):
        node.EXECUTE_NORMALIZED(
            short, MultiTalkEmbeds(features=(torch.randn(90, 2, 6),)), 21, 13, 21, "pad_with_start", 4, 1
        )


def test_the_reference_is_cut_off_and_its_run_begins_with_it():
    reference, given = torch.randn(16, 1, 4, 4), torch.randn(16, 2, 4, 4)
    run = Continuation(given, reference).around_run(
        lambda request, host: ({"samples": torch.ones(1, 16, 7, 4, 4), "a": 1},) * 2
    )
    assert all(latent["samples"].shape[2] == 6 and latent["a"] == 1 for latent in run(None, None))


@pytest.mark.parametrize("speakers", [1, 2])
def test_every_linear_layer_reads_dense_rows(speakers):
    model, read = model_of(), []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: read.append((name, given[0].is_contiguous())))
    frames = GivenFrames(frames=2, apart=1, position=7)
    model(given_inputs(AudioWindow(torch.randn(1, speakers, 13, 5, 2, 6), torch.tensor(1.0)), frames, frames=2))
    assert all(dense for name, dense in read if "blocks" in name)
    assert {name for name, _ in read} == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
