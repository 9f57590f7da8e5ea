"""The saved graph of VACE."""

import torch
from saved_models import save_clip
from system_graphs import GraphCase
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.vace.extension import VaceExtension

VACE = VaceExtension(blocks=2)


def fill(files):
    whole = tiny.transformer(in_dim=16, extensions=(VACE,)).tensors
    module = {key: value for key, value in whole.items() if VACE.owns(key)}
    base = {key: value for key, value in whole.items() if key not in module}
    tiny.Tiny(tensors=base, metadata={"wanvideo.num_heads": "2"}).save(
        files.diffusion / "wan2.1_t2v_1.3B_fp16.safetensors", torch.float16
    )
    tiny.Tiny(tensors=module).save(files.diffusion / "Wan2_1-VACE_module_1_3B_bf16.safetensors")
    files.encoders()
    save_clip(files.inputs / "wolf_interpolated.mp4", frames=5)
    files.pictures("hunhyuanwolf.png")


CASES = {
    "vace": GraphCase(
        graph="wanvideo_1_3B_VACE_examples_03.json",
        fill=fill,
        edits=(
            "229.width=64", "229.height=64", "172.steps=2", "22.base_precision=fp32", "38.precision=fp32",
            "147.use_coefficients=false", "WanVideoSLG.blocks=1",
        ),
        # Depth maps, padding, labels and previews of masks are of other packs.
        bypassed=("DepthAnything_V2", "AddLabel", "ImagePadKJ"),
        muted=("DownloadAndLoadDepthAnythingV2Model", "MaskPreview", "EmptyImage"),
        # The control video, and the result beside its inputs.
        videos=(5, 5),
    )
}  # fmt: skip
