"""The saved graphs of Animate run headless to a video: tiny models, and fixed outputs of the detectors.

The graphs are not part of the project: WANVIDEO_GRAPHS names their folder (default: ../shared/workflows).
"""

import pytest
import torch
from foreign_nodes import foreign, run_graph, save_talking_clip
from PIL import Image
from saved_models import GRAPHS, LIGHTX, save_fp8
from wanvideo_wrapper.animate.extension import Animate
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.demo import INPUT, tiny

# Faces of 512 pixels take eight layers.
SIZES = Animate(channels=(2,) * 8, style_dim=8, motion_dim=4, hidden_dim=8, tokens=2, blocks=1, pose_dim=16)
FACE = [value for x, y in [(20, 20), (44, 20), (44, 44), (20, 44)] * 5 for value in (x, y, 1.0)]


def masks(image):
    mask = torch.zeros(image.shape[:3])
    mask[:, 16:48, 16:48] = 1
    return mask


def keypoints(image, **_):
    frame = {"canvas_width": 64, "canvas_height": 64, "people": [{"face_keypoints_2d": FACE}]}
    return image, [frame] * len(image)


def without(image, mask):
    return (image * (1 - mask[..., None]),)


FOREIGN = {
    "DownloadAndLoadSAM2Model": foreign(("SAM2MODEL",), lambda: (None,)),
    "Sam2Segmentation": foreign(("MASK",), lambda image, **_: (masks(image),)),
    "PointsEditor": foreign(("STRING", "STRING", "BBOX", "MASK", "IMAGE"), lambda bg_image: ("", "", None, None, None)),
    "PixelPerfectResolution": foreign(("INT",), lambda **_: (64,)),
    "DWPreprocessor": foreign(("IMAGE", "POSE_KEYPOINT"), keypoints),
    "ImageCropByMaskAndResize": foreign(("IMAGE", "MASK", "BBOX"), lambda image, mask: (image, mask, None)),
    "BlockifyMask": foreign(("MASK",), lambda masks: (masks,)),
    "GrowMaskWithBlur": foreign(("MASK", "MASK"), lambda mask: (mask, 1 - mask)),
    "DrawMaskOnImage": foreign(("IMAGE",), without),
    "OnnxDetectionModelLoader": foreign(("POSEMODEL",), lambda: (None,)),
    "PoseAndFaceDetection": foreign(
        ("POSEDATA", "IMAGE", "STRING", "BBOX", "BBOX"), lambda images, **_: (images, images, "", None, None)
    ),
    "DrawViTPose": foreign(("IMAGE",), lambda pose_data, **_: (pose_data,)),
}
# Seventeen frames in two windows of nine.
EDITS = (
    "150.value=64", "151.value=64", "63.frame_load_cap=17", "62.frame_window_size=9", "27.steps=2",
    "22.base_precision=fp32", "22.attention_mode=sdpa", "38.precision=fp32", "64.keep_proportion=pad",
)  # fmt: skip


@pytest.mark.parametrize("graph", ["example_01", "preprocess_example_02"])
def test_graph_runs_to_a_video(graph, tmp_path, monkeypatch):
    graph = GRAPHS / f"wanvideo_WanAnimate_{graph}.json"
    if not graph.is_file():
        pytest.skip(f"no {graph} (set WANVIDEO_GRAPHS)")
    models, inputs = tmp_path / "models", tmp_path / "input"
    model = tiny.transformer(in_dim=36, extensions=(ClipImageExtension(clip_dim=tiny.CLIP_DIM), SIZES))
    file = models / "diffusion_models/WanVideo/2_2/Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors"
    save_fp8(model, file, scaled=True)
    tiny.vae(base_dim=4).save(models / "vae/wanvideo/Wan2_1_VAE_bf16.safetensors")
    tiny.text_encoder().save(models / "text_encoders/umt5-xxl-enc-bf16.safetensors")
    tiny.clip_vision().save(models / "clip_vision/clip_vision_h.safetensors")
    lora = tiny.lora(tiny.image_to_video())
    lora.save(models / "loras/WanVideo/WanAnimate_relight_lora_fp16.safetensors")
    lora.save(models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    save_talking_clip(inputs / "raw.mp4", 20)
    with Image.open(INPUT / "portrait.png") as portrait:
        portrait.convert("RGB").save(inputs / "refer.jpeg")
    muted = ("WanVideoTorchCompileSettings",)
    videos = run_graph(graph, tmp_path, monkeypatch, nodes=FOREIGN, edits=EDITS, muted=muted)
    assert videos and set(videos.values()) == {17}
