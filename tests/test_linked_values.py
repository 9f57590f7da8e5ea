"""What links bring gets one form before any node reads it, or is refused by the name of its input."""

import pytest
import torch
from wanvideo_wrapper import NODE_CLASS_MAPPINGS
from wanvideo_wrapper.linked_values import in_form
from wanvideo_wrapper.node_tools import mappings

PICTURES, MASKS = torch.rand(2, 4, 6, 3), torch.rand(2, 4, 6)
LATENTS, SOUND = torch.rand(1, 16, 3, 4, 4), torch.rand(1, 2, 9)
DECLARED = {
    "required": {"images": ("IMAGE",), "vae": ("WANVAE",), "speech": ("AUDIO",), "count": ("INT", {"default": 1})},
    "optional": {"masks": ("MASK",), "samples": ("LATENT",), "audio": ("AUDIO",), "choice": (["a", "b"],)},
    "hidden": {"unique_id": "UNIQUE_ID"},
}


class Away(torch.Tensor):
    """Stands for a tensor on a GPU, of which `cpu` makes a plain one."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def formed(**values):
    return in_form(DECLARED, values, "Node")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (PICTURES, PICTURES),
        (PICTURES[0], PICTURES[:1]),
        (PICTURES[..., :1], PICTURES[..., :1].expand(-1, -1, -1, 3)),
        (torch.cat((PICTURES, PICTURES[..., :1]), dim=-1), torch.cat((PICTURES, PICTURES[..., :1]), dim=-1)),
        (PICTURES.as_subclass(Away), PICTURES),
    ],
)
def test_pictures(given, want):
    got = formed(images=given)["images"]
    assert type(got) is torch.Tensor and torch.equal(got, want)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (MASKS, MASKS),
        (MASKS[0], MASKS[:1]),
        (MASKS[:, None], MASKS),
        (MASKS[..., None], MASKS),
        (MASKS[:1, None], MASKS[:1]),
        (MASKS > 0.5, (MASKS > 0.5).float()),
        (MASKS.as_subclass(Away), MASKS),
    ],
)
def test_masks(given, want):
    got = formed(masks=given)["masks"]
    assert type(got) is torch.Tensor and torch.equal(got, want)


@pytest.mark.parametrize(("given", "want"), [(SOUND, SOUND), (SOUND[0], SOUND), (SOUND[0, 0], SOUND[:, :1])])
def test_sounds(given, want):
    got = formed(audio={"waveform": given.as_subclass(Away), "sample_rate": 8000})["audio"]
    assert type(got["waveform"]) is torch.Tensor and torch.equal(got["waveform"], want) and got["sample_rate"] == 8000


def test_latents():
    given = {"samples": LATENTS.as_subclass(Away), "noise_mask": MASKS.as_subclass(Away), "has_ref": 1}
    got = formed(samples=given)["samples"]
    assert type(got["samples"]) is torch.Tensor is type(got["noise_mask"]) and got["has_ref"] == 1
    assert torch.equal(got["samples"], LATENTS) and type(given["samples"]) is Away
    assert got.get("video") is None
    with pytest.raises(ValueError, match="Node: 'samples' has no 'samples' but video: connect latents"):
        _ = formed(samples={"video": PICTURES})["samples"]["samples"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("images", PICTURES[..., :2], r"is \(2, 4, 6, 2\), but pictures are"),
        ("images", LATENTS, r"is \(1, 16, 3, 4, 4\), but pictures are"),
        ("images", PICTURES[:0], "holds no picture"),
        ("images", {"samples": LATENTS}, "is a dict, not pictures"),
        ("masks", PICTURES, r"is \(2, 4, 6, 3\), but masks are"),
        ("masks", MASKS[:0], "holds no mask"),
        ("masks", [MASKS], "is a list, not masks"),
        ("samples", {"samples": LATENTS[:, :, 0]}, r"is \(1, 16, 4, 4\), but latents of a video are"),
        ("samples", {"samples": LATENTS[:, :, :0]}, r"is \(1, 16, 0, 4, 4\), without any frame"),
        ("samples", LATENTS, "is a Tensor, not latents"),
        # ComfyUI's LTXV with sound has a class of its own for the two.
        ("samples", {"samples": [LATENTS, SOUND]}, "is a list, but latents of a video are"),
        ("audio", {"waveform": SOUND[..., :0], "sample_rate": 8000}, "has no samples"),
        ("audio", {"sample_rate": 8000}, "is no sound"),
        ("audio", {"waveform": SOUND}, "has no sample rate, so that its length is not known"),
        ("audio", {"waveform": SOUND, "sample_rate": None}, "has no sample rate"),
        ("audio", {"waveform": SOUND, "sample_rate": 0}, "has no sample rate"),
        ("audio", "voice.wav", "is no sound"),
        ("images", None, "got nothing from the node"),
        ("vae", None, "got nothing from the node"),
    ],
)
def test_the_rest_is_refused_by_name(name, value, says):
    with pytest.raises(ValueError, match=f"^Node: '{name}' {says}"):
        formed(**{name: value})


def test_everything_else_passes():
    vae = object()
    values = {"masks": None, "samples": None, "speech": None, "vae": vae, "count": 3, "choice": "a", "unique_id": "7"}
    got = formed(**values)
    assert all(got[name] is value for name, value in values.items())


def test_links_to_inputs_that_a_node_has_not_are_named():
    with pytest.raises(ValueError, match="^Node has no input 'teacache' in this version.*disconnect it"):
        formed(teacache=MASKS)


def test_every_node_reads_what_was_brought_into_form():
    class Node:
        """Any."""

        DISPLAY_NAME, FUNCTION, RETURN_TYPES = "Any node", "run", ("MASK",)

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"masks": ("MASK",)}}

        def run(self, masks):
            return masks

    mappings(Node)
    assert torch.equal(Node().run(masks=MASKS[0]), MASKS[:1])
    with pytest.raises(ValueError, match="Any node: 'masks' holds no mask"):
        Node().run(masks=MASKS[:0])
    assert all(hasattr(getattr(node, node.FUNCTION), "__wrapped__") for node in NODE_CLASS_MAPPINGS.values())


def test_pictures_of_16_bits_are_read_as_32():
    assert formed(images=PICTURES.half())["images"].dtype == torch.float32
