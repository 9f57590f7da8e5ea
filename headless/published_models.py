"""Which model a published transformer or module is, by the name of its file.

Models that were trained on from another have its shapes. How the weights are stored, a later part of the name says.
Sources: the authors' configurations; the keys and shapes of the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..animate.extension import Animate
from ..clip_image.extension import ClipImageExtension
from ..diffusion_forcing.extension import FrameRateEmbedding
from ..fantasyportrait.extension import FantasyPortrait
from ..fantasytalking.extension import FantasyTalking
from ..flashvsr.extension import FlashVsr
from ..fun_camera.extension import FunCamera
from ..fun_control.extension import FunControl
from ..humo.extension import HuMo
from ..longcat.extension import LongCat
from ..longcat_avatar.extension import LongCatAvatar
from ..lynx.extension import Lynx
from ..minimax_remover.extension import MiniMaxRemover
from ..mtv_crafter.extension import MtvCrafter
from ..multitalk.extension import MultiTalk
from ..one_to_all.extension import OneToAll
from ..ovi.extension import Ovi
from ..recammaster.extension import ReCamMaster
from ..s2v.extension import SpeechInjection
from ..scail.extension import Scail
from ..steadydancer.extension import SteadyDancer
from ..vace.extension import VaceExtension
from ..wanvideo.config import PUBLISHED_CONFIGS, WanConfig
from ..wanvideo.extension import Extension

Shape = tuple[int, ...]


def all_of_it(key: str) -> bool:
    """Every tensor of a model."""
    return True


@dataclass(frozen=True)
class Model:
    """A published transformer with its systems.

    holds: which of its tensors are in the file. own: tensors by which the file is told and which the transformer
    does not read.
    """

    config: WanConfig
    extensions: tuple[Extension, ...] = ()
    holds: Callable[[str], bool] = all_of_it
    own: tuple[tuple[str, Shape], ...] = ()


def module(config: WanConfig, system: Extension, *own: tuple[str, Shape]) -> Model:
    """The weights of one system alone, and tensors of its `own`."""
    return Model(config, (system,), system.owns, own)


SMALL, LARGE, FIVE = (PUBLISHED_CONFIGS[size] for size in ("1.3B", "14B", "5B"))
LONGCAT = WanConfig(dim=4096, ffn_dim=11008, num_heads=32, num_layers=48)
# 16 channels of pictures and 4 of their mask.
PICTURES = 16 + 20
WITH_PICTURES, SMALL_WITH_PICTURES = replace(LARGE, in_dim=PICTURES), replace(SMALL, in_dim=PICTURES)
CLIP = ClipImageExtension(clip_dim=1280)
BOTH_ENDS = ClipImageExtension(clip_dim=1280, positions=514)
# MultiTalk, InfiniteTalk and LongCat's avatar read the twelve layers of wav2vec2-base.
AUDIO_SIZES = {"features": 12 * 768, "intermediate_dim": 512, "context_tokens": 32, "output_dim": 768}
SPEECH = MultiTalk(**AUDIO_SIZES, voiced=tuple(range(40)))
HUMO = HuMo(features=51200, hidden_dim=512, context_tokens=16, output_dim=1536)
S2V = SpeechInjection(layers=25, audio_dim=1024, tokens=4, pose_dim=16)
CAMERA = FunCamera(factor=8, blocks=1)
OVI = Ovi(channels=20, hidden=8192, kernel=7)
ANIMATE = Animate(
    channels=(32, 64, 128, 256, 512, 512, 512, 512), style_dim=512, motion_dim=20, hidden_dim=1024, tokens=4, blocks=8,
    pose_dim=16,
)  # fmt: skip

T2V_SMALL, T2V, T2V_FIVE = Model(SMALL), Model(LARGE), Model(FIVE)
I2V, I2V_TWO_MODELS = Model(WITH_PICTURES, (CLIP,)), Model(WITH_PICTURES)

MODELS = (
    (r"wan2\.1_t2v_1\.3B|Wan2_1-T2V-1[-_]3B([-_](EchoShot|FlashVSR))?|Phantom-Wan-1_3B", T2V_SMALL),
    (r"wan2\.2_ti2v_5B|Wan2_2-TI2V-5B(-\w+)?", T2V_FIVE),
    (r"wan2\.1_t2v_14B|Wan2_1-T2V-14B(-Phantom)?|Phantom-Wan-14B|Wan2_1_mocha-14B-preview", T2V),
    (r"Wan2_2-T2V-A14B[-_](HIGH|LOW)|wan2\.2_t2v_(high|low)_noise_14B", T2V),
    (r"Wan2_1-I2V-14B-(480p|720p|MAGREF)|wan2\.1-i2v-14b-(480p|720p)|wan2\.1_i2v_(480p|720p)_14B", I2V),
    (r"Wan2_1(-Wan)?-I2V-ATI-14B|Wan21-WanMove|Wan2_1_SkyreelsA2", I2V),
    (r"Wan2_2-I2V-A14B-(HIGH|LOW)|wan2\.2_i2v_(high|low)_noise_14B", I2V_TWO_MODELS),
    (r"Wan2_1-FLF2V-14B-720P|wan2\.1_flf2v_720p_14B", Model(WITH_PICTURES, (BOTH_ENDS,))),
    (r"wan2\.1_fun_inp_1\.3B", Model(SMALL_WITH_PICTURES, (CLIP,))),
    (r"wan2\.1_fun_control_1\.3B", Model(replace(SMALL, in_dim=48), (FunControl(0), CLIP))),
    (
        r"Wan2\.1-Fun-V1\.1-1\.3B-Control-Camera|wan2\.1_fun_camera_v1\.1_1\.3B",
        Model(replace(SMALL, in_dim=32), (CAMERA, CLIP)),
    ),
    (r"wan2\.1_fun_camera_v1\.1_14B", Model(replace(LARGE, in_dim=32), (CAMERA, CLIP))),
    (
        r"Wan2_2-Fun-Control-A14B-(HIGH|LOW)|wan2\.2_fun_control_(high|low)_noise_14B",
        Model(replace(LARGE, in_dim=52), (FunControl(16),)),
    ),
    (
        r"Wan2_2-Fun-Control-Camera-A14B-(HIGH|LOW)|wan2\.2_fun_camera_(high|low)_noise_14B",
        Model(WITH_PICTURES, (CAMERA,)),
    ),
    (r"wan2\.1_vace_14B", Model(LARGE, (VaceExtension(8),))),
    (r"wan2\.1_vace_1\.3B", Model(SMALL, (VaceExtension(15),))),
    (r"Wan2_1-VACE_module_14B", module(LARGE, VaceExtension(8))),
    (r"Wan2_1-VACE_module_1_3B", module(SMALL, VaceExtension(15))),
    (r"Wan2_1-InfiniteTalk[-_](Single|Multi)|WanVideo_2_1_Multitalk_14B", module(LARGE, SPEECH)),
    (r"Wan21[-_]SkyReelsV3-A2V", Model(WITH_PICTURES, (CLIP, SPEECH))),
    (r"Wan2_1-HuMo-14B|humo_17B", Model(WITH_PICTURES, (HUMO,))),
    (r"fantasytalking", module(LARGE, FantasyTalking(2048), ("proj_model.proj.weight", (2048, 768)))),
    (
        r"Wan2_1_FantasyPortrait",
        module(
            LARGE, FantasyPortrait(2048), ("mouth_proj_model.proj_in.weight", (1280, 512)),
            ("emo_proj_model.proj_in.weight", (1280, 30)),
        ),
    ),
    (r"Wan2_1_MTV-Crafter_motion_adapter", module(LARGE, MtvCrafter(tuple(range(0, 40, 4))))),
    (r"Wan2_2-S2V-14B|wan2\.2_s2v_14B", Model(LARGE, (S2V,))),
    (r"Wan2_2-Animate-14B|wan2\.2_animate_14B", Model(WITH_PICTURES, (CLIP, ANIMATE))),
    (r"(Wan2\.1-|Wan21_)SteadyDancer", Model(WITH_PICTURES, (SteadyDancer(), CLIP))),
    (r"Wan21-14B-SCAIL-preview(_comfy)?", Model(replace(LARGE, in_dim=20), (Scail(20), CLIP))),
    (r"Wan21-OneToAllAnimation", Model(LARGE, (OneToAll(1, 7, channels=32, pose_dim=LARGE.dim),))),
    (r"Wan2_1_UniLumos_1_3B", Model(replace(SMALL, in_dim=48))),
    (r"Wan2_1_kwai_recammaster_1_3B_step20000", Model(SMALL, (ReCamMaster(),))),
    (r"Wan2_1-SkyReels-V2-DF-1_3B-540P", Model(SMALL, (FrameRateEmbedding(),))),
    (r"Wan2_1-SkyReels-V2-DF-14B-(540|720)P", Model(LARGE, (FrameRateEmbedding(),))),
    (r"Wan2_1-MiniMaxRemover_1_3B", Model(replace(SMALL, in_dim=48, text_dim=0), (MiniMaxRemover(),))),
    (r"Wan2_1_FlashVSR_LQ_proj_model", module(SMALL, FlashVsr((2048, 3072), layers=1))),
    (r"Wan2_1-T2V-Lynx_full_ref_layers", module(LARGE, Lynx(ref_blocks=tuple(range(40))))),
    (
        r"Wan2_1-T2V-Lynx_full_ip_layers",
        module(LARGE, Lynx(ip_blocks=tuple(range(40)), context_dim=5120, registers=16)),
    ),
    (
        r"Wan2_1-T2V-Lynx_lite_ip_layers",
        module(LARGE, Lynx(ip_blocks=tuple(range(0, 40, 2)), context_dim=2048, bias=False)),
    ),
    (r"LongCat_TI2V_comfy", Model(LONGCAT, (LongCat(512),))),
    (
        r"LongCat-Avatar(_comfy)?",
        Model(LONGCAT, (LongCat(512), LongCatAvatar(**AUDIO_SIZES, voiced=tuple(range(48)), width=512))),
    ),
    (r"model_960x960(_10s)?", Model(FIVE, (OVI,))),
    (r"Wan_2_[12]_Ovi_video_model", Model(FIVE, (OVI,), lambda key: not key.startswith("audio_model."))),
    (r"Wan_2_[12]_Ovi_audio_model", Model(FIVE, (OVI,), lambda key: key.startswith("audio_model."))),
)  # fmt: skip


def model_named(name: str) -> Model | None:
    """The model that a file of this name without storage and ending is; None for one that is not known."""
    return next((model for pattern, model in MODELS if re.fullmatch(pattern, name, re.IGNORECASE)), None)
