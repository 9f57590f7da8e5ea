"""The saved graph of FlashVSR."""

from safetensors.torch import save_file
from saved_models import save_clip
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.flashvsr.decoder import DecoderLayout, FlashVsrDecoder
from wanvideo_wrapper.flashvsr.extension import FlashVsr

SYSTEM = FlashVsr(hidden=(8, 12), layers=1)


def fill(files):
    whole = tiny.transformer(in_dim=16, extensions=(SYSTEM,)).tensors
    module = {key: value for key, value in whole.items() if SYSTEM.owns(key)}
    base = {key: value for key, value in whole.items() if key not in module}
    folder = files.diffusion / "FlashVSR"
    tiny.Tiny(tensors=base, metadata={"wanvideo.num_heads": "2"}).save(
        folder / "Wan2_1-T2V-1_3B_FlashVSR_fp32.safetensors"
    )
    tiny.Tiny(tensors=module).save(folder / "Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors")
    files.encoders()
    decoder = FlashVsrDecoder(DecoderLayout((8, 6, 4, 4), (1, 2, 2)))
    save_file(decoder.state_dict(), files.models / "vae/Wan2_1_FlashVSR_TCDecoder_fp32.safetensors")
    save_clip(files.inputs / "example0.mp4", frames=9)


CASES = {
    "flashvsr": GraphCase(
        graph="wanvideo_1_3B_FlashVSR_upscale_example.json",
        fill=fill,
        edits=(
            "116.width=64", "116.height=64", "78.width=64", "78.height=64", "78.num_frames=9",
            "22.base_precision=fp32", "119.precision=fp32",
        ),
        videos=(9,),
    )
}  # fmt: skip
