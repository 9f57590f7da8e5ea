"""The saved graphs of Animate, with fixed outputs of the detectors."""

import torch
from foreign_nodes import foreign, save_talking_clip
from saved_models import LIGHTX, save_fp8
from system_graphs import GraphCase
from wanvideo_wrapper.animate.extension import Animate
from wanvideo_wrapper.clip_image.extension import ClipImageExtension
from wanvideo_wrapper.demo import tiny

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


NODES = {
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


def fill(files):
    model = tiny.transformer(in_dim=36, extensions=(ClipImageExtension(clip_dim=files.clip_dim), SIZES))
    save_fp8(model, files.diffusion / "2_2/Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors", scaled=True)
    files.encoders(vae_dim=4, clip=True)
    lora = tiny.lora(tiny.image_to_video(clip_dim=files.clip_dim))
    lora.save(files.models / "loras/WanVideo/WanAnimate_relight_lora_fp16.safetensors")
    lora.save(files.models / "loras" / LIGHTX.format("I2V", "_480p", "", ""))
    save_talking_clip(files.inputs / "raw.mp4", 20)
    files.pictures("refer.jpeg")


CASES = {
    name: GraphCase(
        graph=f"wanvideo_WanAnimate_{graph}.json", fill=fill, edits=EDITS, nodes=NODES,
        muted=("WanVideoTorchCompileSettings",), videos=videos, sound=17 / 16,
    )
    # Poses, faces and masks are videos, too.
    for name, graph, videos in (
        ("animate", "example_01", (17,) * 3), ("animate_preprocess", "preprocess_example_02", (17,) * 4)
    )
}  # fmt: skip
