"""ONNX models: each file opened on the device that was asked for, or the reason why not."""

import logging
import sys
import types

import pytest
from wanvideo_wrapper.wanvideo.onnx_models import OnnxModels

TOYS = OnnxModels("The toy detector", ("one.onnx", "two.onnx"), "the files of toys/toys")


@pytest.fixture
def onnxruntime(monkeypatch, tmp_path):
    """A package that tells what it was asked to open, and both files."""
    package = types.ModuleType("onnxruntime")
    package.InferenceSession = lambda path, providers: (path, providers)
    package.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    for name in TOYS.names:
        (tmp_path / name).touch()
    return package


def opened(folder, provider):
    return [(str(folder / name), [provider]) for name in TOYS.names]


def test_sessions_are_on_the_device(onnxruntime, tmp_path):
    assert TOYS.open(tmp_path, "cpu") == opened(tmp_path, "CPUExecutionProvider")
    onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert TOYS.open(tmp_path, "cuda") == opened(tmp_path, "CUDAExecutionProvider")


def test_a_package_without_cuda_is_refused_or_told(onnxruntime, tmp_path, caplog):
    with pytest.raises(ValueError, match="has no CUDA: choose device 'cpu'"):
        TOYS.open(tmp_path, "cuda")
    with caplog.at_level(logging.WARNING):
        assert TOYS.open(tmp_path, "cuda", required=False) == opened(tmp_path, "CPUExecutionProvider")
    assert "The toy detector runs on the CPU" in caplog.text


def test_what_is_missing_is_named(onnxruntime, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="The toy detector needs the package onnxruntime, .* pip install onnxruntime"):
        TOYS.open(tmp_path, "cpu")
    (tmp_path / "two.onnx").unlink()
    with pytest.raises(ValueError, match=r"needs two.onnx in .*: put there the files of toys/toys\."):
        TOYS.open(tmp_path, "cpu")
