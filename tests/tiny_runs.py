"""Short runs of the sampler node on a tiny text-to-video model, for systems that are connected to the sampler alone."""

import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.prompt_segments.extension import segments
from wanvideo_wrapper.wanvideo.request import TextEmbeds

STEPS = 4


def prompt(seed):
    return torch.randn(4, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(seed))


class Runs:
    """Runs on one model, saved in `folder`; a context that holds its host. model: a tiny one, by default plain Wan."""

    def __init__(self, folder, model=None):
        self.folder, self.tiny = folder, model or tiny.transformer(in_dim=16)

    def __enter__(self):
        self.before = get_host()
        self.tiny.save(self.folder / "diffusion_models/t2v.safetensors")
        set_host(StandaloneHost(models=self.folder, device="cpu"))
        load = N["WanVideoModelLoader"]().loadmodel
        (self.model,) = load("t2v.safetensors", "fp32", "offload_device", "disabled")
        return self

    def __exit__(self, *_):
        set_host(self.before)

    def sample(self, *, prompts=1, frames=9, image_embeds=None, **options):
        """Latents [16, F, 4, 4] of the prompts 1 to `prompts` against the negative prompt 0."""
        embeds = image_embeds or N["WanVideoEmptyEmbeds"]().process(frames, 32, 32)[0]
        texts = tuple(map(prompt, range(1, prompts + 1)))
        text = TextEmbeds(positive=texts, negative=(prompt(0),), payloads=segments(texts))
        settings = dict(steps=STEPS, cfg=3.0, shift=5.0, seed=1, force_offload=True, scheduler="euler")
        settings |= {"riflex_freq_index": 0, "text_embeds": text, **options}
        return N["WanVideoSampler"]().process(self.model, embeds, **settings)[0]["samples"][0]
