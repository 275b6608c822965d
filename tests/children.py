"""Children of one process that has imported all: they start at once, and a kill leaves nothing behind in the tests'."""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import datasets
import torch

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload([
    "faulty_run", "lfrns_hub", "lfrns_hub.recipe", "lfrns_hub.pictures.stream", "datasets", "sklearn.datasets",
    "torch._export", "matplotlib.pyplot", "transformers.models.vit.modeling_vit",
])  # fmt: skip


def start(function: Callable, *arguments: Any, processes: int = 1, port: str = "") -> list[BaseProcess]:
    """Start a function in children: of several each is a process of one run, and gets its rank first."""
    children = []
    for rank in range(processes):
        place = (rank, processes, port) if processes > 1 else None
        children.append(CHILDREN.Process(target=_run, args=(place, function, arguments)))
        children[-1].start()
    return children


def end(children: list[BaseProcess], seconds: float = 240) -> list[int | None]:
    """Wait for children and give their exit codes, None of one that hung; none is left behind."""
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


def _run(place: tuple[int, int, str] | None, function: Callable, arguments: tuple[Any, ...]) -> None:
    """Run a function, as one process of several where a place is given."""
    gc.freeze()  # what was imported is no garbage, and looking through it takes a second each time
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # a stream that ends waits for threads that read the Hub
    torch.set_num_threads(1)
    if place is not None:
        rank, processes, port = place
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "yes"}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        function = _with_rank(function, rank)
    function(*arguments)


def _with_rank(function: Callable, rank: int) -> Callable:
    """Return a function that is called with the rank first."""
    return lambda *arguments: function(rank, *arguments)


def run_script(script: Path, *arguments: object, seconds: float = 280, **environment: str) -> CompletedProcess:
    """Run a program as python does, in a child; what it prints comes back."""
    typed = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        (code,) = end(start(_run_script, typed, environment, told), seconds)
        return CompletedProcess(typed, code, *(path.read_text() for path in told))


def _run_script(typed: list[str], environment: dict[str, str], told: list[Path]) -> None:
    """Be python: arguments, environment and both streams are the program's own."""
    os.environ |= environment
    for path, stream in zip(told, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = typed
    sys.path.insert(0, str(Path(typed[0]).parent))
    runpy.run_path(typed[0], run_name="__main__")
