"""The sequence on its way to the blocks, by itself: what is appended behind it, and what readers read of attention."""

from typing import NamedTuple

import pytest
import torch
from wanvideo_wrapper.wanvideo.shard import WHOLE, Shard
from wanvideo_wrapper.wanvideo.tokens import BlockInputs, HeadsRead, KeysValues, Text, Tokens, video_tokens

GRID = (3, 2, 2)
COUNT = 12


def sequence(rows=None):
    count = 1 if rows is None else GRID[0]
    return Tokens(
        x=torch.randn(2, COUNT, 8).bfloat16(),
        mod=torch.randn(2, count, 6, 8),
        rows=rows,
        rope=torch.randn(COUNT, 2, 2),
        grid=GRID,
        text=Text(torch.randn(2, 5, 8)),
        embedding=torch.randn(2, count, 8),
        latents=torch.randn(2, 4, 3, 4, 4),
    )


FRAMES = torch.arange(3).repeat_interleave(4)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ((3, 5, False), (4, 2, False), (4, 5, False)),
        ((None, 0, True), (7, 6, False), (None, 6, True)),
        ((1, None, False), (2, 3, True), (2, None, True)),
        ((0, 0, False), (0, 0, False), (0, 0, False)),
    ],
)
def test_readers_together_read_what_either_does(one, other, both):
    assert HeadsRead(*one).joined(HeadsRead(*other)) == HeadsRead(*other).joined(HeadsRead(*one)) == HeadsRead(*both)
    assert HeadsRead() == HeadsRead(None, None, True)


@pytest.mark.parametrize("rows", [None, FRAMES])
@pytest.mark.parametrize("own", [True, False])
def test_appended_tokens(rows, own):
    before, x, rope = sequence(rows), torch.randn(2, 3, 8), torch.randn(3, 2, 2)
    mod = torch.randn(2, 1, 6, 8).double() if own else None
    after = before.appended(x, rope, mod).appended(x, rope)
    assert after.x.dtype == torch.bfloat16 and torch.equal(after.x, torch.cat((before.x, *[x.bfloat16()] * 2), 1))
    assert torch.equal(after.rope, torch.cat((before.rope, rope, rope)))
    assert (after.grid, after.text, video_tokens(after.grid)) == (GRID, before.text, COUNT)
    # What every token is modulated by: the first frame's rows, unless the new ones have their own.
    video = before.mod[:, [0] * COUNT if rows is None else rows]
    first = before.mod[:, :1].expand(-1, 3, -1, -1)
    want = torch.cat((video, mod.float().expand(-1, 3, -1, -1) if own else first, first), dim=1)
    assert after.mod.dtype == torch.float32
    assert (after.rows is None) == (rows is None and not own)
    places = [0] * (COUNT + 6) if after.rows is None else after.rows
    assert torch.equal(after.mod[:, places], want)


def test_one_row_serves_all_and_each_token_has_a_position():
    before, x, rope, mod = sequence(), torch.randn(1, 3, 8), torch.randn(3, 2, 2), torch.randn(1, 1, 6, 8)
    after, want = before.appended(x, rope, mod), before.appended(*(t.expand(2, *t.shape[1:]) if t is not rope else t
                                                                   for t in (x, rope, mod)))  # fmt: skip
    assert torch.equal(after.x, want.x) and torch.equal(after.mod, want.mod) and after.mod.shape[0] == 2
    with pytest.raises(ValueError, match="3 tokens are appended at 2 positions"):
        before.appended(x, rope[:2])


def test_modulation_of_the_last_frame():
    assert sequence().last_frame_mod is None
    tokens = sequence(FRAMES)
    more = tokens.appended(torch.randn(2, 3, 8), torch.randn(3, 2, 2), torch.randn(2, 1, 6, 8))
    for each in (tokens, more):
        assert torch.equal(each.last_frame_mod, tokens.mod[:, 2:])


def test_a_whole_sequence_stays_as_it_is():
    for tokens in (sequence(), sequence(FRAMES)):
        again = tokens.on(WHOLE)
        assert all(torch.equal(getattr(again, name), getattr(tokens, name)) for name in ("x", "rope", "mod"))
        assert (again.grid, again.text) == (GRID, tokens.text) and (again.rows is None) == (tokens.rows is None)


class Evens(Shard):
    """Every second token."""

    def take(self, t, dim=1):
        return t.index_select(dim, torch.arange(0, t.shape[dim], 2))

    def grid(self, whole):
        return (*whole[:2], whole[2] // 2)


@pytest.mark.parametrize("rows", [None, FRAMES])
def test_a_part_of_the_sequence(rows):
    class Part(NamedTuple):
        shard: Shard | None = None

        def on(self, shard):
            return Part(shard)

    whole, shard = sequence(rows)._replace(text=Part()), Evens()
    part = whole.on(shard)
    assert torch.equal(part.x, whole.x[:, ::2]) and torch.equal(part.rope, whole.rope[::2])
    assert part.rows is None if rows is None else torch.equal(part.rows, rows[::2])
    assert part.grid == (3, 2, 1) and part.text == Part(shard)
    assert all(getattr(part, name) is getattr(whole, name) for name in ("mod", "embedding", "latents"))


def test_text_is_read_through_the_blocks_own_projections():
    class Cross:
        def keys_values(self, text):
            return KeysValues(text * 2, text * 3)

        def attention(self, q, k, v):
            return q, k, v

    text, q = Text(torch.randn(2, 5, 8)), torch.randn(2, 4, 2, 4)
    got = text.attend(Cross(), q)
    assert text.tokenwise and text.on(WHOLE) is text
    assert all(map(torch.equal, got, (q, text.tokens * 2, text.tokens * 3)))


def test_a_block_of_a_systems_own_runs_whole_and_in_one_piece_unless_it_is_told():
    inputs = BlockInputs(mod=torch.randn(1, 1, 6, 8), rows=None, rope=torch.randn(COUNT, 2, 2), text=None, grid=GRID)
    assert inputs[5:] == (None, (), 1, WHOLE)
