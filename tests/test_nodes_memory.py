"""The nodes that keep weights in main memory, and the socket they go to."""

import pytest
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.wanvideo.block_swap import BlockSwapArgs


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_goes_to_block_swap(share):
    assert N["WanVideoVRAMManagement"]().setargs(share) == (BlockSwapArgs(share=share),)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match="a share from 0.0 to 1.0|a number of at least 0.0"):
        N["WanVideoVRAMManagement"]().setargs(share)


def test_one_way_to_offload_at_a_time():
    with pytest.raises(ValueError, match="disconnect one"):
        N["WanVideoModelLoader"]().loadmodel(
            "none.safetensors", "bf16", "offload_device", "disabled", block_swap_args=BlockSwapArgs(),
            vram_management_args=BlockSwapArgs(share=1.0),
        )  # fmt: skip


def test_widgets_of_block_swap():
    node = N["WanVideoBlockSwap"]()
    assert node.setargs(20, False, False) == (BlockSwapArgs(blocks_to_swap=20, others={"vace_blocks": 0}),)
    (one,) = node.setargs(-1, True, False, True, 3, 2, True)
    assert one == BlockSwapArgs(
        blocks_to_swap=-1, others={"vace_blocks": 3}, embeddings=("img_emb",), use_non_blocking=True, prefetch_blocks=2,
        block_swap_debug=True,
    )  # fmt: skip
    (other,) = node.setargs(0, False, True)
    assert (other.blocks_to_swap, other.embeddings) == (0, ("text_embedding",))


def test_no_share_lets_no_block_wait():
    assert [BlockSwapArgs(share=share).waits for share in (None, 0.0, 0.1)] == [True, False, True]
    assert [BlockSwapArgs(blocks_to_swap=count).waits for count in (0, 1, -1)] == [False, True, True]
