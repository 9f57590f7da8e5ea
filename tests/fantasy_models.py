"""Tiny FantasyTalking and FantasyPortrait modules for the tiny transformers, and a face detector of fixed answers."""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import torch
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.fantasyportrait.extension import FantasyPortrait
from wanvideo_wrapper.fantasyportrait.motion import FaceAlignmentNetwork, FanEncoder
from wanvideo_wrapper.fantasytalking.extension import FantasyTalking

CONTEXT = 48
TALKING = FantasyTalking(context_dim=CONTEXT)
PORTRAIT = FantasyPortrait(context_dim=CONTEXT)
# Of the portrait's resamplers: width, hidden width, layers, and queries for mouth and expression.
DIM, HIDDEN, LAYERS, QUERIES = 128, 96, 2, {"mouth": 3, "emo": 2}
PART_SIZES = {"headpose": 6, "eye": 6, "emo": 30, "mouth": 512}


def normal(generator, *shape):
    """Values that keep the size of what they multiply."""
    return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)


def of_blocks(system, layers):
    """The tensors of every block, large enough to show in a result."""
    whole = tiny.transformer(in_dim=16, layers=layers, extensions=(system,), seed=8).tensors
    return {key: value * 4 for key, value in whole.items() if system.owns(key)}


def talking_module(layers=3, features=tiny.SPEECH_DIM):
    """Keys and values of every block, and the projection of features of the tiny speech encoder."""
    tensors, generator = of_blocks(TALKING, layers), torch.Generator().manual_seed(9)
    tensors["proj_model.proj.weight"] = normal(generator, CONTEXT, features)
    tensors["proj_model.norm.weight"] = 1 + normal(generator, CONTEXT)
    tensors["proj_model.norm.bias"] = normal(generator, CONTEXT)
    return tiny.Tiny(tensors=tensors)


def projections():
    """The portrait's projections under published names."""
    generator = torch.Generator().manual_seed(10)
    shapes = {f"proj_model.{name}_proj.weight": (CONTEXT, size) for name, size in PART_SIZES.items()}
    norms = ["proj_model.norm"]
    for name, queries in QUERIES.items():
        top = f"{name}_proj_model."
        shapes |= {f"{top}latents": (1, queries, DIM), f"{top}proj_in.weight": (DIM, PART_SIZES[name]),
                   f"{top}proj_in.bias": (DIM,), f"{top}proj_out.weight": (CONTEXT, DIM),
                   f"{top}proj_out.bias": (CONTEXT,)}  # fmt: skip
        norms.append(f"{top}norm_out")
        for i in range(LAYERS):
            layer = f"{top}layers.{i}."
            shapes |= {f"{layer}0.to_q.weight": (DIM, DIM), f"{layer}0.to_kv.weight": (2 * DIM, DIM),
                       f"{layer}0.to_out.weight": (DIM, DIM), f"{layer}1.1.weight": (HIDDEN, DIM),
                       f"{layer}1.3.weight": (DIM, HIDDEN)}  # fmt: skip
            norms += [f"{layer}0.norm1", f"{layer}0.norm2", f"{layer}1.0"]
    tensors = {name: normal(generator, *shape) for name, shape in shapes.items()}
    for norm in norms:
        size = CONTEXT if norm.endswith(("norm_out", "model.norm")) else DIM
        tensors |= {f"{norm}.weight": 1 + normal(generator, size), f"{norm}.bias": normal(generator, size)}
    return tensors


def motion_encoder(features=512):
    """A narrow motion encoder with random weights, and what its published file has besides."""
    torch.manual_seed(11)
    model = FanEncoder(FaceAlignmentNetwork(4, 16, 6, features), features, (6, 6, 30))
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if parameter.dim() == 1:
            near_one = name.endswith(("running_var", "weight"))
            value = torch.rand_like(value) * 0.5 + 0.75 if near_one else torch.randn_like(value) * 0.1
        tensors[f"pd_fpg.{name}"] = value
    tensors["pd_fpg.model.bn1.num_batches_tracked"] = torch.tensor(7)
    return tensors


def portrait_module(layers=3, motion=True):
    """The blocks' layers under the prefix of the published file, projections, and the motion encoder."""
    blocks = {f"ip_adapter.{key}": value for key, value in of_blocks(PORTRAIT, layers).items()}
    return tiny.Tiny(tensors=blocks | projections() | (motion_encoder() if motion else {}))


def landmarks_of_face():
    """222 points of a face that fill the crop but for its margin, the corners of the eyes level."""
    points = np.random.default_rng(12).uniform(0.075, 0.925, (222, 2))
    points[0], points[32] = (0.075, 0.075), (0.925, 0.925)
    points[[182, 202, 36, 149, 133]] = ((0.38, 0.27), (0.62, 0.27), (0.5, 0.42), (0.4, 0.53), (0.6, 0.53))
    points[74], points[96] = (0.2, 0.3), (0.8, 0.3)
    return points


class Session:
    """One face that fills the detector's picture, with the same landmarks in every crop."""

    def __init__(self, path, providers):
        self.detects = path.endswith("face_det.onnx")

    def get_inputs(self):
        return [types.SimpleNamespace(name="image")]

    def run(self, outputs, inputs):
        (image,) = inputs.values()
        assert image.dtype == np.float32 and image.shape == ((1, 3, 272, 160) if self.detects else (1, 3, 128, 128))
        if not self.detects:
            return [landmarks_of_face().T.reshape(1, -1).astype(np.float32), np.zeros((1, 3)), np.ones((1, 1))]
        counts = (34 * 20, 17 * 10, 9 * 5)
        scores, boxes = [np.zeros((1, n, 1)) for n in counts], [np.zeros((1, n, 32)) for n in counts]
        # Column 2 of row 4, at 32 pixels each, and two of those to every side.
        scores[2][0, 4 * 5 + 2], middle = 0.9, boxes[2][0, 4 * 5 + 2].reshape(4, 8)
        middle[:, 2] = 50.0
        return [*scores, *boxes]


def fixed_onnxruntime(providers=("CUDAExecutionProvider", "CPUExecutionProvider")):
    """An onnxruntime of fixed answers."""
    package = types.ModuleType("onnxruntime")
    package.__spec__ = ModuleSpec("onnxruntime", None)
    package.InferenceSession, package.get_available_providers = Session, lambda: list(providers)
    return package


def name_detector(folder):
    """Files for it in models/detection."""
    (folder / "detection").mkdir(exist_ok=True)
    for name in ("face_det.onnx", "face_landmark.onnx"):
        (folder / "detection" / name).touch()


def stand_in_detector(monkeypatch, folder, **options):
    name_detector(folder)
    monkeypatch.setitem(sys.modules, "onnxruntime", fixed_onnxruntime(**options))
