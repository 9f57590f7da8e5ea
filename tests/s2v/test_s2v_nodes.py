"""The node: features of the speech by the frame, what it emits, and what it refuses."""

import numpy as np
import pytest
import torch
from float64_wan import rand
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.s2v.audio import frame_features
from wanvideo_wrapper.s2v.extension import SpeechToVideo
from wanvideo_wrapper.s2v.loop import SpeechLoop

EMBEDS = N["WanVideoEmptyEmbeds"]().process(33, 64, 64)[0]


def heard(features=150, layers=3):
    return {"encoded_audio_all_layers": [rand(1, features, 4, seed=i) for i in range(layers)]}


def published(layers, num_frames, window):
    """Every frame's row by its time: 50 features a second, read at 30, of which a frame takes the nearest."""
    states = torch.cat(layers).double().numpy()
    count = int(states.shape[1] / 50 * 30)
    at = np.linspace(0, states.shape[1] - 1, count)
    speech = np.stack([[np.interp(at, np.arange(states.shape[1]), c) for c in layer.T] for layer in states])
    speech = speech[..., : num_frames * 30 // 16]
    windows = int(speech.shape[-1] / (window * 1.875)) + 1
    out = np.zeros((*speech.shape[:2], windows * window))
    for frame in range(windows * window):
        place = int(np.round(frame / 16 * 30))
        if place < speech.shape[-1]:
            out[..., frame] = speech[..., place]
    return torch.from_numpy(out)[None]


@pytest.mark.parametrize(
    ("features", "num_frames", "window"), [(150, 33, 33), (150, 33, 16), (40, 33, 16), (400, 81, 81)]
)
def test_a_row_of_features_a_frame(features, num_frames, window):
    layers = heard(features)["encoded_audio_all_layers"]
    got, want = frame_features(layers, num_frames, window), published(layers, num_frames, window)
    assert got.shape == want.shape and got.shape[-1] % window == 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_what_the_node_emits():
    # Of a batch, the first.
    reference, pose = ({"samples": rand(2, 16, n, 8, 8)} for n in (1, 9))
    add = N["WanVideoAddS2VEmbeds"]().add
    embeds, frames = add(EMBEDS, 33, heard(), 0.5, reference, pose, None, 0.1, 0.9)
    (speech,) = embeds.payloads
    assert isinstance(speech, SpeechToVideo) and frames == 33 == speech.audio.shape[-1] and embeds.loop is None
    assert float(speech.scale) == 0.5 and (speech.start, speech.end) == (0.1, 0.9)
    assert torch.equal(speech.reference, reference["samples"][:1]) and torch.equal(speech.pose, pose["samples"][:1])
    embeds, frames = add(EMBEDS, 16)
    assert embeds.payloads[0].audio is None and frames == 0


def test_a_cut_of_the_speech_is_named(caplog):
    add = N["WanVideoAddS2VEmbeds"]().add
    add(EMBEDS, 33, heard(103))
    assert not caplog.records
    add(EMBEDS, 33, heard(150))
    assert "The speech lasts 3.00 s, of which num_frames leaves the first 2.06 s" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"audio_encoder_output": {"encoded_audio": 0}}, "no 'encoded_audio_all_layers': connect AudioEncoderEncode"),
        ({"audio_encoder_output": heard(1)}, "less than a frame of video"),
        ({"audio_encoder_output": heard(), "enable_framepack": True}, "enable_framepack needs vae and"),
        ({"vae": object(), "enable_framepack": True}, "enable_framepack needs vae and audio_encoder_output"),
    ],
)
def test_what_is_missing_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        N["WanVideoAddS2VEmbeds"]().add(EMBEDS, 16, **options)


@pytest.mark.parametrize("size", [4, 18])
def test_windows_of_whole_latents(size):
    with pytest.raises(ValueError, match="multiple of 4, and 8 or more"):
        SpeechLoop(vae=None, window_frames=size)
