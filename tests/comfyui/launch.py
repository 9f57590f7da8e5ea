"""Starts ComfyUI's server where torch is a CPU build: declares torchvision's operators if its compiled part is missing.

python launch.py COMFYUI_PATH [options of main.py]
"""

import runpy
import sys

import torch


def declare_torchvision():
    """Let torchvision import; returns what must be kept alive."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


if __name__ == "__main__":
    kept = declare_torchvision()
    root = sys.argv[1]
    sys.argv = [f"{root}/main.py", *sys.argv[2:]]
    sys.path.insert(0, root)
    runpy.run_path(sys.argv[0], run_name="__main__")
