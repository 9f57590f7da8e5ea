"""Sound by path, sound to listen to, and ComfyUI's audio encoders."""

from __future__ import annotations

import wave
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...host import Managed, get_host
from ...multitalk.wav2vec import SAMPLE_RATE, read_encoder
from ...node_tools import Inputs, files
from ...wanvideo.checkpoint import open_checkpoint
from ...wanvideo.whole_file import partial_file, publish
from ..media import probe, read_audio
from .pictures import next_file

Audio = dict[str, object]

INPUT_FOLDER = "input/"


class LoadAudioPath:
    """Sound of a file below the input folder, or a part of it (VHS_LoadAudio)."""

    FUNCTION = "load_audio"
    RETURN_TYPES = ("AUDIO", "FLOAT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"audio_file": ("STRING", {"default": INPUT_FOLDER})},
            "optional": {
                "seek_seconds": ("FLOAT", {"default": 0, "min": 0}),
                "duration": ("FLOAT", {"default": 0, "min": 0, "max": 10000000, "step": 0.01}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, audio_file: str) -> bool:
        """The file is there and has sound."""
        probe(cls._path(audio_file), "audio")
        return True

    @staticmethod
    def _path(audio_file: str) -> Path:
        """Paths of this node begin at ComfyUI's own folder, of which the input folder alone is known here."""
        return get_host().readable_file(audio_file.strip().strip('"').removeprefix(INPUT_FOLDER))

    def load_audio(self, audio_file: str, seek_seconds: float = 0, duration: float = 0) -> tuple[Audio, float]:
        """AUDIO from seek_seconds on, `duration` seconds of it or all, and its length."""
        return _part(self._path(audio_file), seek_seconds, duration, "seek_seconds")


def _part(path: Path, start: float, seconds: float, widget: str) -> tuple[Audio, float]:
    """AUDIO and its length. widget: the name of the one that `start` comes from. Raises ValueError where it is over."""
    audio = read_audio(path, start=start, seconds=seconds)
    length = audio["waveform"].shape[-1] / audio["sample_rate"]
    if not length:
        raise ValueError(f"{path.name} is over before {start} s: lower {widget}.")
    return audio, length


class LoadAudioUpload:
    """Sound of a file in the input folder, or a part of it (VHS_LoadAudioUpload)."""

    FUNCTION = "load_audio"
    RETURN_TYPES = ("AUDIO", "FLOAT")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        seconds = ("FLOAT", {"default": 0, "min": 0, "max": 10000000, "step": 0.01})
        return {"required": {"audio": ("STRING", {})}, "optional": {"start_time": seconds, "duration": seconds}}

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str) -> bool:
        """The file is there and has sound."""
        probe(get_host().readable_file(audio), "audio")
        return True

    def load_audio(self, audio: str, start_time: float = 0, duration: float = 0) -> tuple[Audio, float]:
        """AUDIO from start_time on, `duration` seconds of it or all, and its length."""
        return _part(get_host().readable_file(audio), start_time, duration, "start_time")


class PreviewAudio:
    """Writes sound to the temporary folder, as WAV."""

    FUNCTION = "save_audio"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"audio": ("AUDIO",)}}

    def save_audio(self, audio: Audio) -> dict[str, object]:
        """One numbered file a sound of the batch."""
        next_name = partial(next_file, get_host().temp_dir(), "preview", ".wav")
        names = []
        for sound in audio["waveform"]:
            samples = (sound.T.float().nan_to_num(0.0).clamp(-1, 1) * 32767).round().to(torch.int16)
            with partial_file(next_name().parent, "preview.wav") as unfinished:
                with wave.open(str(unfinished), "wb") as file:
                    file.setnchannels(samples.shape[1])
                    file.setsampwidth(2)
                    file.setframerate(int(audio["sample_rate"]))
                    file.writeframes(samples.cpu().numpy().astype("<i2").tobytes())
                names.append(str(publish(unfinished, next_name)))
        return {"ui": {"audio": names}}


