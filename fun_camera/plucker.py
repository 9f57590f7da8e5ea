"""Camera paths as Pluecker embeddings: for each pixel the moment and the direction of its ray.

Source: CameraCtrl (He et al. 2024), as VideoX-Fun takes poses. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..wanvideo.frames import VAE_TIME_STRIDE

# The pictures that the focal lengths of poses are for.
POSE_SIZE = (1280, 720)
# A pose: time, fx, fy, cx, cy (shares of width and height), two zeros, and a world-to-camera matrix of 3 rows.
POSE_LENGTH = 19


def rays(poses: Sequence[Sequence[float]], width: int, height: int) -> Tensor:
    """Pluecker coordinates of every pixel's center, [n, 6, height, width] float32, in the space of the first camera.

    Raises ValueError if the poses are not rows of 19 numbers.
    """
    if not poses or any(len(pose) != POSE_LENGTH for pose in poses):
        raise ValueError(
            f"Camera poses are rows of {POSE_LENGTH} numbers (time, fx, fy, cx, cy, 0, 0, 3x4 world-to-camera matrix): "
            "connect a node that gives CAMERACTRL_POSES."
        )
    table = torch.tensor(poses, dtype=torch.float64)
    size = torch.tensor((width, height), dtype=torch.float64)
    focal, center = table[:, 1:3] * _widening(width, height) * size, table[:, 3:5] * size
    last_row = torch.tensor((0, 0, 0, 1), dtype=torch.float64).expand(len(poses), 1, 4)
    world_to_camera = torch.cat((table[:, 7:].reshape(-1, 3, 4), last_row), dim=1)
    camera_to_first = world_to_camera[0] @ torch.linalg.inv(world_to_camera)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((columns, rows), dim=-1).double() + 0.5
    # One frame at a time: in float64 all of them would take gigabytes.
    cameras = zip(center, focal, camera_to_first, strict=True)
    return torch.stack([_of_frame((pixels - c) / f, pose) for c, f, pose in cameras])


def _of_frame(planar: Tensor, camera_to_first: Tensor) -> Tensor:
    """planar [height, width, 2]: pixels on the plane at distance 1; camera_to_first [4, 4] -> [6, height, width]."""
    direction = functional.normalize(functional.pad(planar, (0, 1), value=1.0), dim=-1) @ camera_to_first[:3, :3].T
    moment = torch.linalg.cross(camera_to_first[:3, 3].expand_as(direction), direction)
    return torch.cat((moment, direction), dim=-1).permute(2, 0, 1).float()


def by_latent_frame(embedding: Tensor) -> Tensor:
    """Of 4n+1 frames [frames, C, H, W] the four behind each latent frame as channels: [1, 4 C, n + 1, H, W].

    A channel's four frames lie beside each other; the first frame counts four times.
    """
    frames = torch.cat((embedding[:1].expand(VAE_TIME_STRIDE, -1, -1, -1), embedding[1:]))
    groups = frames.unflatten(0, (-1, VAE_TIME_STRIDE)).transpose(1, 2).flatten(1, 2)
    return groups.transpose(0, 1)[None].contiguous()


def _widening(width: int, height: int) -> Tensor:
    """Factors of the focal lengths, which are shares of a picture that is wider or narrower than the video."""
    pose_shape, shape = POSE_SIZE[0] / POSE_SIZE[1], width / height
    factors = (pose_shape / shape, 1.0) if pose_shape > shape else (1.0, shape / pose_shape)
    return torch.tensor(factors, dtype=torch.float64)
