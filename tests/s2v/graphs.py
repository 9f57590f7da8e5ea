"""The saved graphs of S2V, with features of speech in the place of the encoder's."""

from float64_wan import rand
from foreign_nodes import foreign, save_talking_clip
from saved_models import LIGHTX, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.s2v.extension import SpeechInjection

LAYERS, FEATURES = 3, 8
SIZES = SpeechInjection(layers=LAYERS, audio_dim=FEATURES, tokens=4, pose_dim=16)


def heard(audio, **_):
    """50 features a second, as the encoder gives them."""
    count = audio["waveform"].shape[-1] * 50 // audio["sample_rate"]
    return ({"encoded_audio_all_layers": [rand(1, count, FEATURES, seed=i) for i in range(LAYERS)]},)


def second_part(images):
    return None, 0, images[3:], len(images) - 3


NODES = {
    "AudioEncoderLoader": foreign(("AUDIO_ENCODER",), lambda: ("encoder",)),
    "AudioEncoderEncode": foreign(("AUDIO_ENCODER_OUTPUT",), heard),
    "ColorMatch": foreign(("IMAGE",), lambda image_ref, image_target: (image_target,)),
    "LazySwitchKJ": foreign(("IMAGE",), lambda on_false, on_true: (on_true,)),
    "VHS_LoadAudio": foreign(("AUDIO", "FLOAT"), lambda: ({"waveform": rand(1, 1, 48000), "sample_rate": 16000}, 3)),
    "VHS_SplitImages": foreign(("IMAGE", "INT", "IMAGE", "INT"), second_part),
}


def fill(files):
    model = tiny.transformer(in_dim=16, extensions=(SIZES,))
    save_fp8(model, files.diffusion / "S2V/Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    files.encoders(vae_dim=4)
    lora = tiny.lora(tiny.transformer(in_dim=16))
    lora.save(files.models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    for clip in ("weightoftheworld2.mp4", "weight-world-bones_00003-audio.mp4"):
        save_talking_clip(files.inputs / clip, 40)
    files.pictures("2b.jpg")


def case(name, videos, *edits):
    # Compiling takes longer than such a small model runs.
    compiling = ("WanVideoTorchCompileSettings",)
    small = ("WanVideoSampler.steps=2", "22.base_precision=fp32", "22.attention_mode=sdpa", "38.precision=fp32")
    return GraphCase(
        graph=f"wanvideo2_2_S2V_{name}_testing.json", fill=fill, videos=videos, edits=(*small, *edits), nodes=NODES,
        muted=compiling, sound=videos[0] / 16,
    )  # fmt: skip


# 33 frames are 2.06 seconds, of which three windows of 16 frames are made, or one of 33.
CASES = {
    "s2v_framepack": case(
        "framepack_pose", (33,), "131.value=64", "132.value=64", "37.num_frames=33", "106.frame_load_cap=33",
        "116.frame_load_cap=33", "117.frame_window_size=16", "143.num_frames=33",
    ),
    "s2v_context_windows": case(
        "context_window", (30,), "74.width=64", "74.height=64", "37.num_frames=33", "101.frame_window_size=33",
        "83.context_frames=17", "83.context_overlap=8",
    ),
}  # fmt: skip
