"""Mutated resume folders, text caches and tokenizers: read as they were written, or left aside or refused in words.

FUZZ_EXAMPLES sets how many cases each reader gets (`make fuzz`: 10,000).
"""

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from limits import limited
from wanvideo_wrapper.demo import tiny
from wanvideo_wrapper.wanvideo import footage as footage_module
from wanvideo_wrapper.wanvideo.checkpoint import open_checkpoint
from wanvideo_wrapper.wanvideo.footage import FolderFootage
from wanvideo_wrapper.wanvideo.modules import tokenizer
from wanvideo_wrapper.wanvideo.text_cache import TextCache

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
run = settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 1000)
INPUTS = {"model": "a", "seed": "b"}
TEXT = "a person talks"


def changes(size):
    """Places and what becomes of the bytes there: replaced, cut out, or cut off."""
    return st.lists(
        st.tuples(st.integers(0, 2**16).map(lambda n: n % size), st.none() | st.binary(max_size=9), st.integers(0, 20)),
        min_size=1,
        max_size=4,
    )


def changed(data, edits):
    data = bytearray(data)
    for place, new, length in edits:
        if new is None:
            del data[place:]
        else:
            data[place : place + length] = new
    return bytes(data)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Files of a run of two finished windows, and what they hand on."""
    patch = pytest.MonkeyPatch()
    # A busy disk takes long for it, and it says nothing about the reader.
    patch.setattr(footage_module, "_flush", lambda path: None)
    folder = tmp_path_factory.mktemp("resume")
    footage = FolderFootage(folder / "talk", 9, INPUTS)
    footage.open()
    handover = {"motion": torch.randn(2, 3), "generator": torch.get_rng_state()[:16]}
    for window in (1, 2):
        footage.add(torch.rand(2, 16, 16, 3))
        footage.finish_window(window, handover)
    footage.close()
    yield folder, handover
    patch.undo()


ODD = st.sampled_from(
    [None, True, -1, 0, 3, 10**30, 1.5, 1e400, "", "x", "../../run.json", "/etc/passwd", [], [[]], {}, {"model": 1}]
)


@run
@given(
    name=st.sampled_from(["run.json", "window_00002.safetensors"]),
    edits=changes(400),
    fields=st.dictionaries(st.sampled_from(["inputs", "windows", "frames", "state", "digest", "format"]), ODD),
)
@example(name="run.json", edits=[], fields={"frames": 10**30})
@example(name="run.json", edits=[], fields={"state": "../../other.safetensors"})
@example(name="window_00002.safetensors", edits=[(0, None, 0)], fields={})
def test_resume_folders(name, edits, fields, unfinished):
    folder, handover = unfinished
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder / "talk", case / "talk")
    inner = case / "talk/.unfinished"
    if fields:
        record = json.loads((inner / "run.json").read_text())
        (inner / "run.json").write_text(json.dumps({**record, **fields}))
    path = inner / name
    before = (folder / "talk/.unfinished" / name).read_bytes()
    path.write_bytes(changed(path.read_bytes(), edits))
    whole = path.read_bytes() == before and all(
        json.loads((folder / "talk/.unfinished/run.json").read_text())[key] == value for key, value in fields.items()
    )
    footage = FolderFootage(case / "talk", 9, INPUTS)
    with limited(case):
        windows, tensors = footage.open()
    footage.close()
    assert windows in ((2,) if whole else (0, 2))
    if windows:
        assert footage.frames == 4 and all(torch.equal(tensors[key], value) for key, value in handover.items())
    else:
        assert footage.frames == 0 and tensors is None


def test_a_record_nested_without_end_is_none(tmp_path):
    inner = tmp_path / "talk/.unfinished"
    inner.mkdir(parents=True)
    (inner / "run.json").write_bytes(b"[" * 100_000)
    footage = FolderFootage(tmp_path / "talk", 9, INPUTS)
    assert footage.open() == (0, None)
    footage.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache = TextCache(tmp_path_factory.mktemp("cache"))
    cache.save(TEXT, "t5", torch.randn(3, 5))
    return cache, cache._path(TEXT, "t5"), cache._path(TEXT, "t5").read_bytes()


@run
@given(edits=changes(200))
@example(edits=[(0, struct.pack("<Q", 2**60), 8)])
def test_text_caches(edits, cache):
    cache, path, data = cache
    path.write_bytes(changed(data, edits))
    with limited(path):
        embedding = cache.load(TEXT, "t5")
    assert embedding is None or (embedding.dim() == 2 and len(embedding) and embedding.float().isfinite().all())


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A SentencePiece model, and the same vocabulary as tokenizer.json."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("tokenizers")
    model = tiny.text_encoder()
    spiece = bytes(model.tensors.pop("spiece_model").tolist())
    model.save(folder / "t5.safetensors")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "abcdefgh")]
    fast = Tokenizer(models.Unigram(pieces, 2)).to_str().encode()
    return open_checkpoint(folder / "t5.safetensors"), folder, {"spiece.model": spiece, "tokenizer.json": fast}


@run
@given(name=st.sampled_from(["spiece.model", "tokenizer.json"]), edits=changes(4000))
@example(name="spiece.model", edits=[(0, None, 0)])
@example(name="tokenizer.json", edits=[(0, None, 0)])
def test_tokenizers(name, edits, vocabularies):
    checkpoint, folder, files = vocabularies
    for other in files:
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(changed(files[name], edits))
    try:
        with limited(folder / name):
            ids = tokenizer.find_tokenizer(checkpoint, [folder]).encode(TEXT)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    assert ids[-1] == tokenizer.END_OF_TEXT and all(isinstance(number, int) for number in ids)
