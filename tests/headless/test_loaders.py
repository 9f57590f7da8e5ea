"""Stand-ins for ComfyUI's own encoder nodes."""

import pytest
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.nodes_text import WanVideoTextEmbedBridge, WanVideoTextEncode
from wanvideo_wrapper.wanvideo.modules.t5 import load_text_encoder


@pytest.fixture
def host(tmp_path):
    (tmp_path / "text_encoders").mkdir()
    tiny.text_encoder().save(tmp_path / "text_encoders" / "t5.safetensors")
    before, host = get_host(), StandaloneHost(models=tmp_path, device="cpu")
    set_host(host)
    yield host
    set_host(before)


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_prompts_of_comfyui_equal_the_packs_own(host, device):
    (clip,) = STAND_INS["CLIPLoader"]().load_clip("t5.safetensors", "wan", device)
    assert clip.device == (torch.device("cpu") if device == "cpu" else None)
    (conditioning,) = STAND_INS["CLIPTextEncode"]().encode("a person sings", clip)
    assert conditioning[0][0].shape == (1, 512, tiny.TEXT_DIM)
    (bridged,) = WanVideoTextEmbedBridge().process(conditioning)
    encoder = load_text_encoder(host.find_file("text_encoders", "t5.safetensors"), dtype=torch.float32, host=host)
    (want,) = WanVideoTextEncode().process("a person sings", "", encoder)
    tokens = len(want.positive[0])
    torch.testing.assert_close(bridged.positive[0][:tokens], want.positive[0])
    assert not bridged.positive[0][tokens:].any()


def test_other_text_encoders_are_refused(host):
    with pytest.raises(ValueError, match="'flux' runs in ComfyUI only"):
        STAND_INS["CLIPLoader"]().load_clip("t5.safetensors", "flux")
