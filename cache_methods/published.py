"""Numbers that the authors of TeaCache and MagCache measured, by model.

teacache: polynomials, the highest power first (TeaCache4Wan2.1). The A14B models have none of their own and use those
of the 2.1 models of their kind. magcache: size of a step's change to that of the step before, over the schedule
(MagCache4Wan2.1, MagCache4Wan2.2; the passes with the prompt, from which those without hardly differ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..clip_image.extension import ClipImageExtension

if TYPE_CHECKING:
    from ..wanvideo.loading import WanVideoModel

SMALL, LARGE = 1536, 5120
A14B_NAMES = re.compile(r"a14b|2[._]2|high|low")


@dataclass(frozen=True, kw_only=True)
class Published:
    """The numbers of one model."""

    teacache: Mapping[str, tuple[float, ...]]
    magcache: tuple[float, ...]


MODELS = {
    "T2V 1.3B": Published(
        teacache={
            "e": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
            "e0": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
        },
        magcache=(
            1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535,
            0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349,
            0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504,
            0.9836, 0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241,
            0.86821, 0.81838,
        ),
    ),
    "T2V 14B": Published(
        teacache={
            "e": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
            "e0": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        },
        magcache=(
            1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468,
            0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215,
            0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838,
            0.98177, 0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693,
            0.8796, 0.86111,
        ),
    ),
    "I2V 14B 480p": Published(
        teacache={
            "e": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
            "e0": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
        },
        magcache=(
            1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065,
            0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411,
            0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973,
            0.93217, 0.91878, 0.90955, 0.92617,
        ),
    ),
    "I2V 14B 720p": Published(
        teacache={
            "e": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
            "e0": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        },
        magcache=(
            1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215,
            0.99515, 0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862,
            0.98718, 0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649,
            0.93397, 0.91636, 0.89088, 0.8679,
        ),
    ),
    "T2V A14B": Published(
        teacache={
            "e": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
            "e0": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        },
        magcache=(
            1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408, 0.9945, 0.99409,
            0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992, 0.99201, 0.99133, 0.99112, 0.99155,
            0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711, 0.98562, 0.98511, 0.98414, 0.98284, 0.98104, 0.97981,
            0.97849, 0.97557, 0.97398, 0.97171, 0.96917, 0.96511, 0.96263, 0.95839, 0.95483, 0.94942, 0.9468, 0.94583,
            0.94843, 0.96949,
        ),
    ),
    "I2V A14B": Published(
        teacache={
            "e": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
            "e0": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        },
        magcache=(
            1.0, 0.99512, 0.99559, 0.99595, 0.99512, 0.99546, 0.99543, 0.99496, 0.99504, 0.99444, 0.99481, 0.99435,
            0.9943, 0.99411, 0.99373, 0.99413, 0.99363, 0.99335, 0.99244, 0.99229, 0.99239, 0.99163, 0.99149, 0.99191,
            0.9898, 0.9899, 0.98849, 0.98846, 0.98861, 0.9874, 0.98588, 0.98539, 0.98444, 0.9831, 0.98119, 0.98001,
            0.97862, 0.97555, 0.97392, 0.97152, 0.96871, 0.96435, 0.96129, 0.95639, 0.95176, 0.94446, 0.93972, 0.93575,
            0.93537, 0.96655,
        ),
    ),
}  # fmt: skip


def variant_of(model: WanVideoModel, method: str) -> str:
    """Whose numbers are this model's. Shapes do not tell some models apart: then the file's name decides.

    Raises ValueError for a model of another size.
    """
    dim = model.config.dim
    if dim not in (SMALL, LARGE):
        raise ValueError(
            f"{method} has published numbers for the 1.3B and 14B models only, not for one of {dim} channels: use "
            "WanVideo EasyCache, or TeaCache with use_coefficients off."
        )
    return "T2V 1.3B" if dim == SMALL else _large(model)


def _large(model: WanVideoModel) -> str:
    file = model.path.name.lower()
    if model.config.in_dim == model.config.out_dim:
        return "T2V A14B" if A14B_NAMES.search(file) else "T2V 14B"
    # The 2.2 models take no CLIP features.
    if not any(isinstance(extension, ClipImageExtension) for extension in model.transformer.extensions):
        return "I2V A14B"
    return "I2V 14B 720p" if "720" in file else "I2V 14B 480p"
