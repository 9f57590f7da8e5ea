"""Audio projection and attention against a float64 form written from the method's description."""

import pytest
import torch
from wanvideo_wrapper.kernels.class_attention import class_attention
from wanvideo_wrapper.multitalk import speakers as speakers_module
from wanvideo_wrapper.multitalk.extension import AUDIO, AudioWindow, MultiTalk, Speech
from wanvideo_wrapper.multitalk.multitalk import AudioProjModel, SingleStreamMultiAttention, latent_windows
from wanvideo_wrapper.multitalk.speakers import speaker_map, token_masks
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.extension import run_hooks
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import Heads, HeadsRead, ModelInputs

LAYERS, CHANNELS, HIDDEN, TOKENS, OUT = 3, 8, 12, 4, 16


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def windows_by_loop(audio):
    """The feature frames behind each latent frame, one index at a time; audio [frames, 5, ...]."""
    later = []
    for start in range(1, audio.shape[0], 4):
        picks = [(start, 0), (start, 1), (start, 2), (start + 1, 2), (start + 2, 2)]
        picks += [(start + 3, 2), (start + 3, 3), (start + 3, 4)]
        later.append(torch.stack([audio[f, w] for f, w in picks]))
    return audio[0], torch.stack(later)


def project_float64(model, audio):
    p = {k: v.double() for k, v in model.state_dict().items()}
    first, later = windows_by_loop(audio.double())
    rows = [torch.relu(p["proj1.weight"] @ first.flatten() + p["proj1.bias"])]
    rows += [torch.relu(p["proj1_vf.weight"] @ one.flatten() + p["proj1_vf.bias"]) for one in later]
    out = []
    for row in rows:
        hidden = torch.relu(p["proj2.weight"] @ row + p["proj2.bias"])
        tokens = (p["proj3.weight"] @ hidden + p["proj3.bias"]).view(TOKENS, OUT)
        centred = tokens - tokens.mean(-1, keepdim=True)
        tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        out.append(tokens * p["norm.weight"] + p["norm.bias"])
    return torch.stack(out)


