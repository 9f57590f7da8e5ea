"""MoCha against its published form in float64, and its node."""

from dataclasses import replace

import pytest
import torch
from contract import SIZES, build
from float64_wan import Exact, rand, relative
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.mocha.extension import MoCha, SubjectReplacement
from wanvideo_wrapper.wanvideo.conditioning import Window
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.sampling import whole_window
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

FRAMES, HEIGHT, WIDTH = 3, 4, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2


def payload(pictures=2, frames=FRAMES):
    counts = (frames, 1, pictures)
    return SubjectReplacement(*(rand(1, 16, n, HEIGHT, WIDTH, seed=n + 3 * i) for i, n in enumerate(counts)))


def asked(*payloads, batch=1, in_dim=16, **more):
    text = tuple(rand(4, 8, seed=7 + row) for row in range(batch))
    given = dict(latents=rand(batch, in_dim, FRAMES, HEIGHT, WIDTH, seed=3), timestep=torch.tensor([731.0] * batch))
    return ModelInputs(**{**given, "text": text, "payloads": payloads, **more})


def positions(pictures):
    """(frame, row, column) of all tokens, as the authors index their table, which begins at -1."""

    def frame(time, down=0, right=0):
        return [(time, row + down, column + right) for row in range(ROWS) for column in range(COLUMNS)]

    video = [place for time in range(FRAMES) for place in frame(time)]
    return video + video + frame(0) + frame(-1) + (frame(-1, ROWS, COLUMNS) if pictures == 2 else [])


def published(model, inputs, given):
    exact, batch = Exact(model), inputs.latents.shape[0]
    behind = torch.cat((given.source, given.mask, given.pictures), dim=2)
    behind = torch.nn.functional.pad(behind, (0, 0) * 3 + (0, inputs.latents.shape[1] - 16))
    video = torch.cat((inputs.latents, behind.expand(batch, -1, -1, -1, -1)), dim=2)
    x, text = exact.patches(video), exact.text(inputs.text)
    turns = exact.turns_at(positions(given.pictures.shape[2]))
    time, modulation = exact.times(inputs.timestep)
    for i in exact.blocks:
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = exact.modulated(i, modulation)
        read = exact.norm(x) * (1 + gain) + shift
        x = x + exact.linear(f"blocks.{i}.self_attn.o", exact.attention(*exact.self_qkv(i, read, turns))) * gate
        x = x + exact.cross(i, x, text)
        x = x + exact.feed_forward(i, exact.norm(x) * (1 + ffn_gain) + ffn_shift) * ffn_gate
    return exact.velocity(x, time, (video.shape[2], ROWS, COLUMNS))[:, :, :FRAMES]


@torch.no_grad()
@pytest.mark.parametrize(("pictures", "batch", "in_dim"), [(1, 2, 16), (2, 1, 20)])
def test_video_mask_and_pictures_are_seen_where_the_authors_put_them(pictures, batch, in_dim):
    _, model = build(MoCha(), config=WanConfig(**SIZES, in_dim=in_dim))
    inputs, given = asked(batch=batch, in_dim=in_dim), payload(pictures)
    want = published(model, inputs, given)
    assert relative(model(replace(inputs, payloads=(given,))), want) < 1e-5
    assert relative(model(inputs), want) > 1e-2


@torch.no_grad()
def test_riflex_slows_all_frames_alike():
    _, model = build(MoCha())
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.extend((args[1].rope, args[0])))
    model(asked(payload(), riflex_index=2))
    longer = model.rope((FRAMES + 1, ROWS, COLUMNS), start=(-1, 0, 0), riflex_index=2, riflex_frames=FRAMES)
    before, video = longer.split((ROWS * COLUMNS, FRAMES * ROWS * COLUMNS))
    want = torch.cat((video, video, video[: ROWS * COLUMNS], before))
    assert torch.equal(seen[0][: len(want)], want) and seen[1].is_contiguous()


@torch.no_grad()
def test_where_frames_differ_in_time_they_are_as_noisy_as_the_last():
    _, model = build(MoCha())
    rows = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: rows.extend(args[1].mod[0][args[1].rows]))
    model(asked(payload(), timestep=torch.tensor([[0.0, 310.5, 731.0]])))
    count = FRAMES * ROWS * COLUMNS
    assert all(torch.equal(row, rows[count - 1]) for row in rows[count:])
    assert not torch.equal(rows[0], rows[-1])


def test_windows_have_their_frames_and_all_of_the_rest():
    given = payload(frames=9)
    part = given.window(Window(latents=(0, 3, 4), pixels=tuple(range(9)), leading=1))
    assert torch.equal(part.source, given.source[:, :, 2:4])
    assert part.mask is given.mask and part.pictures is given.pictures
    assert torch.equal(given.window(whole_window(9)).source, given.source)


def test_another_size_is_said():
    with pytest.raises(ValueError, match="same width, height and length"):
        build(MoCha())[1](asked(payload(frames=4)))
    with pytest.raises(ValueError, match="model's VAE"):
        build(MoCha())[1](asked(replace(payload(), source=rand(1, 48, FRAMES, HEIGHT, WIDTH))))


class FixedVae:
    """Latents are every eighth pixel of every fourth frame, in 16 channels."""

    latent_channels, spatial_factor = 16, 8

    def __init__(self):
        self.managed, self.released, self.tiles = self, 0, []

    def release(self):
        self.released += 1

    def encode(self, video, *, tile=None):
        self.tiles.append(tile)
        return video[:1, ::4, ::8, ::8].expand(16, -1, -1, -1)


def test_node():
    process, vae = N["MochaEmbeds"]().process, FixedVae()
    video, first, second = (torch.rand(n, 32, 48, 3) for n in (10, 1, 1))
    mask = torch.rand(1, 64, 96)
    mask[0, 0, : 3 * 16 : 16] = torch.tensor([0.5, 0.51, 0.0])
    (embeds,) = process(vae, True, video, mask, first, second)
    (given,) = embeds.payloads
    assert (embeds.latent_shape, embeds.num_frames, vae.released) == ((16, 3, 4, 6), 9, 1)
    for latents, images in ((given.source, video[:9:4]), (given.pictures, torch.cat((first, second)))):
        want = images[None, None, :, ::8, ::8, 0] * 2 - 1
        torch.testing.assert_close(latents, want.expand(-1, 16, -1, -1, -1))
    marked = mask[None, None, :, ::16, ::16] > 0.5
    assert marked[..., 0, :3].flatten().tolist() == [False, True, False]
    assert torch.equal(given.mask, (marked * 2.0 - 1).expand(-1, 16, -1, -1, -1)) and given.mask.is_contiguous()
    (alone,) = process(vae, False, video, mask, first, tiled_vae=True)
    assert alone.payloads[0].pictures.shape[2] == 1 and vae.released == 1
    assert [tile is None for tile in vae.tiles] == [True] * 3 + [False] * 2


def test_node_names_what_does_not_fit():
    process, vae, video, mask = N["MochaEmbeds"]().process, FixedVae(), torch.rand(5, 32, 48, 3), torch.rand(1, 32, 48)
    with pytest.raises(ValueError, match="one mask, of the first frame, but got 5"):
        process(vae, True, video, mask.expand(5, -1, -1), video[:1])
    with pytest.raises(ValueError, match="ref1 is 2 of 48x32 but input_video 5 of 48x32"):
        process(vae, True, video, mask, video[:2])
    with pytest.raises(ValueError, match="ref2 is 1 of 32x32"):
        process(vae, True, video, mask, video[:1], video[:1, :, :32])
    assert vae.tiles == []
