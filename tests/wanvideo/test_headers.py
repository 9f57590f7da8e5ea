"""Damaged headers end in one sentence. FUZZ_EXAMPLES says how many are made of each kind."""

import copy
import json
import os
import struct

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from header_files import NAMES, opened, small_files
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import limited
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.model_file import open_file

HEADERS_MEMORY = 200 * 10**6
SETTINGS = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")))
ODD = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, 1.0, 2.5, 1e400, "", "F32", "I8", "U8", "F8_E4M3", "F9",
    "\ud800", "a\nb", [], [0], [1, 2], [0, 8, 16], [-4, 4], [2**62, 2**62], ["4", 8], [0.0, 4.0], {}, {"a": "b"},
    {"format": None},
)  # fmt: skip


def split(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@st.composite
def safetensors_faults(draw):
    """A change of the header's values, or of the file's bytes."""
    data = SAVED["safetensors"]
    if draw(st.booleans()):
        return flipped(draw, data, 700)
    header, rest = split(data)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        value = copy.deepcopy(draw(st.sampled_from(ODD)))
        how = draw(st.integers(0, 4))
        if how == 0:
            header[name] = value
        elif how == 1:
            header[draw(st.sampled_from((*NAMES, "__metadata__", "x", "x.comfy_quant", "\ud800", "a\nb")))] = (
                copy.deepcopy(header[name])
            )
        elif how == 2 and len(header) > 1:
            del header[name]
        elif isinstance(header[name], dict):
            header[name][
                draw(st.sampled_from(("dtype", "shape", "data_offsets", "format", "_quantization_metadata")))
            ] = value
    return joined(header, rest[: draw(st.sampled_from((None, -1, 3)))] + draw(st.sampled_from((b"", b"", b"x"))))


def flipped(draw, data, most):
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(most, len(data)) - 1))
        how = draw(st.integers(0, 2))
        if how == 0:
            data[place] = draw(st.integers(0, 255))
        elif how == 1:
            data[place : place + 8] = draw(st.sampled_from((b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40))))
        else:
            del data[place : place + draw(st.integers(1, 40))]
    return bytes(data)


@st.composite
def gguf_faults(draw):
    return flipped(draw, SAVED["gguf"], 900)


SAVED = {}


@pytest.fixture(scope="module", autouse=True)
def _saved(tmp_path_factory):
    SAVED.update(small_files(tmp_path_factory.mktemp("headers")))


def test_what_is_whole_is_read(tmp_path):
    for kind, data in SAVED.items():
        (tmp_path / f"m.{kind}").write_bytes(data)
    want, got = load_file(tmp_path / "m.safetensors"), open_file(tmp_path / "m.safetensors")
    assert set(got.tensors) == set(want) == set(NAMES)
    assert all(torch.equal(got.read(n).view(torch.uint8), t.view(torch.uint8)) for n, t in want.items())
    reader, file = GGUFReader(tmp_path / "m.gguf"), open_file(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        assert np.array_equal(file.read(tensor.name).flatten().numpy(), np.asarray(tensor.data).flatten())
    assert file.tensors["patch"].shape == (2, 4, 1, 2, 2) and file.tensors["layer.weight"].shape == (4, 32)
    assert file.array("tokenizer.ggml.tokens") == ["a", "b", "cd"] and file.array("absent") == []
    assert file.metadata["general.architecture"] == "wan"


@SETTINGS
@given(data=safetensors_faults())
def test_damaged_safetensors(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data)
    with limited(path, most=HEADERS_MEMORY):
        read = opened(path)
    if read is None:
        return
    try:
        with safe_open(path, "pt") as reference:
            assert set(read) <= set(reference.keys())
    except SafetensorError as error:
        pytest.fail(f"The reference library refuses what is taken here: {error}")


@SETTINGS
@given(data=gguf_faults())
def test_damaged_gguf(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    with limited(path, most=HEADERS_MEMORY):
        read = opened(path)
    for tensor in (read or {}).values():
        assert tensor.numel() <= 2**20


def broken(**changes):
    header, rest = split(SAVED["safetensors"])
    for name, change in changes.items():
        header[NAMES[int(name[1:])]] |= change
    return joined(header, rest)


CASES = {
    "null metadata": lambda: joined({"__metadata__": None}, b""),
    "list as metadata": lambda: joined({"__metadata__": ["a"]}, b""),
    "number in metadata": lambda: joined({"__metadata__": {"a": 1}}, b""),
    "nested": lambda: struct.pack("<Q", 100_001) + b'{"a":' + b"[" * 99_996,
    "float offsets": lambda: broken(n0={"data_offsets": [0.0, 24.0]}),
    "negative shape": lambda: broken(n0={"shape": [-6, -4]}),
    "bool in shape": lambda: broken(n0={"shape": [True, 24]}),
    "huge shape": lambda: broken(n0={"shape": [2**62, 2**62]}),
    "shape that does not fit": lambda: broken(n0={"shape": [6, 5]}),
    "overlap": lambda: broken(n0={"data_offsets": [0, 24]}, n1={"data_offsets": [0, 24]}),
    "unknown type": lambda: broken(n0={"dtype": "F9"}),
    "long header": lambda: struct.pack("<Q", 2**40) + b"{}",
    "tail": lambda: SAVED["safetensors"] + b"x",
    "cut": lambda: SAVED["safetensors"][:-1],
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", CASES)
def test_faults_that_were_met(case, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(CASES[case]())
    with pytest.raises(ValueError, match=r"^m\.safetensors is truncated or is no safetensors file \(.+\); download it"):
        open_checkpoint(path)
    # What the reference library takes and this one does not: metadata that is null.
    if case != "null metadata":
        with pytest.raises(SafetensorError):
            safe_open(path, "pt").__enter__()


def gguf_header(*, tensors=0, fields=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGUF", "its header ends early"),
        (gguf_header(version=0x03000000), "its version is"),
        (gguf_header(tensors=2**62), "announces"),
        (gguf_header(fields=2**40), "announces"),
        (gguf_header(fields=1, rest=struct.pack("<Q", 2**50) + bytes(9)), "ends early"),
        (gguf_header(fields=1, rest=struct.pack("<Q1sII", 1, b"a", 9, 9) + bytes(8)), "array of the type 9"),
        (gguf_header(fields=1, rest=struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60) + bytes(8)), "announces"),
        (gguf_header(tensors=1, rest=struct.pack("<Q1sIQQIQ", 1, b"a", 2, 2**62, 2**62, 0, 0)), "whole numbers"),
        (gguf_header(tensors=1, rest=struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0, 128) + bytes(99)), "bytes are missing"),
        (gguf_header(tensors=1, rest=struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 99, 0) + bytes(99)), "unknown type 99"),
        (gguf_header(tensors=1, rest=struct.pack("<Q1sIQIQ", 1, b"a", 1, 40, 2, 0) + bytes(99)), "do not fill"),
        (gguf_header(tensors=1, rest=struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0, 8) + bytes(99)), "lies between"),
    ],
)
def test_gguf_faults_that_were_met(data, reason, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^m\.gguf is truncated or is no GGUF file \(.*{reason}.*\); download it"):
        open_file(tmp_path / "m.gguf")


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x0280)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 0x0280) + header + b"\x07")
    assert open_file(tmp_path / "m.safetensors").read("a").item() == 7
