"""Generated LoRA files, with unknown and damaged parts: no key is dropped without a word, and nothing is misread."""

import os
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import limited
from lora_files import KINDS, NAMINGS, PAIRS
from safetensors.torch import save_file
from torch import nn
from wanvideo_wrapper.wanvideo.lora import LoraFile, read_lora
from wanvideo_wrapper.wanvideo.lora.reading import ABSENT, MISFIT, NOT_SELECTED, TEXT, UNKNOWN, USED

WIDTH = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_q = nn.LayerNorm(WIDTH)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH))


MODEL = nn.Module()
MODEL.blocks = nn.ModuleList(Block() for _ in range(2))
MODEL.requires_grad_(False)
WEIGHT = MODEL.blocks[0].self_attn.q.weight

LAYERS = [f"blocks.{n}.self_attn.{leaf}" for n in range(3) for leaf in ("q", "o")]
PARTS = [
    *(suffix for pair in PAIRS.values() for suffix in pair), ".alpha", ".dora_scale", ".lora_magnitude_vector", ".diff",
    ".diff_b", ".diff_m", ".lora_mid.weight", ".lora_B.bias", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b",
    ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".lokr_w1_a", ".oft_blocks",
    ".a1.weight", ".w_norm", ".b_norm", ".lora_A.extra.weight", "", ".weight", ".set_weight",
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]
sizes = st.sampled_from([0, 1, 2, 4, 8, WIDTH])


def layers():
    own = st.builds(lambda naming, layer: NAMINGS[naming](layer), st.sampled_from([*NAMINGS][:8]),
                    st.sampled_from(["blocks.0.self_attn.q", "blocks.1.self_attn.o"]))  # fmt: skip
    odd = st.sampled_from([*LAYERS, "lora_te_a", "double_blocks.0.qkv", "blocks.0", "", "."])
    return own | odd | st.text(max_size=8)


@st.composite
def tensors(draw):
    shape, dtype = draw(st.lists(sizes, max_size=4)), draw(st.sampled_from(DTYPES[:4] * 3 + DTYPES))
    value = (torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 100.0]))).to(dtype)
    if value.is_floating_point() and value.element_size() > 1 and draw(st.integers(0, 9)) == 0:
        value = value.fill_(float("nan"))
    return value


@st.composite
def files(draw):
    """Sound changes, sound changes with some keys damaged or lost, and anything at all."""
    content = {}
    if draw(st.booleans()):
        parts, _ = KINDS["pair"](WEIGHT, 4)
        content = {"diffusion_model.blocks.1.self_attn.q" + suffix: value for suffix, value in parts.items()}
    for layer in draw(st.lists(layers(), max_size=3)):
        parts, _ = KINDS[draw(st.sampled_from(list(KINDS)))](WEIGHT, draw(st.sampled_from([1, 4])))
        for suffix, value in parts.items():
            fate = draw(st.integers(0, 9))
            if fate:
                content[layer + suffix] = value.clone() if fate > 2 else draw(tensors())
    anything = draw(st.dictionaries(st.builds(str.__add__, layers(), st.sampled_from(PARTS)), tensors(), max_size=5))
    return {key: value.contiguous() for key, value in (content | anything).items() if key != "__metadata__"}


# `make fuzz` makes 10,000.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))


@settings(max_examples=EXAMPLES)
@given(files(), st.sampled_from([None, ("blocks.1.",), ()]))
def test_nothing_is_dropped_without_a_word(content, blocks):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "l.safetensors"
        save_file(content, path)
        try:
            with limited(path):
                lora = read_lora(LoraFile(path=path, blocks=blocks), MODEL)
        except ValueError as error:
            assert "l.safetensors" in str(error) and len(str(error)) < 600 + max(map(len, content), default=0)
            return
    assert set(lora.fates) == set(content)
    by_kind = {kind: {key for key, fate in lora.fates.items() if fate.kind == kind}
               for kind in (USED, ABSENT, MISFIT, TEXT, UNKNOWN, NOT_SELECTED)}  # fmt: skip
    assert set().union(*by_kind.values()) == set(content)
    assert all(lora.fates[key].reason for key in by_kind[MISFIT])
    assert {key for left in lora.left_out for key in left.keys} == by_kind[ABSENT] | by_kind[MISFIT] | {
        key for key in by_kind[TEXT] if any(key in left.keys for left in lora.left_out)
    }
    # What is used changes something, all of it is finite, and it is there only where a key was used.
    parameters = dict(MODEL.named_parameters())
    assert bool(lora.changes) == bool(by_kind[USED])
    for name, changes in lora.changes.items():
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        for change in changes:
            assert change.deltas or change.bias is not None
            if change.deltas:
                value = change.weight(weight.shape, lambda weight=weight: weight)
                assert value.shape == weight.shape and value.isfinite().all()


def test_what_is_used_is_needed(tmp_path):
    """Leaving any used key out of a file changes what the file does, so that none is called used for nothing."""
    for kind, make in KINDS.items():
        parts, _ = make(WEIGHT, 4)
        # With both factors in full, LoKr has no rank that alpha could be divided by.
        ignored = {".alpha"} if kind == "lokr_full" else set()
        path = tmp_path / f"{kind}.safetensors"
        save_file({"blocks.0.self_attn.q" + suffix: value.contiguous() for suffix, value in parts.items()}, path)
        whole = read_lora(LoraFile(path=path), MODEL).changes["blocks.0.self_attn.q"][0]
        want = whole.weight(WEIGHT.shape, lambda: WEIGHT)
        for missing in set(parts) - ignored:
            rest = {"blocks.0.self_attn.q" + s: v.contiguous() for s, v in parts.items() if s != missing}
            path = tmp_path / f"{kind} {missing[1:]}.safetensors"
            save_file(rest, path)
            try:
                less = read_lora(LoraFile(path=path), MODEL).changes["blocks.0.self_attn.q"][0]
            except ValueError:
                continue
            got = less.weight(WEIGHT.shape, lambda: WEIGHT)
            assert not torch.allclose(got, want, rtol=1e-3), (kind, missing)
