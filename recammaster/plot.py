"""A picture of a camera's path: a pyramid for every pose, coloured by frame."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cameras import Pose, viewed

# Inches, at 100 pixels each.
SIZE = (18, 7)
BACKGROUND, LINES = "#353535", "#999999"
TICKS = 10
# Places smaller than this are rounding: the camera only turns.
STILL = 1e-3
UPRIGHT = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


def upright(poses: Sequence[Pose]) -> np.ndarray:
    """Poses [n, 4, 4] relative to the first, with z up, their largest coordinate 1 unless the camera only turns.

    poses: [4, 4] or [3, 4] each.
    """
    whole = [np.vstack((pose, (0, 0, 0, 1))) if len(pose) == 3 else pose for pose in map(np.asarray, poses)]
    cameras = np.stack([viewed(pose.astype(np.float64)) for pose in whole])
    relative = UPRIGHT @ np.linalg.inv(cameras[0]) @ cameras
    largest = np.abs(relative[:, :3, 3]).max()
    if largest > STILL:
        relative[:, :3, 3] /= largest
    return relative


def pyramid(pose: Pose, half_width: float, depth: float) -> list[np.ndarray]:
    """Faces [3 or 4, 3] of a pyramid with its tip at the camera, open to where it looks."""
    w = half_width
    corners = np.array([[0, 0, 0], [w, -w, depth], [w, w, depth], [-w, w, depth], [-w, -w, depth]])
    tip, *base = corners @ pose[:3, :3].T + pose[:3, 3]
    sides = [np.stack((tip, base[n], base[(n + 1) % 4])) for n in range(4)]
    return [*sides, np.stack(base)]


def draw(poses: Sequence[Pose], *, half_width: float, depth: float, scale: float, arrow: float) -> Tensor:
    """[1, H, W, 4] in 0..1. scale: of the space that is shown, 2 to each side; arrow: length, 0 for none.

    Raises ValueError where matplotlib is not installed.
    """
    try:
        import matplotlib.cm
        import matplotlib.colors
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from mpl_toolkits.mplot3d.art3d import Poly3DCollection
    except ImportError:
        raise ValueError(
            "'ReCamMaster Pose Visualizer' needs the package matplotlib, which is not installed: pip install "
            "matplotlib, or bypass the node."
        ) from None
    count, colors = len(poses), matplotlib.colormaps["rainbow"]
    with matplotlib.rc_context({"text.color": LINES}):
        figure = Figure(figsize=SIZE, facecolor=BACKGROUND)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(projection="3d", facecolor=BACKGROUND)
        axes.grid(color=LINES, linestyle="-", linewidth=0.5)
        axes.set_aspect("auto")
        sides = (-2.0 * scale, 2.0 * scale)
        axes.set(xlim=sides, ylim=sides, zlim=sides)
        for axis in "xyz":
            getattr(axes, f"set_{axis}label")(axis, color=LINES)
        for number, pose in enumerate(upright(poses)):
            color = colors(number / count)
            faces = pyramid(pose, half_width, depth)
            look = {"facecolors": color, "edgecolors": color, "linewidths": 0.3, "alpha": 0.35}
            axes.add_collection3d(Poly3DCollection(faces, **look))
            if arrow > 0:
                ahead = pose[:3, 2]
                start = pose[:3, 3] + ahead * half_width
                axes.quiver(*start, *ahead, color="black", length=arrow, arrow_length_ratio=0.1)
        shown = matplotlib.cm.ScalarMappable(norm=matplotlib.colors.Normalize(vmin=0, vmax=count), cmap=colors)
        bar = figure.colorbar(shown, ax=axes, orientation="vertical", ticks=range(0, count, TICKS))
        bar.set_label("Frame", color=LINES)
        bar.ax.yaxis.set_tick_params(colors=LINES)
        file = io.BytesIO()
        canvas.print_figure(file, format="png", bbox_inches="tight", pad_inches=0)
    with Image.open(file) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255)[None]
