"""The motion encoder of PD-FGC (Wang et al. 2023): a face to its pose, eyes, expression and mouth.

A face alignment network (FAN, Bulat and Tzimiropoulos 2017: one hourglass) whose 68 heat maps are joined into one row,
and a head for each part. Source: Dorniwang/PD-FGC-inference and Fantasy-AMAP/fantasy-portrait (FanEncoder). Module
names are the published checkpoint keys. Shapes: N frames, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wanvideo.checkpoint import open_checkpoint
from ..wanvideo.own_model import OwnModel, load_own
from .extension import MOTION

if TYPE_CHECKING:
    from ..host import Host

FACE_SIZE = 224
# Frames that are encoded at once.
BATCH = 16
DEPTH = 4
# The widths of the last layers of each head, in the order of the features; the mouth's features come from before it.
HEADS = ("headpose", "eye", "emo")
MOUTH = "mouth"


class Norm(nn.Module):
    """Batch norm by the statistics of training, which are parameters here, as all that a file holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_parameter(name, nn.Parameter(torch.zeros(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)


class ConvBlock(nn.Module):
    """Three convolutions, each behind norm and ReLU, whose outputs are joined, and a residual."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.bn2, self.bn3 = Norm(channels), Norm(out // 2), Norm(out // 4)
        self.conv1 = _conv3x3(channels, out // 2)
        self.conv2 = _conv3x3(out // 2, out // 4)
        self.conv3 = _conv3x3(out // 4, out // 4)
        self.downsample = None
        if channels != out:
            self.downsample = nn.Sequential(Norm(channels), nn.ReLU(), nn.Conv2d(channels, out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, out, H, W]."""
        half = self.conv1(F.relu(self.bn1(x)))
        quarter = self.conv2(F.relu(self.bn2(half)))
        last = self.conv3(F.relu(self.bn3(quarter)))
        return torch.cat((half, quarter, last), dim=1) + (x if self.downsample is None else self.downsample(x))


def _conv3x3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False)


class HourGlass(nn.Module):
    """Down to a sixteenth and up again, each level added to what it came from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for level in range(1, DEPTH + 1):
            for part in ("b1", "b2", "b3"):
                self.add_module(f"{part}_{level}", ConvBlock(channels, channels))
        self.b2_plus_1 = ConvBlock(channels, channels)

    def forward(self, x: Tensor, level: int = DEPTH) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        low = self.get_submodule(f"b2_{level}")(F.max_pool2d(x, 2))
        low = self(low, level - 1) if level > 1 else self.b2_plus_1(low)
        low = self.get_submodule(f"b3_{level}")(low)
        up = F.interpolate(low, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.get_submodule(f"b1_{level}")(x) + up


class FaceAlignmentNetwork(nn.Module):
    """A face [N, 3, 224, 224] in -1..1 to a row of features."""

    def __init__(self, first: int, width: int, maps: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, kernel_size=7, stride=2, padding=3)
        self.bn1 = Norm(first)
        self.conv2 = ConvBlock(first, width // 2)
        self.conv3 = ConvBlock(width // 2, width // 2)
        self.conv4 = ConvBlock(width // 2, width)
        self.m0 = HourGlass(width)
        self.top_m_0 = ConvBlock(width, width)
        self.conv_last0 = nn.Conv2d(width, width, kernel_size=1)
        self.bn_end0 = Norm(width)
        self.l0 = nn.Conv2d(width, maps, kernel_size=1)
        self.bn5 = Norm(maps)
        self.conv6 = nn.Conv2d(maps, 1, kernel_size=3, stride=2, padding=1)
        self.fc = nn.Linear((FACE_SIZE // 8) ** 2, features)

    def forward(self, x: Tensor) -> Tensor:
        """[N, features]."""
        x = self.conv2(F.relu(self.bn1(self.conv1(x))))
        x = self.top_m_0(self.m0(self.conv4(self.conv3(F.max_pool2d(x, 2)))))
        maps = self.l0(F.relu(self.bn_end0(self.conv_last0(x))))
        return self.fc(F.relu(self.conv6(F.relu(self.bn5(maps))).flatten(1)))


class FanEncoder(nn.Module):
    """A face to the features of its motion. widths: channels of each head's last layer."""

    def __init__(self, network: FaceAlignmentNetwork, features: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.model = network
        for name in (*HEADS, MOUTH):
            layers = nn.Linear(features, features), nn.ReLU(), Norm(features), nn.Linear(features, features)
            self.add_module(f"to_{name}", nn.Sequential(*layers))
        for name, width in zip(HEADS, widths, strict=True):
            self.add_module(f"{name}_embed", nn.Sequential(nn.ReLU(), nn.Linear(features, width)))

    def forward(self, faces: Tensor) -> Tensor:
        """[N, 3, 224, 224] in -1..1 -> [N, 554]: head pose, eyes, expression, mouth."""
        x = self.model(faces)
        heads = [self.get_submodule(f"{name}_embed")(self.get_submodule(f"to_{name}")(x)) for name in HEADS]
        return torch.cat((*heads, self.get_submodule(f"to_{MOUTH}")(x)), dim=1)


@torch.no_grad()
def encode_motion(owner: OwnModel, faces: Tensor) -> Tensor:
    """Faces [N, 3, 224, 224] in -1..1 -> features [N, 554] float32 on the CPU."""
    device = owner.managed.acquire()
    try:
        return torch.cat([owner.module[MOTION[:-1]](part.to(device)).cpu() for part in faces.split(BATCH)])
    finally:
        owner.managed.release()


def load_motion_encoder(path: Path, host: Host) -> OwnModel:
    """The motion encoder in a FantasyPortrait file, in float32. Raises ValueError for a file that has none."""
    checkpoint = open_checkpoint(path)
    shapes = {name.removeprefix(MOTION): s for name, s in checkpoint.shapes.items() if name.startswith(MOTION)}
    try:
        features = shapes["model.fc.weight"][0]
        with torch.device("meta"):
            network = FaceAlignmentNetwork(
                shapes["model.conv1.weight"][0], *reversed(shapes["model.l0.weight"][:2]), features
            )
            widths = tuple(shapes[f"{name}_embed.1.weight"][0] for name in HEADS)
            module = nn.ModuleDict({MOTION[:-1]: FanEncoder(network, features, widths)})
    except KeyError as error:
        raise ValueError(
            f"{path.name} has no motion encoder ('{MOTION}{error.args[0]}'), without which faces cannot be read: use a "
            "FantasyPortrait file that has it, such as Wan2_1_FantasyPortrait_fp16.safetensors."
        ) from error
    managed = load_own(
        module,
        checkpoint.chosen(lambda name: name.startswith(MOTION)),
        what="motion encoder",
        plan_of=lambda name: None,
        dtype_of=lambda name: torch.float32,
        host=host,
    )
    return OwnModel(path, (), managed)
