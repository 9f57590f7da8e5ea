"""One server for all tests of this folder; the models are made for those that ask for them."""

import shutil

import pytest
import torch
from comfy_server import missing, serving
from safetensors.torch import save_file
from saved_models import fill
from wanvideo_wrapper.demo import INPUT, MODELS

CLIP_DIM = 1280


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with serving(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def filled_server(server):
    """The server with the demo's models and inputs, and tiny ones of the names that saved graphs use."""
    shutil.copytree(MODELS, server.base / "models", dirs_exist_ok=True)
    shutil.copytree(INPUT, server.base / "input", dirs_exist_ok=True)
    fill(server.base / "models", server.base / "input", clip_dim=CLIP_DIM)
    save_clip(server.base / "models" / "clip_vision" / "clip_vision_h.safetensors")
    return server


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """(file, width) of a CLIP vision encoder that ComfyUI's own loader takes."""
    file = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_clip(file)
    return file, CLIP_DIM


def save_clip(path):
    """ViT-H at full size, the only one that ComfyUI's own loader takes, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CLIP_DIM, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        projection_dim=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        scale = 0.02 if parameter.dim() > 1 else 0.0
        value = torch.randn(parameter.shape) * scale + (1.0 if name.endswith("norm.weight") else 0.0)
        tensors[f"vision_model.{name.removeprefix('vision_model.')}"] = value.half()
    tensors["visual_projection.weight"] = torch.zeros(1024, CLIP_DIM).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
