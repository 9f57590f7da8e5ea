"""What the nodes of long talking video ask for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..wanvideo.modules.vae import WanVAE


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a long talking video is made window by window (node WanVideoImageToVideoMultiTalk).

    start_images: [C, frames, height, width] in -1..1 at the target size, or None for audio only.
    window_frames: frames sampled at once (4n+1); motion_frames: frames that two windows share.
    mode: "auto", "multitalk", "infinitetalk" or "skyreelsv3"; output_path: folder for the frames, "" keeps them in
    memory. vae: the loaded VAE, used for the motion frames and the result. SkyReels V3 alone: drop_frames are cut from
    the end of every window but the last; reference_video, as start_images, gives windows the frame that they end with.
    """

    vae: WanVAE
    width: int
    height: int
    window_frames: int
    motion_frames: int
    mode: str = "auto"
    colormatch: str = "disabled"
    start_images: Tensor | None = None
    tiled_vae: bool = False
    offload_between_windows: bool = False
    output_path: str = ""
    drop_frames: int = 0
    reference_video: Tensor | None = None
