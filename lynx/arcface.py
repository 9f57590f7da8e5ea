"""ArcFace (Deng et al. 2019): who a face is, as a unit vector, by an IR-SE50 network.

Source of the architecture and the keys: xinntao/facexlib (recognition_arcface_ir_se50.pth), whose weights are read from
a safetensors file. Shapes: B faces, C channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import Host
from ..wanvideo.checkpoint import open_checkpoint

NAME = "recognition_arcface_ir_se50.safetensors"
FOLDERS = ("clip_vision", "diffusion_models")
FACE_SIZE = 112
# Blocks of each stage; a stage halves the picture and, but for the first, doubles the channels.
UNITS = (3, 4, 14, 3)
SQUEEZE = 16


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture has of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // SQUEEZE, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // SQUEEZE, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return x * self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    """Two convolutions around a residual."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        if channels == out:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            SqueezeExcite(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H / stride, W / stride]."""
        return self.res_layer(x) + self.shortcut_layer(x)


class ArcFace(nn.Module):
    """width: channels of the first stage; embedding: of the result."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        blocks, channels = [], width
        for stage, units in enumerate(UNITS):
            out = width * 2**stage
            blocks += [Bottleneck(channels, out, 2), *(Bottleneck(out, out, 1) for _ in range(units - 1))]
            channels = out
        self.body = nn.Sequential(*blocks)
        cells = (FACE_SIZE // 2 ** len(UNITS)) ** 2
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(channels * cells, embedding),
            nn.BatchNorm1d(embedding),
        )

    def forward(self, faces: Tensor) -> Tensor:
        """[B, 3, 112, 112] RGB in -1..1 -> unit vectors [B, embedding]."""
        return F.normalize(self.output_layer(self.body(self.input_layer(faces.flip(1)))), dim=1)


def find_arcface(host: Host) -> Path:
    """The file of weights. Raises ValueError, with what to do, where there is none."""
    for kind in FOLDERS:
        for name in host.list_files(kind):
            if Path(name).name == NAME:
                return host.find_file(kind, name)
    raise ValueError(
        f"Lynx needs ArcFace's weights as {NAME} in models/clip_vision, and they are not there: convert facexlib's "
        f"{Path(NAME).stem}.pth, a pickle, to safetensors on a machine that you trust it on."
    )


@torch.no_grad()
def embedding_of(face: Tensor, path: Path, host: Host) -> Tensor:
    """The embedding [E] float32 of a face [112, 112, 3] in 0..1, by the weights at `path`.

    Raises ValueError for another size, or another kind of file.
    """
    if tuple(face.shape) != (FACE_SIZE, FACE_SIZE, 3):
        raise ValueError(
            f"ArcFace reads faces of {FACE_SIZE}x{FACE_SIZE} pixels but ip_image is {face.shape[1]}x{face.shape[0]}: "
            "crop it with Lynx InsightFace Crop, or by hand to the aligned face."
        )
    checkpoint = open_checkpoint(path)
    first, last = (checkpoint.shapes.get(f"{name}.weight") for name in ("input_layer.0", "output_layer.3"))
    if first is None or last is None:
        raise ValueError(f"{path.name} is no ArcFace IR-SE50 network: convert facexlib's file to safetensors.")
    with torch.device("meta"):
        model = ArcFace(first[0], last[0]).eval()
    wanted = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = next((k for k, shape in wanted.items() if checkpoint.shapes.get(k) != tuple(shape)), None)
    if wrong is not None:
        raise ValueError(f"{path.name} is no ArcFace IR-SE50 network: '{wrong}' is missing or of another size.")
    device = host.device()
    state = {k: checkpoint.tensor(k).float().to(device) for k in wanted}
    counts = {k: torch.zeros((), dtype=torch.long) for k in model.state_dict() if k not in wanted}
    model.load_state_dict(state | counts, assign=True)
    return model(face.permute(2, 0, 1)[None].float().to(device) * 2 - 1)[0].cpu()
