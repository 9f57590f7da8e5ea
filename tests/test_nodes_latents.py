"""Latents between this pack and ComfyUI, and latents that are given before sampling."""

import inspect

import pytest
import torch
from tiny_runs import Runs
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N

# The first channels of the 2.2 VAE (Wan-Video/Wan2.2).
FIRST_22 = ((-0.2289, 0.4765), (-0.0052, 1.0364), (-0.1323, 0.4514))


def statistics(channels):
    """(channel, mean, deviation) of the published VAEs, the 2.1's from diffusers."""
    if channels == 48:
        return [(i, *pair) for i, pair in enumerate(FIRST_22)]
    from diffusers import AutoencoderKLWan

    declared = inspect.signature(AutoencoderKLWan.__init__).parameters
    means, deviations = (declared[f"latents_{name}"].default for name in ("mean", "std"))
    return list(zip(range(channels), means, deviations, strict=True))


@pytest.mark.parametrize("channels", [16, 48])
def test_rescale_normalizes_channel_by_channel(channels):
    rescale = N["WanVideoLatentReScale"]().encode
    raw, mask = torch.randn(2, channels, 3, 4, 5), torch.rand(1, 4, 5)
    (ours,) = rescale({"samples": raw, "noise_mask": mask}, "comfy_to_wrapper")
    for channel, mean, deviation in statistics(channels):
        want = (raw[:, channel].double() - mean) / deviation
        torch.testing.assert_close(ours["samples"][:, channel].double(), want, rtol=1e-5, atol=1e-5)
    assert ours["noise_mask"] is mask
    (back,) = rescale(ours, "wrapper_to_comfy")
    torch.testing.assert_close(back["samples"], raw)


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 5), (1, 16, 4, 5)])
def test_latents_of_other_models_are_refused(shape):
    with pytest.raises(ValueError, match="(latents of a Wan VAE|encode it with WanVideo Encode)"):
        N["WanVideoLatentReScale"]().encode({"samples": torch.randn(shape)}, "comfy_to_wrapper")


def test_extra_latents_are_where_they_were_put(tmp_path):
    add = N["WanVideoAddExtraLatent"]().add
    (empty,) = N["WanVideoEmptyEmbeds"]().process(17, 32, 32)
    first, last = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 1, 4, 4)
    (one,) = add(empty, {"samples": first}, 1)
    (both,) = add(one, {"samples": last}, -1)
    assert [place for place, _ in both.given_latents] == [1, -1] and empty.given_latents == ()
    with Runs(tmp_path) as runs:
        # Without noise levels to walk, the latents are what the run began with.
        start = runs.sample(image_embeds=both, sigmas=torch.tensor([1.0, 1.0 - 1e-6]))
        plain = runs.sample(image_embeds=empty, sigmas=torch.tensor([1.0, 1.0 - 1e-6]))
    torch.testing.assert_close(start[:, 1:3], first[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(start[:, 4:], last[0], atol=1e-4, rtol=0)
    for place in (0, 3):
        torch.testing.assert_close(start[:, place], plain[:, place], atol=1e-4, rtol=0)
