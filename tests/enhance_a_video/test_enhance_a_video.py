"""Enhance-A-Video's score against a float64 loop over places and heads."""

import pytest
import torch
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo, frame_score
from wanvideo_wrapper.wanvideo.conditioning import Step
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs


def score_by_loop(q, k, frames, weight):
    places = q.shape[1] // frames
    total = []
    for place in range(places):
        for head in range(q.shape[2]):
            rows = [f * places + place for f in range(frames)]
            a, b = q[0, rows, head].double(), k[0, rows, head].double()
            attention = (a @ b.T / q.shape[-1] ** 0.5).softmax(-1)
            off = attention.sum() - attention.trace()
            total.append(off / (frames * (frames - 1)))
    return max(1.0, (sum(total) / len(total)).item() * (frames + weight))


@pytest.mark.parametrize("weight", [0.5, 40.0])
def test_score(weight):
    q, k = torch.randn(1, 3 * 6, 2, 8), torch.randn(1, 3 * 6, 2, 8)
    got = frame_score(q, k, 3, torch.tensor(weight)).item()
    assert got == pytest.approx(score_by_loop(q, k, 3, weight), rel=1e-5)


@torch.no_grad()
def test_acts_only_within_its_steps():
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)
    model = WanModel(config, (EnhanceAVideo(),))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    common = dict(latents=torch.randn(1, 16, 3, 4, 4), timestep=torch.tensor([500.0]), text=(torch.randn(4, 8),))
    plain = model(ModelInputs(**common))
    args = EnhanceArgs(30.0, 0.5, 1.0)
    early = model(ModelInputs(**common, payloads=(args,), step=Step(index=0, total=5)))
    late = model(ModelInputs(**common, payloads=(args,), step=Step(index=4, total=5)))
    off = model(ModelInputs(**common, payloads=(EnhanceArgs(0.0),), step=Step(index=4, total=5)))
    assert torch.equal(plain, early) and torch.equal(plain, off)
    assert (late - plain).norm() / plain.norm() > 1e-5
