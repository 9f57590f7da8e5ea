"""Camera paths against rotations of scipy and matrices of 4 rows."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as NODES
from wanvideo_wrapper.headless.core_nodes.cameras import LENS, MOTIONS


def basic(*arguments):
    return NODES["ADE_CameraPoseBasic"]().camera_pose_basic(*arguments)[0]


def combo(names, speed, frames, before=None):
    motions = {f"motion_type{i}": name for i, name in enumerate((*names, *("Static",) * 6)[:6], 1)}
    return NODES["ADE_CameraPoseCombo"]().camera_pose_combo(speed, frames, before, **motions)[0]


def matrices(poses):
    rows = np.array([pose[7:] for pose in poses]).reshape(-1, 3, 4)
    return np.concatenate([rows, np.broadcast_to([0, 0, 0, 1], (len(rows), 1, 4))], axis=1)


@pytest.mark.parametrize("name", MOTIONS)
def test_one_motion(name):
    poses = basic(name, 0.5, 9)
    turn, shift = (np.array(part) for part in MOTIONS[name])
    for frame, pose in enumerate(poses):
        share = 0.5 * frame / 16
        want = np.concatenate(
            [Rotation.from_rotvec(turn * share * math.pi / 3).as_matrix(), shift[:, None] * share * 1.5], axis=1
        )
        assert pose[:7] == list(LENS) and np.allclose(np.reshape(pose[7:], (3, 4)), want, atol=1e-12)


def test_motions_add_up_and_follow_each_other():
    names = ("Tilt Up", "Roll Clockwise", "Tilt Left", "Zoom In", "Pan Up")
    poses = matrices(combo(names, 0.7, 6))
    for frame, matrix in enumerate(poses):
        angles = np.array([-1, 1, -1]) * 0.7 * frame / 16 * math.pi / 3
        assert np.allclose(matrix[:3, :3], Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-12)
        assert np.allclose(matrix[:3, 3], np.array([0, 1, -2]) * 0.7 * frame / 16 * 1.5)
    before = combo(names, 0.7, 6)
    path = basic("Pan Right", 1.0, 4, before)
    assert path[:6] == before and len(path) == 10
    alone = matrices(basic("Pan Right", 1.0, 4))
    assert np.allclose(matrices(path)[6:], alone @ poses[-1], atol=1e-12)
    turned = matrices(basic("Tilt Left", 1.0, 4))
    assert np.allclose(matrices(basic("Tilt Left", 1.0, 4, before))[6:], turned @ poses[-1], atol=1e-12)


def test_a_path_is_what_fun_camera_takes():
    (embeds,) = N["WanVideoFunCameraEmbeds"]().process(basic("Zoom Out", 0.2, 9), 64, 64, 1.0, 0.0, 1.0)
    assert embeds.num_frames == 9 and embeds.payloads
