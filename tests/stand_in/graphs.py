"""The saved graph of Stand-In."""

from saved_models import LIGHTX, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.stand_in.extension import StandIn


def fill(files):
    whole = tiny.transformer(in_dim=16, extensions=(StandIn(rank=16),))
    pairs = {key: value for key, value in whole.tensors.items() if "_loras." in key}
    base = tiny.Tiny(tensors={k: v for k, v in whole.tensors.items() if k not in pairs}, metadata=whole.metadata)
    name = "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(base, files.diffusion / name, scaled=True)
    lora = files.models / "loras/WanVideo/Stand-In/Stand-In_wan2.1_T2V_14B_ver1.0.safetensors"
    tiny.Tiny(tensors=pairs).save(lora)
    tiny.lora(base).save(files.models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    files.encoders()
    files.pictures("pasted/image (970).png")


CASES = {
    "stand_in": GraphCase(
        graph="wanvideo_2_1_14B_Stand-In_reference_example_01.json",
        fill=fill,
        edits=(
            "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=5",
            "109.width=64", "109.height=64", "68.width=64", "68.height=64", "WanVideoModelLoader.attention_mode=sdpa",
            "WanVideoSampler.steps=2",
        ),
        # The face is cut out by other packs: a picture in its place.
        bypassed=("108",),
        muted=("136", "153"),
        videos=(5,),
    )
}  # fmt: skip
