"""A tiny talking video for the tests: model files, and requests that are equal in every process."""

from dataclasses import replace

import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost
from wanvideo_wrapper.multitalk.audio import MultiTalkEmbeds
from wanvideo_wrapper.multitalk.loop import TalkingLoop
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.load_plan import LoadOptions, ModuleFile
from wanvideo_wrapper.wanvideo.loading import load_wan_model
from wanvideo_wrapper.wanvideo.lora import LoraFile
from wanvideo_wrapper.wanvideo.modules.vae import load_vae
from wanvideo_wrapper.wanvideo.request import ImageEmbeds, SampleRequest, TextEmbeds
from wanvideo_wrapper.wanvideo.sampling import sample
from wanvideo_wrapper.wanvideo.schedulers import ScheduleSpec, make_schedule

WINDOW, MOTION, TOTAL = 13, 5, 42


def save(folder):
    """Model files."""
    tiny.transformer(in_dim=36, layers=3).save(folder / "base.safetensors", torch.float32)
    tiny.transformer(in_dim=16, layers=3).save(folder / "text.safetensors", torch.float32)
    tiny.speech_module().save(folder / "infinite.safetensors", torch.float32)
    tiny.vae(base_dim=4).save(folder / "vae.safetensors", torch.float32)
    tiny.lora(tiny.transformer(in_dim=36, layers=3)).save(folder / "lora.safetensors", torch.float32)


def request(folder, *, base="base", total=TOTAL, mode="infinitetalk", scheduler="dpm++_sde", lora=None, **loop):
    """A run of five windows at 32x32. lora: strengths by the step."""
    host = StandaloneHost(device="cpu")
    loras = () if lora is None else (LoraFile(path=folder / "lora.safetensors", strength=lora, merge=False),)
    options = LoadOptions(base_dtype=torch.float32, modules=(ModuleFile(folder / "infinite.safetensors"),), loras=loras)
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=host)
    generator = torch.Generator().manual_seed(3)
    settings = TalkingLoop(
        vae=vae, width=32, height=32, window_frames=WINDOW, motion_frames=MOTION, mode=mode,
        start_images=torch.rand(3, 1, 32, 32, generator=generator) * 2 - 1,
    )  # fmt: skip
    features = torch.randn(total, tiny.SPEECH_LAYERS, tiny.SPEECH_DIM, generator=generator)
    return SampleRequest(
        model=load_wan_model(folder / f"{base}.safetensors", options, host, SYSTEMS),
        text=TextEmbeds(positive=(torch.randn(4, tiny.TEXT_DIM, generator=generator),)),
        image=ImageEmbeds(latent_shape=(16, 4, 4, 4), num_frames=WINDOW, loop=replace(settings, **loop)),
        schedule=make_schedule(ScheduleSpec(name=scheduler, steps=2, shift=5.0)),
        cfg=1.0,
        seed=11,
        payloads=(MultiTalkEmbeds(features=(features,), silence=features[:3]),),
    )


def joined(model, inputs):
    """The inputs of a forward with latents as the patch embedding reads them."""
    latents = inputs.latents.clone()
    for _, extension, payload in model._readers(inputs.payloads):
        latents = extension.latents(model, payload, latents, inputs)
    return replace(inputs, latents=latents)


def run(asked):
    """Its first output."""
    return sample(asked, StandaloneHost(device="cpu"))[0]


def killed_at(frame, folder, **options):
    """Run and die by SIGKILL while that frame is being written."""
    import os
    import signal

    from wanvideo_wrapper.wanvideo import footage

    write = footage.write_frame

    def dying(where, index, picture):
        if index == frame:
            (where / f"frame_{index:05d}.part").write_bytes(b"half a frame")
            os.kill(os.getpid(), signal.SIGKILL)
        write(where, index, picture)

    footage.write_frame = dying
    run(request(folder, **options))

