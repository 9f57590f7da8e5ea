"""Nodes of experimental sampling options."""

from __future__ import annotations

import logging

from ..node_checks import Types, verdict
from ..node_tools import CATEGORY, Inputs, mappings, whole_numbers
from ..wanvideo.modifier import Modifier
from .extension import SplitByPrompts
from .formulas import FrequencyScales
from .guidance import TextGuidance
from .positions import ScaledPositions
from .velocity import TemporalScoreRescaling, ZeroInit

log = logging.getLogger("wanvideo")

ROPE_FUNCTIONS = ["default", "comfy", "comfy_chunked"]


class WanVideoExperimentalArgs:
    """Experimental changes of guidance, velocity and attention."""

    DISPLAY_NAME = "WanVideo Experimental Args"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = ("EXPERIMENTALARGS",)
    RETURN_NAMES = ("exp_args",)
    EXPERIMENTAL = True
    DESCRIPTION = "Experimental ways of guidance and sampling, each off until it is chosen. Several work together."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        def off(tooltip: str) -> tuple[str, dict[str, object]]:
            return "BOOLEAN", {"default": False, "tooltip": tooltip}

        def number(default: float, tooltip: str, most: float = 10.0) -> tuple[str, dict[str, object]]:
            return "FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.01, "tooltip": tooltip}

        split = "Steps, counted from 0 and separated by commas, in which each prompt's frames attend to themselves only"
        steps = {"default": 0, "min": 0, "tooltip": "Last step of use_zero_init, counted from 0"}
        cutoff = {"default": 20, "min": 0, "max": 10000, "step": 1, "tooltip": "FreSca: how many frequencies are low"}
        return {
            "required": {
                "video_attention_split_steps": ("STRING", {"default": "", "tooltip": split}),
                "cfg_zero_star": off("CFG-Zero*: scales the pass without the prompt to lie near the other"),
                "use_zero_init": off("With cfg_zero_star: leaves the noise as it is in the first steps"),
                "zero_star_steps": ("INT", steps),
                "use_fresca": off("FreSca: scales low and high frequencies of guidance apart"),
                "fresca_scale_low": number(1.0, "FreSca: scale of low frequencies"),
                "fresca_scale_high": number(1.25, "FreSca: scale of high frequencies"),
                "fresca_freq_cutoff": ("INT", cutoff),
                "use_tcfg": off("TCFG: takes out of the pass without the prompt what leads off the other"),
                "raag_alpha": number(0.0, "RAAG: lowers cfg where the passes differ much; 1 is usual, 0 is off"),
                "bidirectional_sampling": off("No effect: the reversed pass answers as the plain one, reversed"),
                "temporal_score_rescaling": off("TSR: samples at another temperature"),
                "tsr_k": number(0.95, "TSR: the temperature, more than 0; 1 changes nothing", 100.0),
                "tsr_sigma": number(1.0, "TSR: how early it acts", 1.0),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        video_attention_split_steps: str = "",
        temporal_score_rescaling: bool = False,
        tsr_k: float = 0.95,
        input_types: Types | None = None,
    ) -> bool:
        """A list of whole numbers, and a factor."""
        values = {"video_attention_split_steps": video_attention_split_steps, "tsr_k": tsr_k}
        return verdict(cls, _split_steps, input_types, temporal_score_rescaling=temporal_score_rescaling, **values)

    def process(
        self,
        video_attention_split_steps: str,
        cfg_zero_star: bool,
        use_zero_init: bool,
        zero_star_steps: int,
        use_fresca: bool,
        fresca_scale_low: float,
        fresca_scale_high: float,
        fresca_freq_cutoff: int,
        use_tcfg: bool,
        raag_alpha: float,
        bidirectional_sampling: bool,
        temporal_score_rescaling: bool,
        tsr_k: float,
        tsr_sigma: float,
    ) -> tuple[tuple[Modifier, ...]]:
        """The options that are on, the outermost first. Raises ValueError for a list that is not of whole numbers."""
        steps = _split_steps(video_attention_split_steps, temporal_score_rescaling, tsr_k)
        if bidirectional_sampling:
            # With latents, conditions and positions reversed alike, attention answers the same, reversed: the mean of
            # both passes is the first one, at half its cost.
            log.warning("bidirectional_sampling has no effect: the reversed pass answers as the plain one, reversed.")
        if use_zero_init and not cfg_zero_star:
            log.warning("use_zero_init has no effect without cfg_zero_star.")
        fresca = FrequencyScales(fresca_scale_low, fresca_scale_high, fresca_freq_cutoff) if use_fresca else None
        modifiers: list[Modifier] = []
        if temporal_score_rescaling:
            modifiers.append(TemporalScoreRescaling(tsr_k, tsr_sigma))
        if cfg_zero_star and use_zero_init:
            modifiers.append(ZeroInit(zero_star_steps))
        if cfg_zero_star or use_tcfg or raag_alpha > 0 or fresca is not None:
            modifiers.append(
                TextGuidance(
                    zero_star=cfg_zero_star, projected=use_tcfg, raag_alpha=raag_alpha, frequencies=fresca
                )
            )
        if steps:
            modifiers.append(SplitByPrompts(steps))
        return (tuple(modifiers),)


def _split_steps(video_attention_split_steps: str, temporal_score_rescaling: bool, tsr_k: float) -> tuple[int, ...]:
    """The steps of the list. Raises ValueError for another list, or a factor that cannot rescale."""
    if temporal_score_rescaling and tsr_k <= 0:
        raise ValueError("tsr_k must be more than 0: 1 changes nothing, a little less gives calmer videos.")
    return whole_numbers("video_attention_split_steps", video_attention_split_steps)


class WanVideoRoPEFunction:
    """Scales the positions of the video, for rope_function of a sampler."""

    DISPLAY_NAME = "WanVideo RoPE Function"
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES = (ROPE_FUNCTIONS,)
    RETURN_NAMES = ("rope_function",)
    EXPERIMENTAL = True
    DESCRIPTION = (
        "Lets positions in time, height or width turn slower, so that a model makes larger or longer videos than it "
        "was trained on (NTK-aware scaling, as in CineScale)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        def factor(tooltip: str) -> tuple[str, dict[str, object]]:
            return "FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": tooltip}

        function = {"default": "comfy", "tooltip": "All run the same kernel here, scaled or not"}
        return {
            "required": {
                "rope_function": (ROPE_FUNCTIONS, function),
                "ntk_scale_f": factor("Factor on the base of positions in time; more than 1 for longer videos"),
                "ntk_scale_h": factor("The same from top to bottom; for higher videos"),
                "ntk_scale_w": factor("The same from left to right; for wider videos"),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        ntk_scale_f: float = 1.0,
        ntk_scale_h: float = 1.0,
        ntk_scale_w: float = 1.0,
        input_types: Types | None = None,
    ) -> bool:
        """Factors above 0."""

        def check(**values: float) -> None:
            ScaledPositions(*values.values())

        factors = {"ntk_scale_f": ntk_scale_f, "ntk_scale_h": ntk_scale_h, "ntk_scale_w": ntk_scale_w}
        return verdict(cls, check, input_types, **factors)

    def process(
        self, rope_function: str, ntk_scale_f: float, ntk_scale_h: float, ntk_scale_w: float
    ) -> tuple[str | ScaledPositions]:
        """The name where nothing is scaled, else what scales."""
        scaled = ScaledPositions(ntk_scale_f, ntk_scale_h, ntk_scale_w)
        return (rope_function if scaled == ScaledPositions() else scaled,)


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoExperimentalArgs, WanVideoRoPEFunction)
