"""Benchmark of dense against slim: times in eager mode, compiled and in ONNX Runtime, memory and disk space."""

import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.measure import evaluating, forward_passes, take_turns, wait_for
from lfrns_hub.runtimes.export import export, installed, open_runner

RUNTIMES = ("eager", "compiled", "onnxruntime")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass
class Timing:
    """Milliseconds of one forward pass, each figure as [median, first quartile, third quartile].

    Attributes:
        runtime: "eager", "compiled" (by torch.compile) or "onnxruntime".
        batch: Images per pass.
        dense_ms, slim_ms: Times of the two models, in turns.
        ratio: Slim over dense, per turn: a busy machine slows both alike.
        dense_images_s, slim_images_s: Images per second, at the median.
    """

    runtime: str
    batch: int
    dense_ms: list[float]
    slim_ms: list[float]
    ratio: list[float]
    dense_images_s: float
    slim_images_s: float


@dataclass
class Bench:
    """Results of `bench`.

    Attributes:
        timings: One for each runtime and batch.
        left_out: Why timings are missing: a line by runtime, or by runtime and batch.
    """

    timings: list[Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def bench(
    slim: nn.Module,
    dense: nn.Module,
    example_input: Tensor,
    *,
    batches: Sequence[int] = (1, 32),
    runs: int = 30,
    warmup: int = 5,
    seconds: float = 5.0,
    runtimes: Sequence[str] = RUNTIMES,
) -> Bench:
    """Time a slim model against its dense one, in turns: eager, compiled, and in ONNX Runtime where it is installed.

    Compilation is not timed. If a runtime cannot run one of the two, its rows are left out, with the reason.

    Args:
        slim, dense: Models, each run on its device; ONNX Runtime runs on the CPU, with torch's number of threads.
        example_input: Images [N, C, H, W]; the first is repeated.
        batches: Images per pass, from 1.
        runs: Largest number of timed turns, from 1.
        warmup: Largest number of turns before them that are not timed.
        seconds: Time limit for the turns of a runtime and batch, once five are timed.
        runtimes: Those of RUNTIMES to time. Compilation takes long, for each model and batch.
    Returns:
        The timings.
    Raises:
        ValueError: There is no batch, or a batch or `runs` is below 1.
    """
    if not batches or min(batches) < 1 or runs < 1:
        raise ValueError(f"bench(batches={list(batches)}, runs={runs}): each must be 1 or more, as batches=[1, 32].")
    models, found = {"dense": dense, "slim": slim}, Bench()
    turns = {"runs": runs, "warmup": warmup, "seconds": seconds}
    sized = {batch: example_input[:1].repeat(batch, *[1] * (example_input.ndim - 1)) for batch in batches}
    with evaluating(*models.values()), torch.no_grad():
        for batch, images in sized.items() if "eager" in runtimes else ():
            found.timings.append(_time("eager", batch, forward_passes(models, images), turns))
        for batch, images in sized.items() if "compiled" in runtimes else ():
            try:
                found.timings.append(_time_compiled(models, batch, images, turns))
            except Exception as error:  # no compiler, or a forward that it refuses: the error types vary
                found.left_out[f"compiled, batch {batch}"] = _line(error)
        if "onnxruntime" not in runtimes:
            return found
        if missing := [package for package in ONNX_PACKAGES if not installed(package)]:
            found.left_out["onnxruntime"] = f"{', '.join(missing)} not installed: pip install 'lfrns_hub[export]'"
        else:
            try:
                with tempfile.TemporaryDirectory(prefix="lfrns-bench-") as folder:
                    found.timings += _time_onnx(models, sized, Path(folder), turns)
            except Exception as error:  # the exporter's and the runtime's errors
                found.left_out["onnxruntime"] = _line(error)
    return found


def _line(error: Exception) -> str:
    """Return an error as one line."""
    return short(f"{type(error).__name__}: {error}", 160)


def _time_compiled(models: dict[str, nn.Module], batch: int, images: Tensor, turns: dict[str, Any]) -> Timing:
    """Compile both models for one batch and time them; the compilation, at the first pass, is not timed."""
    torch._dynamo.reset()  # else a second batch is compiled for any size, which is slower
    try:
        calls = forward_passes({name: torch.compile(model, dynamic=False) for name, model in models.items()}, images)
        for call in calls.values():
            call()
        return _time("compiled", batch, calls, turns)
    finally:
        torch._dynamo.reset()


def _time_onnx(
    models: dict[str, nn.Module], sized: dict[int, Tensor], folder: Path, turns: dict[str, Any]
) -> list[Timing]:
    """Export both models and time the sessions.

    Raises:
        ValueError: A model cannot be exported, or accepts only one batch size.
    """
    exports = {name: export(model, folder / f"{name}.onnx", sized[min(sized)]) for name, model in models.items()}
    if not all(one.any_batch for one in exports.values()):
        raise ValueError("the export of one of the two takes one batch size alone")
    runners: dict[str, Any] = {
        name: open_runner(one.path, threads=torch.get_num_threads()) for name, one in exports.items()
    }
    plain = {batch: images.detach().float().cpu() for batch, images in sized.items()}
    return [
        _time("onnxruntime", batch, {n: lambda r=r, i=images: r(i) for n, r in runners.items()}, turns)
        for batch, images in plain.items()
    ]


def _time(runtime: str, batch: int, calls: dict[str, Callable[[], Any]], turns: dict[str, Any]) -> Timing:
    """Time the two models in turns."""
    times = take_turns(calls, **turns)
    ratios = [slim / dense for slim, dense in zip(times["slim"], times["dense"], strict=True)]
    dense, slim = _quartiles(times["dense"]), _quartiles(times["slim"])
    return Timing(runtime, batch, dense, slim, _quartiles(ratios), *(1000 * batch / ms[0] for ms in (dense, slim)))


def _quartiles(values: list[float]) -> list[float]:
    """Return median, first and third quartile."""
    if len(values) == 1:
        return values * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return [median, first, third]


def size_on_disk(model: nn.Module) -> float:
    """Return the size of a model's weights as a safetensors file, in MB, as `lfrns_hub.save` writes it."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix="lfrns-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        return path.stat().st_size / 1e6


def peak_memory(
    build: str, arguments: Sequence[Any], shape: Sequence[int], batches: Sequence[int], *, device: str, dtype: str
) -> dict[int, float] | None:
    """Measure the peak memory of a forward pass, weights included, in a fresh process.

    On CUDA it is torch.cuda.max_memory_allocated. On a CPU it is the weights plus the rise of the peak of resident
    memory (VmHWM on Linux, else getrusage's ru_maxrss) over the memory before the pass: activations and the kernels'
    buffers. One pass is run before it, for the code and the tables that the first one loads. The peak is reset if the
    system allows it (Linux); elsewhere building the model, or the first pass, can hide a part of it.

    Args:
        build: Function that builds the model, as package.module:function.
        arguments: Arguments of the function, as JSON values.
        shape: Shape of an image, [C, H, W].
        batches: Images per pass.
        device: Device of the passes, such as "cpu".
        dtype: torch's name, such as "float32".
    Returns:
        MB by batch; None if the process failed, or the system has no such measure (Windows).
    """
    batches = sorted(set(batches))
    asked = json.dumps([build, list(arguments), list(shape), batches, device, dtype, torch.get_num_threads()])
    code = "import sys; from lfrns_hub.runtimes.bench import print_peaks; print_peaks(sys.argv[1])"
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # a model's own module may be there
    done = subprocess.run(
        [sys.executable, "-c", code, asked], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    if done.returncode:
        return None
    return dict(zip(batches, json.loads(done.stdout.splitlines()[-1]), strict=True))


def print_peaks(asked: str) -> None:
    """Build a model, run it, and print its peaks of memory in MB: the process that `peak_memory` starts."""
    build, arguments, shape, batches, device, dtype, threads = json.loads(asked)
    torch.set_num_threads(threads)
    module, _, function = build.partition(":")
    model = getattr(importlib.import_module(module), function)(*arguments).to(device, getattr(torch, dtype)).eval()
    tensors = [*model.parameters(), *model.buffers()]
    weights, peaks = sum(tensor.nbytes for tensor in tensors), []
    for tensor in tensors:
        tensor.detach().clone()  # weights mapped from a file are in memory only after they have been read
    for batch in batches:
        images = torch.zeros(batch, *shape, device=device, dtype=getattr(torch, dtype))
        with torch.no_grad():
            model(images)
        wait_for(images.device)
        gc.collect()
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_peak()
        before = peak_resident()
        with torch.no_grad():
            model(images)
        wait_for(images.device)
        rise = peak_resident() - before
        peaks.append((torch.cuda.max_memory_allocated() if images.is_cuda else weights + rise) / 1e6)
    print(json.dumps(peaks))


def peak_resident() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ru_maxrss starts at the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1))
    import resource  # imported here: not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _forget_peak() -> None:
    """Reset the peak of resident memory to the present use; only on Linux."""
    try:
        # glibc keeps freed memory, which the pass would reuse without a rise.
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def format_timings(timings: Sequence[Timing], title: str) -> Table:
    """Format timings as a table."""
    table = Table(title=escape(title))
    for heading in ("runtime", "batch", "dense, ms", "slim, ms", "slim / dense", "images/s, dense", "slim"):
        table.add_column(heading, justify="left" if heading == "runtime" else "right")
    for one in timings:
        figures = (("dense_ms", ".2f"), ("slim_ms", ".2f"), ("ratio", ".3f"))
        cells = [_spread(getattr(one, key), form) for key, form in figures]
        rates = (f"{rate:.1f}" for rate in (one.dense_images_s, one.slim_images_s))
        table.add_row(one.runtime, str(one.batch), *cells, *rates)
    return table


def _spread(values: list[float], form: str) -> str:
    """Format a median with its quartiles."""
    median, first, third = (format(value, form) for value in values)
    return f"{median} ({first} to {third})"
