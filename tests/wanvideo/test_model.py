"""The transformer against diffusers' WanTransformer3DModel: same random weights, renamed."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from wanvideo_wrapper.clip_image.extension import ClipImage
from wanvideo_wrapper.registry import SYSTEMS
from wanvideo_wrapper.wanvideo.config import WanConfig
from wanvideo_wrapper.wanvideo.modules import layers
from wanvideo_wrapper.wanvideo.modules.layers import sinusoidal_embedding
from wanvideo_wrapper.wanvideo.modules.model import WanModel
from wanvideo_wrapper.wanvideo.tokens import ModelInputs

HEADS, HEAD, LAYERS, TEXT = 3, 24, 2, 40
RENAMES = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".add_k_proj", ".k_img"),
    (".add_v_proj", ".v_img"),
    (".norm_added_k", ".norm_k_img"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    ("proj_out", "head.head"),
]


def rename(key):
    for old, new in RENAMES:
        key = key.replace(old, new)
    if key == "scale_shift_table":
        return "head.modulation"
    return key.replace("scale_shift_table", "modulation")


def pair(in_channels, **options):
    torch.manual_seed(torch.seed() % 2**31)
    reference = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=in_channels, out_channels=16, text_dim=TEXT,
        freq_dim=256, ffn_dim=96, num_layers=LAYERS, **options,
    ).eval()  # fmt: skip
    for name, parameter in reference.named_parameters():
        near_one = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(near_one), std=0.1)
    state = {rename(k): v for k, v in reference.state_dict().items()}
    config = WanConfig(
        dim=HEADS * HEAD, ffn_dim=96, num_heads=HEADS, num_layers=LAYERS, in_dim=in_channels, text_dim=TEXT, text_len=9
    )
    model = WanModel(config, SYSTEMS.detect({k: tuple(v.shape) for k, v in state.items()}))
    model.load_state_dict(state, strict=True)
    return reference, model


def padded(text):
    return torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 9 - t.shape[0])) for t in text])


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def test_text_to_video():
    reference, model = pair(16)
    latents, timestep = torch.randn(2, 16, 3, 6, 8), torch.rand(2) * 1000
    text = (torch.randn(5, TEXT), torch.randn(9, TEXT))
    want = reference(latents, timestep, padded(text), return_dict=False)[0]
    assert relative(model(ModelInputs(latents=latents, timestep=timestep, text=text)), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, 14])
def test_image_to_video(positions):
    reference, model = pair(36, image_dim=20, added_kv_proj_dim=HEADS * HEAD, pos_embed_seq_len=positions)
    latents, timestep = torch.randn(1, 36, 3, 4, 6), torch.rand(1) * 1000
    text, image = (torch.randn(9, TEXT),), torch.randn(1, 14, 20)
    split = image if positions is None else image.view(2, 7, 20)
    # diffusers splits image from text tokens by a fixed text length of 512.
    long = torch.nn.functional.pad(padded(text), (0, 0, 0, 512 - 9))
    want = reference(latents, timestep, long, encoder_hidden_states_image=split, return_dict=False)[0]
    model.config = WanConfig(**{**model.config.__dict__, "text_len": 512})
    inputs = ModelInputs(latents=latents, timestep=timestep, text=text, payloads=(ClipImage(image),))
    assert relative(model(inputs), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("times", [(0.0, 731.0, 402.5), (0.0, 731.0)])
def test_timestep_per_frame(times):
    reference, model = pair(16)
    latents = torch.randn(1, 16, len(times), 4, 6)
    timestep = torch.tensor([times])
    text = (torch.randn(9, TEXT),)
    per_token = timestep.repeat_interleave(2 * 3, dim=1)
    want = reference(latents, per_token, padded(text), return_dict=False)[0]
    assert relative(model(ModelInputs(latents=latents, timestep=timestep, text=text)), want) < 1e-5


def test_pieces_are_counted_over_the_whole_batch():
    _, model = pair(16)
    assert model.parts((2, 90, 72)) == 1
    with model.sparing(50):
        assert model.parts((2, 90, 72)) == 4


def test_wrong_inputs_are_named():
    _, model = pair(16)
    text, step = (torch.randn(3, TEXT),), torch.tensor([5.0])
    with pytest.raises(ValueError, match="reads 16 latent channels.*give 36"):
        model(ModelInputs(latents=torch.randn(1, 36, 1, 4, 4), timestep=step, text=text))
    with pytest.raises(ValueError, match="multiples of the patch"):
        model(ModelInputs(latents=torch.randn(1, 16, 1, 5, 4), timestep=step, text=text))
    with pytest.raises(ValueError, match="img_emb"):
        clip = ClipImage(torch.randn(1, 7, 20))
        model(ModelInputs(latents=torch.randn(1, 16, 1, 4, 4), timestep=step, text=text, payloads=(clip,)))


def test_times_need_no_float64_of_the_device(monkeypatch):
    """Apple's GPUs have none; the values are the same."""

    class OnApple(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.double:
                raise TypeError("the MPS framework doesn't support float64")
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result.as_subclass(torch.Tensor) if function is torch.Tensor.to else result

    times = torch.rand(2, 3) * 1000
    want = sinusoidal_embedding(times, 32)
    monkeypatch.setattr(layers, "with_float64", lambda device: torch.device("cpu"))
    assert torch.equal(sinusoidal_embedding(times.as_subclass(OnApple), 32), want)
