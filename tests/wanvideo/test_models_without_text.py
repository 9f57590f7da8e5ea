"""Transformers that read no text: their keys, what they compute, and files that have lost their text layers."""

from dataclasses import replace

import pytest
import torch
from contract import SIZES, build, inputs
from safetensors.torch import save_file
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.architecture import config_of
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules.model import WanModel

WORDLESS = WanConfig(**{**SIZES, "text_dim": 0})


def test_they_are_models_whose_attention_to_text_adds_nothing():
    _, model = build(config=WORDLESS)
    assert not any("text_embedding" in k or "cross_attn" in k or "norm3" in k for k in model.state_dict())
    _, twin = build(config=replace(WORDLESS, text_dim=8))
    twin.load_state_dict(model.state_dict(), strict=False)
    for block in twin.blocks:
        block.cross_attn.o.weight.zero_(), block.cross_attn.o.bias.zero_()
    torch.testing.assert_close(model(inputs(batch=2)), twin(inputs(batch=2)), rtol=1e-5, atol=1e-6)
    assert model.compute_dtype is torch.float32
    empty = model.embed_text(inputs(batch=2).text, torch.bfloat16)
    assert empty.shape == (2, 0, WORDLESS.dim) and empty.dtype is torch.bfloat16


@pytest.mark.parametrize("lost", ["text_embedding.0.weight", "blocks.0.cross_attn.q.weight"])
def test_a_file_that_has_lost_half_of_its_text_layers_is_refused(tmp_path, lost):
    sizes = WanConfig(dim=128, ffn_dim=16, num_heads=1, num_layers=1, text_dim=8, text_len=4)
    tensors = {k: v.clone() for k, v in WanModel(sizes).state_dict().items() if k != lost}
    save_file(tensors, tmp_path / "lost.safetensors")
    with pytest.raises(ValueError, match=lost):
        config_of(open_checkpoint(tmp_path / "lost.safetensors"), SYSTEMS)
    wordless = WanModel(replace(sizes, text_dim=0)).state_dict()
    save_file(wordless, tmp_path / "wordless.safetensors")
    assert config_of(open_checkpoint(tmp_path / "wordless.safetensors"), SYSTEMS).text_dim == 0