class AudioCrop:
    """A sound from one time to another (audio-separation-nodes-comfyui)."""

    FUNCTION = "main"
    RETURN_TYPES = ("AUDIO",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "audio": ("AUDIO",),
                "start_time": ("STRING", {"default": "0:00"}),
                "end_time": ("STRING", {"default": "1:00"}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, start_time: str, end_time: str) -> bool:
        """Times, in their order."""
        if _seconds(start_time) >= _seconds(end_time):
            raise ValueError(f"start_time {start_time} is not before end_time {end_time}: choose an earlier one.")
        return True

    def main(self, audio: Audio, start_time: str = "0:00", end_time: str = "1:00") -> tuple[Audio]:
        """What lies between; a sound that is over earlier ends there."""
        first, last = (_seconds(time) * audio["sample_rate"] for time in (start_time, end_time))
        part = audio["waveform"][..., first:last]
        if not part.shape[-1]:
            raise ValueError(f"AudioCrop leaves nothing: the sound is over before {start_time}; lower start_time.")
        return ({**audio, "waveform": part},)


def _seconds(time: str) -> int:
    """Of "minutes:seconds", or seconds alone."""
    minutes, _, seconds = time.rpartition(":")
    try:
        return 60 * int(minutes or 0) + int(seconds)
    except ValueError:
        raise ValueError(f"'{time}' is no time: write minutes:seconds, such as 1:30.") from None


class AudioEncoderLoader:
    """A Wav2Vec2 encoder from models/audio_encoders; Whisper has a loader of its own in this pack."""

    FUNCTION = "load"
    RETURN_TYPES = ("AUDIO_ENCODER",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"audio_encoder_name": (files("audio_encoders"),)}}

    def load(self, audio_encoder_name: str) -> tuple[Managed]:
        """Load it in half precision, in float32 on a CPU."""
        host = get_host()
        dtype = torch.float32 if host.device().type == "cpu" else torch.float16
        path = host.find_file("audio_encoders", audio_encoder_name)
        return (host.manage(read_encoder(open_checkpoint(path), dtype=dtype)),)


class AudioEncoderEncode:
    """Hidden states of all layers of an audio encoder, 50 a second."""

    FUNCTION = "encode"
    RETURN_TYPES = ("AUDIO_ENCODER_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"audio_encoder": ("AUDIO_ENCODER",), "audio": ("AUDIO",)}}

    @torch.no_grad()
    def encode(self, audio_encoder: Managed, audio: Audio) -> tuple[dict[str, object]]:
        """[1, T, C] each: what enters the first layer, then what leaves each, the last one normed in large models."""
        import soxr

        device, model = audio_encoder.acquire(), audio_encoder.module
        waveform: Tensor = audio["waveform"].float().mean(dim=1)
        rates = int(audio["sample_rate"]), SAMPLE_RATE
        sound = torch.stack([torch.from_numpy(soxr.resample(part.cpu().numpy(), *rates)) for part in waveform])
        if model.config.do_stable_layer_norm:
            # Large models were trained on sound of one loudness, the others on sound as it is.
            sound = (sound - sound.mean()) / (sound.var() + 1e-7).sqrt()
        layers: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in model.encoder.layers:
                hook = layer.register_forward_pre_hook(lambda _, given: layers.append(given[0].float().cpu()))
                hooks.callback(hook.remove)
            heard = model(sound.to(device, next(model.parameters()).dtype))
        layers.append(heard.last_hidden_state.float().cpu())
        audio_encoder.release()
        output = {"encoded_audio": layers[-1], "encoded_audio_all_layers": tuple(layers)}
        return ({**output, "audio_samples": sound.shape[-1]},)


NODE_CLASS_MAPPINGS = {
    "VHS_LoadAudio": LoadAudioPath,
    "VHS_LoadAudioUpload": LoadAudioUpload,
    "AudioCrop": AudioCrop,
    "PreviewAudio": PreviewAudio,
    "AudioEncoderLoader": AudioEncoderLoader,
    "AudioEncoderEncode": AudioEncoderEncode,
}
