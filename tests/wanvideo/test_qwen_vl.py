"""Text and picture through Qwen2.5-VL: against transformers' whole model, a float64 form, and its own patches."""

import math

import pytest
import torch
from qwen_files import HEADS, HIDDEN, LAYERS, PAIRS, VOCABULARY, WIDTH, hidden_states, language_model, save_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.headless.core_nodes import NODE_CLASS_MAPPINGS as STAND_INS
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host
from wanvideo_wrapper.wanvideo.modules import qwen_vl

MARK = VOCABULARY - 1
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A folder of models, transformers' own model, and what CLIPLoader gives of its file."""
    folder = tmp_path_factory.mktemp("models")
    reader = save_tokenizer(folder / "text_encoders/vl/tokenizer.json")
    text = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=PAIRS, rms_norm_eps=1e-6, rope_theta=1e6,
        rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]}, pad_token_id=0,
    )  # fmt: skip
    vision = dict(depth=8, hidden_size=160, intermediate_size=48, num_heads=2, out_hidden_size=WIDTH,
                  fullatt_block_indexes=[7])  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=MARK)
    model = Qwen2_5_VLModel(config).eval()
    visual = {k: torch.randn_like(v) / v.shape[-1] ** 0.5 for k, v in model.visual.named_parameters()}
    words = {k: v for k, v in language_model().tensors.items() if k != "lm_head.weight"}
    model.visual.load_state_dict(visual)
    model.language_model.load_state_dict({k.removeprefix("model."): v for k, v in words.items()})
    tensors = {**words, **{f"visual.{k}": v for k, v in visual.items()}}
    file = tiny.Tiny(tensors=tensors, metadata={"wanvideo.num_heads": str(HEADS)})
    file.save(folder / "text_encoders/vl.safetensors", torch.float32)
    tiny.text_encoder().save(folder / "text_encoders/t5.safetensors", torch.float32)
    before = get_host()
    set_host(StandaloneHost(models=folder, device="cpu"))
    yield model, reader, STAND_INS["CLIPLoader"]().load_clip("vl.safetensors", "qwen_image")[0], words
    set_host(before)


def test_patches_are_those_of_each_token():
    image = torch.rand(1, 60, 120, 3)
    got, grid = qwen_vl.patches(image)
    assert grid == (4, 8) and got.shape == (32, 1176)
    pixels = torch.nn.functional.interpolate(image.movedim(-1, 1), (56, 112), mode="bilinear")[0]
    number = 0
    for token_row in range(2):
        for token_column in range(4):
            for row in range(2):
                for column in range(2):
                    top, left = (2 * token_row + row) * 14, (2 * token_column + column) * 14
                    cell = pixels[:, top : top + 14, left : left + 14]
                    want = torch.stack([(cell[c] - MEAN[c]) / DEVIATION[c] for c in range(3)])
                    torch.testing.assert_close(got[number].view(3, 2, 14, 14), want[:, None].expand(-1, 2, -1, -1))
                    number += 1


@pytest.mark.parametrize(("size", "grid"), [((20, 20), (4, 4)), ((10, 100), (2, 14)), ((600, 300), (36, 18))])
def test_pictures_have_sides_of_whole_tokens_within_limits(size, grid, monkeypatch):
    monkeypatch.setattr(qwen_vl, "MOST", 128_450)
    _, got = qwen_vl.patches(torch.rand(1, *size, 3))
    assert got == grid and 56**2 <= math.prod(got) * 14**2 <= 128_450


def test_a_prompt_alone(loaded):
    _, reader, clip, words = loaded
    (embeds,) = N["TextImageEncodeQwenVL"]().add(clip, "a cat")
    text = qwen_vl.TEMPLATE.format("a cat")
    ids = reader.encode(text).ids
    x = words["model.embed_tokens.weight"][ids].double()
    want = hidden_states(words, x, torch.arange(len(ids)).double().expand(3, -1))
    behind = len(reader.encode("a cat<|im_end|>\n<|im_start|>assistant\n").ids)
    assert embeds.shape == (1, behind, WIDTH)
    assert (embeds[0].double() - want[-behind:]).norm() / want[-behind:].norm() < 1e-5
    ((conditioning, _),) = STAND_INS["CLIPTextEncode"]().encode("a cat", clip)[0]
    assert torch.equal(conditioning, embeds)


def test_a_prompt_with_a_picture(loaded, caplog):
    model, reader, clip, _ = loaded
    pictures = torch.rand(2, 90, 60, 4)
    (embeds,) = N["TextImageEncodeQwenVL"]().add(clip, "a {cat}", pictures)
    assert "reads the first of 2 pictures" in caplog.text
    pixels, grid = qwen_vl.patches(pictures[:1])
    seen = "<|vision_start|>" + "<|image_pad|>" * (math.prod(grid) // 4) + "<|vision_end|>a {cat}<|im_end|>\n"
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    ids = torch.tensor([reader.encode(f"{before}{seen}<|im_start|>assistant\n").ids])
    with torch.no_grad():
        want = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
            image_grid_thw=torch.tensor([(1, *grid)]), mm_token_type_ids=(ids == MARK).int(),
        ).last_hidden_state  # fmt: skip
    want = want[:, len(reader.encode(before).ids) :]
    assert embeds.shape == want.shape
    assert (embeds - want).norm() / want.norm() < 1e-5


def test_other_encoders_are_refused(loaded):
    (other,) = STAND_INS["CLIPLoader"]().load_clip("t5.safetensors", "wan")
    with pytest.raises(ValueError, match=r"t5\.safetensors is a UMT5 text encoder, which sees no pictures"):
        N["TextImageEncodeQwenVL"]().add(other, "a cat")
    with pytest.raises(ValueError, match=r"t5\.safetensors is no Qwen2\.5-VL"):
        STAND_INS["CLIPLoader"]().load_clip("t5.safetensors", "qwen_image")
    assert "'wan' or 'qwen_image'" in STAND_INS["CLIPLoader"].VALIDATE_INPUTS("flux")
