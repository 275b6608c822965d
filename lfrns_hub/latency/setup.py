"""Setup of timed forward passes: the caller's options, the device and the number of threads."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.measure import cpu_name
from lfrns_hub.model_io.model import dtype_of


@dataclass(frozen=True)
class LatencySetup:
    """Setup of the measurements for a latency budget.

    Attributes:
        batch: Images in one forward pass.
        dtype: Floating-point dtype of weights and images; None: the model's.
        device: Device of the passes; None: the device of `slim`.
        threads: CPU threads; None: torch's setting.
        compile: Time the models under torch.compile. Single layers are still timed eagerly.

    Example:
        >>> LatencySetup(threads=1).describe()["threads"]
        1
    """

    batch: int = 1
    dtype: torch.dtype | None = None
    device: Any = None
    threads: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, value, what in (
            ("batch", self.batch, "images in one forward pass"),
            ("threads", self.threads, "threads"),
        ):
            whole = isinstance(value, Integral) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "threads" and value is None):
                raise ValueError(
                    f"LatencySetup({name}={short(value)}): a whole number of {what}, from 1, is needed. Leave it out "
                    f"for {'one' if name == 'batch' else 'all'}."
                )
        if self.dtype is not None and not getattr(self.dtype, "is_floating_point", False):
            raise ValueError(
                f"LatencySetup(dtype={short(self.dtype)}): a floating-point torch.dtype is needed, such as "
                "torch.bfloat16. Leave it out for the model's."
            )
        if not isinstance(self.compile, bool):
            raise ValueError(
                f"LatencySetup(compile={short(self.compile)}): True or False is needed. The default: False."
            )
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"LatencySetup(device={short(self.device)}): torch knows no such device. Pass 'cpu' or 'cuda'."
                ) from error
            if kind == "meta":
                raise ValueError("LatencySetup(device=meta): nothing runs there. Pass 'cpu' or 'cuda'.")

    def resolved(self, model: nn.Module, device: torch.device) -> "LatencySetup":
        """Replace None by the values of a model and of a run's device."""
        return replace(
            self,
            dtype=self.dtype or dtype_of(model),
            device=torch.device(self.device or device),
            threads=self.threads or torch.get_num_threads(),
        )

    def describe(self) -> dict[str, Any]:
        """Return a setup as plain data for JSON."""
        return {
            "batch": self.batch,
            "dtype": self.dtype and str(self.dtype).removeprefix("torch."),
            "device": None if self.device is None else name_device(torch.device(self.device)),
            "threads": self.threads,
            "compile": self.compile,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run with the setup's threads and without gradients."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(before)


def name_device(device: torch.device) -> str:
    """Return the name of the processor of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type
