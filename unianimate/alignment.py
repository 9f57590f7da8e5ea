"""Poses of a video as another person would take them: UniAnimate's alignment to a reference pose.

The first pose of the video is measured against the reference, and all poses change alike: they are stretched so that
shoulders and trunk are as wide and as high, every bone is made as long as the reference's, and the neck of the first
one goes to the reference's. Source: ali-vilab/UniAnimate-DiT (run_align_pose). Points that are not visible are not
measured, where the authors measure the place that stands for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..wanvideo.onnx_models import Array
from .keypoints import LEFT_HAND, RIGHT_HAND, Pose

NECK = 1
SHOULDERS, HIPS = (2, 5), (8, 11)
# Bones from point to point, outwards. Neck and hips are where the stretched pose has them.
BONES = (
    (1, 0), (0, 14), (0, 15), (14, 16), (15, 17), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (8, 9), (9, 10),
    (11, 12), (12, 13),
)  # fmt: skip
# What goes along with the end of a limb.
ATTACHED = ((4, RIGHT_HAND), (7, LEFT_HAND), (13, 18), (10, 19))


@dataclass(frozen=True)
class Alignment:
    """scale: of x and y; ratios: of the bones; offset: of all points, after both."""

    scale: Array
    ratios: tuple[float, ...]
    offset: Array

    @classmethod
    def between(cls, first: Pose, reference: Pose) -> Self:
        """What makes the first pose of a video as large as the reference.

        Raises ValueError where either lacks a shoulder or a hip, or has no width or height between them.
        """
        extents = [_extent(pose, name) for pose, name in ((first, "pose_images"), (reference, "reference_pose_image"))]
        scale = extents[1] / extents[0]
        stretched = first.points * scale
        ratios = []
        for bone in BONES:
            lengths = [_length(points, bone) for points in (stretched, reference.points)]
            is_visible = first.visible[list(bone)].all() and reference.visible[list(bone)].all() and lengths[0] > 0
            ratios.append(float(lengths[1] / lengths[0]) if is_visible else 1.0)
        return cls(scale, tuple(ratios), reference.points[NECK] - stretched[NECK])

    def __call__(self, pose: Pose) -> Pose:
        """The pose of one frame."""
        stretched = pose.points * self.scale
        points = stretched.copy()
        for (start, end), ratio in zip(BONES, self.ratios, strict=True):
            points[end] = points[start] + ratio * (stretched[end] - stretched[start])
        for joint, places in ATTACHED:
            points[places] += points[joint] - stretched[joint]
        return Pose(points + self.offset, pose.visible)


def _extent(pose: Pose, name: str) -> Array:
    """From the right shoulder to the left, and from the shoulders down to the hips."""
    shoulders, hips = pose.points[list(SHOULDERS)], pose.points[list(HIPS)]
    extent = np.array((shoulders[1, 0] - shoulders[0, 0], hips[:, 1].mean() - shoulders[:, 1].mean()))
    if not pose.visible[[*SHOULDERS, *HIPS]].all() or not extent.all():
        raise ValueError(
            f"The poses cannot be aligned: both shoulders, side by side, and both hips must be visible in {name} (its "
            "first frame with a person). Choose another picture, lower score_threshold, or disconnect "
            "reference_pose_image to draw the poses as they are."
        )
    return extent


def _length(points: Array, bone: tuple[int, int]) -> float:
    return float(np.linalg.norm(points[bone[1]] - points[bone[0]]))