def attend_float64(module, x, audio, shape, heads):
    p = {k: v.double() for k, v in module.state_dict().items()}
    frames, height, width = shape
    places, dim = height * width, x.shape[-1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for f in range(frames):
        rows = slice(f * places, (f + 1) * places)
        q = x[0, rows].double() @ p["q_linear.weight"].T + p["q_linear.bias"]
        kv = audio[f].double() @ p["kv_linear.weight"].T + p["kv_linear.bias"]
        k, v = kv[:, :dim], kv[:, dim:]
        joined = []
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            weights = (q[:, part] @ k[:, part].T / (dim // heads) ** 0.5).softmax(-1)
            joined.append(weights @ v[:, part])
        out[0, rows] = torch.cat(joined, -1) @ p["proj.weight"].T + p["proj.bias"]
    return out


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@torch.no_grad()
def test_projection():
    model = randomise(AudioProjModel(LAYERS * CHANNELS, HIDDEN, TOKENS, OUT))
    audio = torch.randn(13, 5, LAYERS, CHANNELS)
    assert relative(model(*latent_windows(audio[None]))[0], project_float64(model, audio)) < 1e-5


def test_audio_must_cover_4n_plus_1_frames():
    with pytest.raises(ValueError, match=r"4n\+1 frames, not 12"):
        latent_windows(torch.randn(1, 12, 5, LAYERS, CHANNELS))


@torch.no_grad()
@pytest.mark.parametrize("trailing", [0, 1])
def test_audio_attention(trailing):
    heads, dim, shape = 2, 24, (3, 2, 5)
    module = randomise(SingleStreamMultiAttention(dim, OUT, heads))
    x, audio = torch.randn(1, (3 + trailing) * 10, dim), torch.randn(3, TOKENS, OUT)
    got = module(x, audio, shape)
    want = attend_float64(module, x, audio, shape, heads)
    assert relative(got, want) < 1e-5
    assert not trailing or got[:, 30:].abs().max() == 0


def scores_float64(q, k, masks):
    """[L, P + 1]: softmax over the first frame's keys, summed over each mask, divided by its size, mean over heads."""
    q, k = q[0].double(), k[0, : masks.shape[1]].double()
    out = torch.zeros(q.shape[0], masks.shape[0], dtype=torch.float64)
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5).softmax(-1)
        for c, mask in enumerate(masks.double()):
            out[:, c] += (weights * mask).sum(-1) / mask.sum() / q.shape[1]
    return out


def test_the_map_in_16_bits_favours_no_class():
    """Rounding of a class's weight is an error of one sign, which moves tokens to another speaker."""
    q, k = torch.randn(1, 100, 12, 32).bfloat16(), torch.randn(1, 1560, 12, 32).bfloat16()
    masks = torch.zeros(3, 1560)
    masks[0, :77] = masks[1, 100:427] = masks[2, 427:] = 1
    error = speaker_map(q, k, masks)[0] / scores_float64(q, k, masks) - 1
    assert error.mean(0).abs().max() < 2e-4 and error.square().mean(0).sqrt().max() < 1e-3


def rotate_float64(x, position):
    """x [tokens, heads, D] turned by one position a token."""
    size = x.shape[-1]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    freqs = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = position.double()[:, None] * freqs
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_several_speakers(speakers):
    heads, dim, shape = 2, 24, (3, 4, 6)
    places = 24
    module = randomise(SingleStreamMultiAttention(dim, OUT, heads))
    x, audio = torch.randn(1, 3 * places, dim), torch.randn(3, speakers * TOKENS, OUT)
    q, k = torch.randn(1, 3 * places, heads, 16), torch.randn(1, 3 * places, heads, 16)
    masks = torch.nn.functional.one_hot(torch.arange(places) % (speakers + 1)).T.float()

    scores = scores_float64(q, k, masks)
    assert relative(speaker_map(q, k, masks)[0], scores) < 1e-5
    starts = {2: [0, 20], 3: [0, 4, 8], 4: [0, 4, 8, 12]}[speakers]
    position = torch.empty(3 * places, dtype=torch.float64)
    for token in range(3 * places):
        winner = int(scores[token].argmax())
        low, high = scores[:, winner % speakers].min(), scores[:, winner % speakers].max()
        inside = starts[winner % speakers] + 4 * (scores[token, winner % speakers] - low) / (high - low + 1e-8)
        position[token] = 12 if winner == speakers else inside
    p = {n: t.double() for n, t in module.state_dict().items()}
    want = torch.empty(1, 3 * places, dim, dtype=torch.float64)
    for f in range(3):
        rows = slice(f * places, (f + 1) * places)
        queries = (x[0, rows].double() @ p["q_linear.weight"].T + p["q_linear.bias"]).view(places, heads, -1)
        keys, values = (audio[f].double() @ p["kv_linear.weight"].T + p["kv_linear.bias"]).chunk(2, dim=-1)
        centres = torch.tensor([s + 2.0 for s in starts]).repeat_interleave(TOKENS)
        queries = rotate_float64(queries, position[rows])
        keys = rotate_float64(keys.view(-1, heads, dim // heads), centres)
        weights = torch.einsum("qhd,khd->hqk", queries, keys).div((dim // heads) ** 0.5).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, values.view(-1, heads, dim // heads)).reshape(places, dim)
        want[0, rows] = out @ p["proj.weight"].T + p["proj.bias"]
    got = module(x, audio, shape, speaker_map(q, k, masks), speakers)
    assert relative(got, want) < 1e-5


@torch.no_grad()
@pytest.mark.cuda
def test_several_speakers_on_a_gpu():
    # In one pass there, in several on the CPU.
    module, places = randomise(SingleStreamMultiAttention(256, OUT, 2)), 24
    x, audio = torch.randn(1, 4 * places, 256), torch.randn(3, 2 * TOKENS, OUT)
    scores = torch.rand(1, 4 * places, 3)
    want = module.double()(x.double(), audio.double(), (4, 4, 6), scores.double(), 2)
    got = module.float().cuda()(x.cuda(), audio.cuda(), (4, 4, 6), scores.cuda(), 2)
    assert relative(got.cpu(), want) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2, 4])
def test_the_map_is_one_attention_call_and_none_for_one_speaker(speakers, monkeypatch):
    calls = []
    counted = lambda q, k, masks: calls.append(masks.shape) or class_attention(q, k, masks)  # noqa: E731
    monkeypatch.setattr(speakers_module, "class_attention", counted)
    extension = MultiTalk(features=1, intermediate_dim=1, context_tokens=1, output_dim=1, voiced=(0,))
    masks = None if speakers == 1 else torch.eye(speakers + 1, 6)
    cond = Speech(None, torch.tensor(1.0), (2, 2, 3), masks, speakers)
    q, k = (torch.randn(1, 12, 2, 16) for _ in range(2))
    assert extension.reads_heads(cond) == (HeadsRead(12, 6, result=False) if speakers > 1 else None)
    _, ((_, cond),) = run_hooks("self_attn", None, Heads(q, k, q), ((extension, cond),))
    assert len(calls) == (speakers > 1) and (cond.scores is None) == (speakers == 1)


def test_two_speakers_default_to_the_halves_and_the_background_is_the_rest():
    masks = token_masks(None, 2, (1, 10, 20), torch.device("cpu")).view(3, 10, 20)
    assert masks[0, 1:9, 1:9].min() == 1 and masks[0].sum() == 64
    assert masks[1, 1:9, 11:19].min() == 1 and masks[1].sum() == 64
    assert torch.equal(masks.sum(0), torch.ones(10, 20))


def test_a_speaker_smaller_than_a_token_keeps_one():
    """Wherever the one pixel lies, the token that holds it is the speaker's, and no other is."""
    for row, column in torch.randint(80, (20, 2)).tolist():
        painted = torch.zeros(2, 80, 80)
        painted[0, row, column], painted[1, 40:] = 1, 1
        masks = token_masks(painted, 2, (1, 10, 10), torch.device("cpu")).view(3, 10, 10)
        assert masks[0].nonzero().tolist() == [[row // 8, column // 8]]
        assert torch.equal(masks[1], torch.arange(10)[:, None].expand(10, 10).ge(5).float())


@torch.no_grad()
@pytest.mark.parametrize("trailing", [0, 1])
@pytest.mark.parametrize("speakers", [1, 2, 3])
def test_no_value_is_read_by_the_host(speakers, trailing):
    # Tensors without values: counts that were compared on the device would have nothing to compare.
    module = SingleStreamMultiAttention(24, OUT, 2).to("meta")
    x, audio = torch.empty(1, (3 + trailing) * 10, 24, device="meta"), torch.empty(3, speakers * 4, OUT, device="meta")
    scores = torch.empty(*x.shape[:2], speakers + 1, device="meta")
    assert module(x, audio, (3, 2, 5), scores, speakers).shape == x.shape


@torch.no_grad()
def test_strided_input_equals_dense():
    module = randomise(SingleStreamMultiAttention(24, OUT, 2))
    x, audio = torch.randn(24, 10).t()[None], torch.randn(1, OUT, TOKENS).transpose(1, 2)
    assert torch.equal(module(x, audio, (1, 2, 5)), module(x.contiguous(), audio.contiguous(), (1, 2, 5)))


def talking_model():
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)
    extension = MultiTalk(
        features=LAYERS * CHANNELS, intermediate_dim=HIDDEN, context_tokens=TOKENS, output_dim=OUT, voiced=(0, 1)
    )
    return randomise(WanModel(config, (extension,)))


def inputs(*payloads):
    torch.manual_seed(3)
    return ModelInputs(
        latents=torch.randn(1, 16, 3, 4, 4), timestep=torch.tensor([500.0]), text=(torch.randn(4, 8),),
        payloads=payloads,
    )  # fmt: skip


@torch.no_grad()
def test_speech_acts_by_its_strength():
    model = talking_model()
    audio = torch.randn(1, 1, 9, 5, LAYERS, CHANNELS)
    quiet = model(inputs())
    mute = model(inputs(AudioWindow(audio, torch.tensor(0.0))))
    loud = model(inputs(AudioWindow(audio, torch.tensor(1.0))))
    assert torch.equal(quiet, mute)
    assert relative(loud, quiet.double()) > 1e-5


@torch.no_grad()
def test_wrong_speech_is_named():
    model, one = talking_model(), torch.tensor(1.0)
    with pytest.raises(ValueError, match="3 speakers need ref_target_masks"):
        model(inputs(AudioWindow(torch.randn(1, 3, 9, 5, LAYERS, CHANNELS), one)))
    with pytest.raises(ValueError, match="2 speakers but 5 masks .* from number 4 on have no audio"):
        model(inputs(AudioWindow(torch.randn(1, 2, 9, 5, LAYERS, CHANNELS), one, torch.ones(5, 8, 8))))
    three = torch.randn(1, 3, 9, 5, LAYERS, CHANNELS)
    with pytest.raises(ValueError, match="3 speakers but 2 masks .* mask of speaker 3 is missing"):
        model(inputs(AudioWindow(three, one, torch.ones(2, 8, 8))))
    with pytest.raises(ValueError, match="1 to 6 speakers apart, not 7"):
        model(inputs(AudioWindow(torch.randn(1, 7, 9, 5, LAYERS, CHANNELS), one)))
    with pytest.raises(ValueError, match="read 24 features"):
        model(inputs(AudioWindow(torch.randn(1, 1, 9, 5, LAYERS, 9), one)))
    with pytest.raises(ValueError, match="4 latent frames but the video has 3"):
        model(inputs(AudioWindow(torch.randn(1, 1, 13, 5, LAYERS, CHANNELS), one)))


def test_payload_falls_silent_and_stacks():
    payload = AudioWindow(torch.randn(1, 1, 9, 5, LAYERS, CHANNELS), torch.tensor(1.0))
    silent = payload.without(frozenset({AUDIO}))
    assert payload.without(frozenset({"text"})) is payload
    both = payload.stack([silent])
    assert both.audio.shape[0] == 2 and both.audio[1].abs().max() == 0
    assert torch.equal(both.audio[:1], payload.audio)
    pair = AudioWindow(torch.randn(1, 2, 9, 5, LAYERS, CHANNELS), torch.tensor(1.0), torch.ones(3, 4, 4))
    silent = pair.without(frozenset({AUDIO, "text"}))
    assert silent.audio.shape[1] == 1 and silent.masks is None


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_the_host_does_not_wait_for_several_speakers(given, dtype):
    grid, device = (3, 6, 8), torch.device("cuda")
    masks = (torch.rand(2, 48, 64) > 0.5).float().to(device) if given else None
    q, k = (torch.randn(1, 3 * 6 * 8, 2, 64, device=device, dtype=dtype) for _ in range(2))

    def forward():
        scores = speaker_map(q, k, token_masks(masks, 2, grid, device))
        return speakers_module.query_positions(scores), speakers_module.key_positions(2, 8, device)

    forward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_audio_attention_within_a_part_of_another_system_is_not_its_own():
    system = MultiTalk(features=6, intermediate_dim=8, context_tokens=2, output_dim=4, voiced=(0,))
    assert system.owns("blocks.0.audio_cross_attn.q_linear.weight") and system.owns("blocks.11.norm_x.bias")
    assert not any(system.owns(f"blocks.0.wrapper.{name}") for name in ("audio_cross_attn.q.weight", "norm_x.bias"))
