"""`wanvideo doctor` as a node, with a test of what it says: every option that runs here is run and compared."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import attention, doctor
from .attention import AttentionSpec
from .host import get_host
from .host.protocol import DEMO_MODELS
from .image_to_video.nodes import WanVideoImageToVideoEncode
from .node_tools import CATEGORY, Inputs, mappings
from .nodes_demo import WanVideoDemoInputs
from .nodes_sampler import WanVideoSampler
from .registry import SYSTEMS
from .wanvideo.load_plan import LoadOptions
from .wanvideo.loading import load_wan_model
from .wanvideo.modules.t5 import load_text_encoder
from .wanvideo.modules.vae import load_vae
from .wanvideo.request import ImageEmbeds, TextEmbeds

log = logging.getLogger("wanvideo")

TOKENS = 1024
SIDE, FRAMES = 64, 9
# Further off than any format or kernel of the list: it computes something else.
MOST_ERROR = 0.5
# They leave out or weaken far tokens of a video, so that random tokens say nothing of them.
NOT_TRIED = ("radial_sage_attention", "sol_attn", "sageattn_ultravico")


class WanVideoDoctor:
    """Says which options run on this machine, why the others do not, and tries those that do."""

    DISPLAY_NAME = "WanVideo Doctor"
    DESCRIPTION = (
        "Says which quantization and attention options run on this machine, why the others do not and how to get them. "
        "The self-test runs each on tiny inputs, in about a minute. The text goes to the log and to the output."
    )
    CATEGORY = CATEGORY
    FUNCTION = "examine"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tip = "Run every option that can run, and compare it with full precision"
        return {"required": {"self_test": ("BOOLEAN", {"default": True, "tooltip": tip})}}

    @classmethod
    def IS_CHANGED(cls, self_test: bool) -> float:
        """Never what it was: packages may have been installed since."""
        return float("nan")

    def examine(self, self_test: bool) -> dict[str, object]:
        """The table as `wanvideo doctor` prints it, and a line for each option that was tried."""
        device = get_host().device()
        findings = doctor.examine(device)
        report = doctor.as_table(findings, device)
        if self_test:
            report = "\n".join([report, "", "self-test", *self_tested(findings, device)])
        log.info("%s", report)
        return {"ui": {"text": [report]}, "result": (report,)}


def self_tested(findings: list[doctor.Finding], device: torch.device) -> Iterator[str]:
    """A line for each option that runs, but for NOT_TRIED: its relative distance from full precision, and its time."""
    able = [finding for finding in findings if finding.runs and finding.option not in NOT_TRIED]
    runs = {"attention_mode": _attention_runs(device), "quantization": _quantization_runs(device)}
    host = get_host()
    with host.progress(len(able), "Self-test") as progress:
        for number, finding in enumerate(able, 1):
            host.check_cancelled()
            run, exact = runs[finding.widget]
            yield f"  {finding.option:24}{_verdict(run, finding.option, exact)}"
            progress.update(number, note=finding.option)


def _verdict(run: Callable[[str], Tensor], option: str, exact: Tensor) -> str:
    began = time.monotonic()
    try:
        result = run(option).float().cpu()
    except (ValueError, RuntimeError, ImportError) as error:
        return f"FAILED: {error}"
    seconds = time.monotonic() - began
    error = float((result - exact).norm() / exact.norm())
    # "Not less" instead of "more", so that NaN fails too.
    if not error < MOST_ERROR:
        return f"FAILED: {error:.2g} from full precision"
    return f"works, {error:.1e} from full precision, {seconds:.2f} s"


def _attention_runs(device: torch.device) -> tuple[Callable[[str], Tensor], Tensor]:
    """What runs a mode on random tokens, and the result of full precision."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = AttentionSpec(device=device, heads=doctor.HEADS, head_dim=doctor.HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    shape = (1, TOKENS, doctor.HEADS, doctor.HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q, k, v))).transpose(1, 2).cpu()
    return lambda name: attention.resolve(name, spec)(q, k, v), exact


def _quantization_runs(device: torch.device) -> tuple[Callable[[str], Tensor], Tensor]:
    """What runs a step of the demo's model with a quantization, and the result of full precision."""
    host = get_host()
    vae = load_vae(DEMO_MODELS / "vae" / "tiny_wan_vae.safetensors", dtype=torch.float32, host=host)
    picture, _ = WanVideoDemoInputs().load()
    encoded = WanVideoImageToVideoEncode().process(
        SIDE, SIDE, FRAMES, True, 0.0, 1.0, 1.0, vae=vae, start_image=picture
    )
    encoder = load_text_encoder(
        DEMO_MODELS / "text_encoders" / "tiny_umt5.safetensors", dtype=torch.float32, host=host
    )
    prompt = TextEmbeds(positive=tuple(encoder.encode(["a person talks to the camera"])))
    encoder.managed.release()
    fast = torch.bfloat16 if device.type == "cuda" else torch.float32

    def run(name: str, dtype: torch.dtype = fast) -> Tensor:
        return _sampled(name, dtype, encoded[0], prompt)

    return run, run("disabled", torch.float32).float().cpu()


def _sampled(quantization: str, dtype: torch.dtype, image: ImageEmbeds, text: TextEmbeds) -> Tensor:
    """Latents after a step of the demo's model. An option for files with scales takes the file without them."""
    path = DEMO_MODELS / "diffusion_models" / "tiny_wan_i2v.safetensors"
    if quantization.startswith("fp8"):
        quantization = quantization.replace("_scaled", "")
    model = load_wan_model(path, LoadOptions(base_dtype=dtype, quantization=quantization), get_host(), SYSTEMS)
    latents, _ = WanVideoSampler().process(model, image, 3.0, 1, 1.0, 0, "euler", 0, text_embeds=text)
    return latents["samples"]


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(WanVideoDoctor)
