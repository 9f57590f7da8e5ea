"""The saved graph of Lynx, with the face where the template has it."""

import tiny_faces
from saved_models import LIGHTX, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.lynx.extension import Lynx
from wanvideo_wrapper.lynx.faces import TEMPLATE, crops
from wanvideo_wrapper.lynx.nodes import LynxInsightFaceCrop

LYNX = Lynx(ip_blocks=(0, 2), context_dim=32, bias=False, ref_blocks=(0, 1, 2))


class CropsWithoutDetector(LynxInsightFaceCrop):
    """In the place of the detector of another package."""

    def encode(self, image):
        both = crops(image[0, ..., :3], TEMPLATE)
        return both.ip[None], both.ref[None]


def fill(files):
    whole = tiny.transformer(in_dim=16, extensions=(LYNX,))
    parts = {"ip": {}, "ref": {}, "base": {}}
    for key, value in whole.tensors.items():
        parts["ip" if "ip_adapter" in key else "ref" if "ref_adapter" in key else "base"][key] = value
    base, folder = tiny.Tiny(tensors=parts["base"], metadata=whole.metadata), files.diffusion / "lynx"
    name = "fp8_scaled_kj/T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(base, files.diffusion / name, scaled=True)
    tiny.Tiny(tensors=parts["ref"]).save(folder / "Wan2_1-T2V-Lynx_full_ref_layers_fp16.safetensors")
    tiny.Tiny(tensors=parts["ip"]).save(folder / "Wan2_1-T2V-Lynx_lite_ip_layers_fp16.safetensors")
    tiny_faces.save_resampler(folder / "lynx_lite_resampler_fp32.safetensors", LYNX.context_dim)
    tiny_faces.save_arcface(files.models / "clip_vision")
    tiny.lora(base).save(files.models / "loras" / LIGHTX.format("T2V", "", "v2_lora_", "_"))
    files.encoders()
    files.pictures("oldman_upscaled.png")


CASES = {
    "lynx": GraphCase(
        graph="wanvideo_2_1_14B_T2V_14B_lynx_example_01.json",
        fill=fill,
        edits=(
            "WanVideoEmptyEmbeds.width=64", "WanVideoEmptyEmbeds.height=64", "WanVideoEmptyEmbeds.num_frames=5",
            "WanVideoModelLoader.attention_mode=sdpa", "WanVideoSampler.steps=2",
            "WanVideoLoraSelectMulti.lora_1=none",
        ),
        muted=("37",),
        nodes={"LynxInsightFaceCrop": CropsWithoutDetector},
        videos=(5,),
    )
}  # fmt: skip
