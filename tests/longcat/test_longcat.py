"""LongCat-Video's transformer equals a float64 form written from the authors' code, with given frames and without."""

import pytest
import torch
import torch.nn.functional as F
from contract import HEIGHT, SIZES, WIDTH, build, inputs
from float64_wan import Exact, places, relative
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat.given import GivenFrames
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig

FRAMES = 5
CONFIG = WanConfig(**{**SIZES, "dim": 32})
GRID = (FRAMES, HEIGHT // 2, WIDTH // 2)
ROOM = GRID[1] * GRID[2]


class ExactLongCat(Exact):
    """Norms of each head, SwiGLU, modulation of every block by frame, and frames that see no others."""

    def rms(self, name, x):
        by_head = x.unflatten(-1, (-1, self.weights[f"{name}.weight"].shape[0]))
        return super().rms(name, by_head).flatten(-2)

    def feed_forward(self, index, x):
        name = f"blocks.{index}.ffn"
        return self.linear(f"{name}.w2", F.silu(self.linear(f"{name}.w1", x)) * self.linear(f"{name}.w3", x))

    def frame_times(self, timesteps):
        """[F] -> embedding [1, F, E]."""
        half = self.config.freq_dim // 2
        angles = timesteps.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        x = torch.cat((angles.cos(), angles.sin()), dim=1)
        return self.linear("time_embedding.mlp.2", F.silu(self.linear("time_embedding.mlp.0", x)))[None]

    def by_token(self, name, e, parts):
        rows = self.linear(f"{name}.modulation.1", F.silu(e))
        return rows.repeat_interleave(ROOM, dim=1).chunk(parts, dim=-1)

    def prompt(self, text):
        embedded = self.text([text])
        embedded[:, len(text) :] = 0
        return embedded

    def between(self, index, x, e):
        """What an avatar adds behind the prompt."""
        return x

    def run(self, latents, timesteps, text, given, seen, positions):
        """seen [F, F]: which frame sees which."""
        x, text, e = self.patches(latents), self.prompt(text), self.frame_times(timesteps)
        turns = self.turns_at(positions)
        mask = seen.repeat_interleave(ROOM, 0).repeat_interleave(ROOM, 1)
        for index in self.blocks:
            s1, c1, g1, s2, c2, g2 = self.by_token(f"blocks.{index}", e, 6)
            q, k, v = self.self_qkv(index, self.norm(x) * (1 + c1) + s1, turns)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(2)
            x = x + g1 * self.linear(f"blocks.{index}.self_attn.o", out)
            read = self.cross(index, x, text)
            read[:, : given * ROOM] = 0
            x = self.between(index, x + read, e)
            x = x + g2 * self.feed_forward(index, self.norm(x) * (1 + c2) + s2)
        shift, scale = self.by_token("head", e, 2)
        x = self.linear("head.head", self.norm(x) * (1 + scale) + shift).reshape(1, *GRID, 2, 2, 16)
        return -torch.einsum("bfhwpqc->bcfhpwq", x).flatten(5, 6).flatten(3, 4)


def case(payload, text_tokens=3):
    _, model = build(LongCat(width=8), config=CONFIG)
    times = torch.full((1, FRAMES), 700.0)
    times[:, : payload.frames if payload else 0] = 0
    latents, text = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH), torch.randn(text_tokens, 8)
    given = inputs(*((payload,) if payload else ()), seed=1)
    given = type(given)(**{**given.__dict__, "latents": latents, "timestep": times, "text": (text,)})
    return model, given, text


def all_seen():
    return torch.ones(FRAMES, FRAMES, dtype=torch.bool)


@pytest.mark.parametrize("text_tokens", [3, 4])
def test_text_to_video(text_tokens):
    model, given, text = case(None, text_tokens)
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 0, all_seen(), places(*map(range, GRID)))
    assert relative(model(given), want) < 1e-5


def test_one_time_is_that_of_all_frames():
    model, given, _ = case(None)
    one = type(given)(**{**given.__dict__, "timestep": given.timestep[:, 0]})
    assert relative(model(one), model(given).double()) < 1e-6


def test_given_frames_see_each_other_alone_and_no_prompt():
    model, given, text = case(GivenFrames(frames=2))
    seen = all_seen()
    seen[:2, 2:] = False
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 2, seen, places(*map(range, GRID)))
    assert relative(model(given), want) < 1e-5


def test_a_reference_is_apart_and_has_a_place_in_the_video():
    model, given, text = case(GivenFrames(frames=2, apart=1, position=9, unseeing=(3, 4)))
    seen = all_seen()
    seen[0, 1:] = seen[1, 0] = seen[1, 2:] = seen[3, 0] = False
    positions = places((9,), *map(range, GRID[1:])) + places(range(FRAMES - 1), *map(range, GRID[1:]))
    want = ExactLongCat(model).run(given.latents, given.timestep[0], text, 2, seen, positions)
    assert relative(model(given), want) < 1e-5


def test_a_video_of_given_frames_alone_and_a_part_of_one_are_refused():
    model, given, _ = case(GivenFrames(frames=FRAMES))
    with pytest.raises(ValueError, match="All 5 latent frames of the video are given"):
        model(given)
    with pytest.raises(ValueError, match="not in context windows"):
        GivenFrames(frames=1).window(Window((0, 1), (0, 1, 2, 3, 4)))
