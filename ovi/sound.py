"""Sound to latents and back: MMAudio's VAE and the vocoder, read from safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..quiet_imports import kernels_hidden
from ..wanvideo.assign import assign
from ..wanvideo.checkpoint import Checkpoint, open_checkpoint
from .mmaudio import SpectrumVae, VaeSizes
from .vocoder import NORMED, BigVgan, VocoderSizes

if TYPE_CHECKING:
    from ..host import Host

SAMPLE_RATE = 16000
WINDOW, HOP = 1024, 256
LEAST_MAGNITUDE, LEAST_ENERGY = 1e-5, 1e-9
# What older files call the two parts of a normalized weight.
OLDER = {"parametrizations.weight.original0": "weight_g", NORMED: "weight_v"}


class SoundVae:
    """Both models under the host's memory management (socket MMAUDIOVAE)."""

    def __init__(self, vae: SpectrumVae, vocoder: BigVgan, host: Host) -> None:
        self.model = nn.ModuleDict({"vae": vae, "vocoder": vocoder})
        self.managed = host.manage(self.model)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, channels, L] -> sound [B, 1, samples] float32 at 16 kHz, on the CPU."""
        device = self.managed.acquire()
        try:
            vae, vocoder = self.model["vae"], self.model["vocoder"]
            return vocoder(vae.decode(latents.to(device, vae.data_mean.dtype))).float().cpu()
        finally:
            self.managed.release()

    @torch.no_grad()
    def encode(self, sound: Tensor) -> Tensor:
        """Mono sound [samples] at 16 kHz -> latents [1, channels, L] float32 on the CPU."""
        device = self.managed.acquire()
        try:
            vae = self.model["vae"]
            spectrum = log_mel(sound, vae.data_mean.shape[1])
            return vae.encode(spectrum[None].to(device, vae.data_mean.dtype)).float().cpu()
        finally:
            self.managed.release()


def log_mel(sound: Tensor, bands: int) -> Tensor:
    """Base-10 logarithms of mel magnitudes [bands, frames] of sound [samples] at 16 kHz, 62.5 frames a second.

    Raises ValueError for sound that is shorter than a window.
    """
    if sound.shape[0] < WINDOW:
        raise ValueError(f"The sound is shorter than {WINDOW} samples at 16 kHz: choose a longer one.")
    with kernels_hidden("transformers"):
        from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(WINDOW // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney",
                              mel_scale="slaney")  # fmt: skip
    edge = (WINDOW - HOP) // 2
    padded = torch.nn.functional.pad(sound.float().clamp(-1, 1)[None], (edge, edge), mode="reflect")[0]
    spectrum = torch.stft(padded, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    magnitude = (spectrum.abs().square() + LEAST_ENERGY).sqrt()
    return (torch.from_numpy(filters.T.astype(np.float32)) @ magnitude).clamp(min=LEAST_MAGNITUDE).log10()


def load_sound_vae(vae: Path, vocoder: Path, *, dtype: torch.dtype, host: Host) -> SoundVae:
    """Load both files. Raises ValueError if one is of another kind or incomplete."""
    return SoundVae(_vae(vae).to(dtype), _vocoder(vocoder).to(dtype), host)


def _vae(path: Path) -> SpectrumVae:
    checkpoint = open_checkpoint(path)
    try:
        sizes = VaeSizes.of(checkpoint.shapes)
        with torch.device("meta"):
            model = SpectrumVae(sizes)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path.name} is no MMAudio VAE: choose mmaudio_vae_16k, as safetensors.") from error
    return _filled(model, checkpoint, {}, "MMAudio VAE")


def _vocoder(path: Path) -> BigVgan:
    checkpoint = open_checkpoint(path)
    names = {_newer(name): name for name in checkpoint.shapes}
    try:
        sizes = VocoderSizes.of({new: checkpoint.shapes[name] for new, name in names.items()})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path.name} is no BigVGAN vocoder: choose best_netG of MMAudio, as safetensors.") from error
    with torch.device("meta"):
        model = BigVgan(sizes)
    return _filled(model, checkpoint, names, "BigVGAN vocoder")


def _newer(name: str) -> str:
    for new, old in OLDER.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def _filled(
    model: SpectrumVae | BigVgan, checkpoint: Checkpoint, names: dict[str, str], what: str
) -> SpectrumVae | BigVgan:
    """With the file's weights in float32, multiplied out."""
    wanted = {name: names.get(name, name) for name, _ in model.named_parameters()}
    assign(model, checkpoint, wanted, dtype=torch.float32, what=what)
    model.fold()
    return model.eval().requires_grad_(False)
