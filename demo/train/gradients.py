"""A training step's forward and backward as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

WARM_UP = 3


def backward(model: nn.Module, loss_of: Callable[[], Tensor]) -> Tensor:
    """The loss, detached; its gradients are in the parameters' `grad`, in place of earlier ones."""
    model.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    return loss.detach()


class Captured(NamedTuple):
    """A graph, the memory that it reads its inputs from, and where it leaves loss and gradients."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    loss: Tensor
    gradients: tuple[Tensor | None, ...]


class Gradients:
    """Loss and gradients of a model for several forms of batches: a CUDA graph a form on a GPU, eager elsewhere.

    A step of a tiny model is thousands of kernels of a few microseconds; launched one by one, the GPU waits for the
    host most of the time. loss_of(form, *inputs) gives the loss, 0-d. It must not read the device's values on the
    host, and takes its random numbers from PyTorch's default generator. While a form is seen for the first time, no
    other loss of the model may wait for its backward.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[..., Tensor]) -> None:
        self.model, self.loss_of = model, loss_of
        self.parameters = tuple(model.parameters())
        self.on_gpu = self.parameters[0].is_cuda
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.captured: dict[int, Captured] = {}

    def __call__(self, form: int, *inputs: Tensor) -> Tensor:
        """The loss; the gradients are in the parameters' `grad` until the next call."""
        if not self.on_gpu:
            return backward(self.model, lambda: self.loss_of(form, *inputs))
        if form not in self.captured:
            with torch.cuda.device_of(self.parameters[0]):
                self.captured[form] = self._capture(form, inputs)
        captured = self.captured[form]
        for kept, given in zip(captured.inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss

    def _capture(self, form: int, inputs: tuple[Tensor, ...]) -> Captured:
        device = self.parameters[0].device
        kept = tuple(t.to(device, copy=True) for t in inputs)
        # Kernels are chosen and compiled here: neither is possible while a graph is captured.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                backward(self.model, lambda: self.loss_of(form, *kept))
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = backward(self.model, lambda: self.loss_of(form, *kept))
        return Captured(graph, kept, loss, tuple(p.grad for p in self.parameters))
