import torch
from contract import Case
from wanvideo_wrapper.fun_camera.extension import CameraPath, FunCamera

CASES = {
    "fun_camera": Case(FunCamera(factor=2, blocks=1), CameraPath(torch.randn(1, 24, 3, 8, 8))),
}
