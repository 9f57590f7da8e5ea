"""Processes of a test file: started once, they run functions of modules, each the same one at the same time."""

import contextlib
import importlib
import os
import tempfile
import traceback
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from import_path import import_path
from limits import PATIENCE

TESTS = str(Path(__file__).parent)


def _serve(rank, world, folder, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while (job := pipe.recv()) is not None:
        module, name, arguments = job
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Several:
    """`world` processes with a Gloo group, forked from one that has imported what they need."""

    def __init__(self, world):
        self.world = world

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        context = get_context("forkserver")
        context.set_forkserver_preload(["preloaded"])
        # The server of Python 3.11 does not take over sys.path.
        os.environ["PYTHONPATH"] = import_path(TESTS)
        self._pipes, self._processes = [], []
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, folder, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._stack.close()

    def run(self, module, name, *arguments):
        """What the function gave on every rank."""
        for pipe in self._pipes:
            pipe.send((module, name, arguments))
        answers = [pipe.recv() for pipe in self._pipes if pipe.poll(PATIENCE)]
        assert len(answers) == self.world, "a rank does not answer"
        for fine, answer in answers:
            assert fine, answer
        return [answer for _, answer in answers]
