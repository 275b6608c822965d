"""Building a model from an untrusted config within a memory budget: anything larger is refused before it runs.

On the meta device nothing is allocated, but everything is counted: a dry run there shows what a constructor needs. The
same count holds when it then computes values.
"""

import ctypes
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lfrns_hub.format.untrusted import AGAIN

SPARE_BYTES = 512 << 20  # allowed for any file in addition to its own size: the tables of the largest Swin take 0.1 GB
DENSE_TIMES = 4  # the size of a slim file, for the dense model that it was cut from
# Parts of a network without parameters (activations, dropouts, containers) per part with parameters.
MODULES_PER_TENSOR = 16
SECONDS = 15  # of one thread; a network of ten thousand layers takes one
# torch's random initialisers, whose values are in the file; and others, with the operations that timm's consist of.
DRAWS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_}
FILLS = {nn.init.constant_} | {
    getattr(torch.Tensor, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class OverBudget(ValueError):
    """A config needs more memory or time than its file justifies."""


class MemoryBudget(TorchDispatchMode):
    """Counts the bytes of live tensors, by their storages, and refuses an operation that would exceed the budget.

    An operation with values is run on the meta device first, which allocates nothing.

    Args:
        most: Budget in bytes.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.live = most, 0
        self._held: dict[int, int] = {}  # bytes by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # in place: nothing is allocated
            return args[0] if args and is_placeholder(args[0]) else func(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values())))
        device = kwargs.get("device")
        on_meta = device.type == "meta" if device is not None else given and all(tensor.is_meta for tensor in given)
        if not on_meta:
            self._refuse(_foreseen(func, args, kwargs))
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            if not any(tensor is other for other in given):
                self._hold(tensor)
        if on_meta:
            self._refuse(0)
        return result

    def let_go(self, tensor: Tensor) -> None:
        """Stop counting a tensor: a parameter, which the file has to fill."""
        self._drop(tensor.untyped_storage()._cdata)

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage as long as it is alive."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)

    def _refuse(self, more: int) -> None:
        """Refuse an allocation beyond the budget."""
        if self.live + more > self.most:
            raise OverBudget(
                f"the config asks for {(self.live + more) / 1e9:,.2f} GB that the weights do not hold, at most "
                f"{self.most / 1e9:,.2f} GB are taken. {AGAIN}"
            )


def bytes_for(size: int, *, dense: bool = False) -> int:
    """Return the bytes that building a model may take, in addition to its weights.

    Args:
        size: Bytes of the files of its weights.
        dense: Whether it is the dense model that the weights were cut from, with its parameters.
    """
    return SPARE_BYTES + (DENSE_TIMES if dense else 1) * size


def is_placeholder(value: Any) -> bool:
    """Return whether a value is a tensor expanded from a single number, which is never written to."""
    return isinstance(value, Tensor) and value.numel() > 1 and value.layout == torch.strided and not any(value.stride())


class NoDraws(TorchFunctionMode):
    """Skips the initialisation of tensors that have no values: for a ViT it took most of the loading time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS or func in FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if func in DRAWS or tensor.is_meta or is_placeholder(tensor):
                return tensor
        return func(*args, **kwargs)


@contextmanager
def bounded(
    tensors: int, most: int = SPARE_BYTES, *, dense: bool = False, placeholders: bool = False
) -> Iterator[None]:
    """Stop a constructor that creates more than a file can fill: parts, or bytes that are not in the file.

    Args:
        tensors: Number of tensors in the weights. Twice as many parameters are allowed: a constructor may rebuild a
            head.
        most: Bytes for buffers and all other live tensors: see `bytes_for`.
        dense: Whether parameters count as well: those of a dense model, most of which are not in a file.
        placeholders: Whether parameters are replaced by placeholders without memory, to be filled later.
    Raises:
        OverBudget: More parameters, more than 16 modules for each, or more bytes were needed; or python computed for
            15 seconds, for example over all pairs of a million places.
    """
    limits = {"parameters": 2 * tensors + 64, "modules": MODULES_PER_TENSOR * tensors + 4096}
    made, budget = dict.fromkeys(limits, 0), MemoryBudget(most)
    numbers = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in FLOATS} if placeholders else {}

    def count(kind: str) -> None:
        made[kind] += 1
        if made[kind] > limits[kind]:
            raise OverBudget(
                f"the config asks for more than {limits[kind]:,} {kind}, the weights hold {tensors:,} tensors. {AGAIN}"
            )

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        count("parameters")
        if parameter.dtype in numbers and parameter.numel() > 1 and not is_placeholder(parameter):
            return nn.Parameter(numbers[parameter.dtype].expand(parameter.shape), parameter.requires_grad)
        if not (dense or placeholders):
            budget.let_go(parameter)
        return None

    def on_module(module: nn.Module, name: str, part: Any) -> None:
        count("modules")

    hooks = [
        register_module_parameter_registration_hook(on_parameter),
        register_module_module_registration_hook(on_module),
    ]
    try:
        with _in_time(), budget:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class TooLong(OverBudget):
    """Raised in a thread that computes for too long."""

    def __init__(self) -> None:
        super().__init__(f"the config asks for more than {SECONDS} seconds of computing. {AGAIN}")


@contextmanager
def _in_time() -> Iterator[None]:
    """Stop python code that computes for more than 15 seconds; waiting, also in a debugger, does not count."""
    thread, over = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else time.CLOCK_MONOTONIC
    start = time.clock_gettime(clock)

    def stop(error: Any) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    def watch() -> None:
        while not over.wait(1):
            if time.clock_gettime(clock) - start > SECONDS:
                return stop(ctypes.py_object(TooLong))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        stop(None)  # cancels one that has not arrived yet


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or the results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (part for part in value if isinstance(part, Tensor))


def _foreseen(func: Any, args: Any, kwargs: Any) -> int:
    """Return the bytes that an operation would allocate; 0 where that depends on values."""

    def on_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return [on_meta(part) for part in value] if isinstance(value, (list, tuple)) else value

    moved = {key: on_meta(value) for key, value in kwargs.items()}
    if any(argument.name == "device" for argument in func._schema.arguments):
        moved["device"] = torch.device("meta")
    try:
        made = func(*map(on_meta, args), **moved)
    except Exception:  # it reads values, or does not support meta tensors: its result has the size of its inputs
        return 0
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors((made,)))
