"""A training step as one CUDA graph: recorded once, then replayed for every batch of the same shape.

A step of a small network is hundreds of kernels, most of them shorter than their launch. A graph is launched at once.
It contains the same kernels as a plain step, so the results are the same within rounding.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lfrns_hub.runs.seeded import get_random

if TYPE_CHECKING:
    from accelerate import Accelerator

PLAIN_STEPS = 3  # before the recording: momentum, workspaces and the choice of kernels are created at first use
Labels = dict[str, Tensor | None]
logger = logging.getLogger(__name__)


def refuse_capture(accelerator: "Accelerator") -> str | None:
    """Return why the steps of a run cannot be recorded, or None."""
    from accelerate.utils import DistributedType, DynamoBackend

    if accelerator.device.type != "cuda":
        return "graphs are recorded on NVIDIA and AMD GPUs"
    if accelerator.distributed_type != DistributedType.NO or accelerator.num_processes > 1:
        return "processes exchange gradients in each step"
    if accelerator.gradient_accumulation_steps > 1:
        return "a step takes several batches"
    if accelerator.mixed_precision not in ("no", "bf16"):
        return "the scale of the loss changes from step to step"
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return "the model is compiled already"
    return None


class CapturedSteps:
    """Steps of one run: the first ones plain, then recorded; batches of another shape are always plain.

    Attributes:
        reason: Why no step is recorded; None while recording is possible.
    """

    def __init__(self, learn: Callable[[Tensor, Labels], Tensor], optimizer: Any, reason: str | None):
        """Prepare for a run.

        Args:
            learn: One plain step: images [N, C, H, W] and labels, by head, on the device -> the loss, a scalar.
            optimizer: The optimizer that `learn` steps; all its groups have one learning rate.
            reason: Why steps must be plain, or None.
        """
        self.reason, self._learn, self._optimizer = reason, learn, optimizer
        self._plain_steps: dict[Any, int] = {}
        self._graph: Any = None
        self._shape: Any = None

    def step(self, images: Tensor, labels: Labels, rate: float) -> Tensor:
        """Train on one batch at a learning rate, and return its loss, which the next step may overwrite."""
        if self.reason is not None:
            return self._learn(images, labels)
        shape = _shape_of(images, labels)
        if self._graph is not None and shape == self._shape:
            return self._replay(images, labels, rate)
        self._plain_steps[shape] = self._plain_steps.get(shape, 0) + 1
        if self._graph is None and self._plain_steps[shape] > PLAIN_STEPS:
            try:
                self._record(images, labels)
            except RuntimeError as error:
                self._stay_plain(f"the forward cannot be recorded ({str(error).partition(chr(10))[0]})")
                self._optimizer.zero_grad()
                return self._learn(images, labels)
            self._shape = shape
            return self._replay(images, labels, rate)
        before = get_random()
        loss, waited = _watched(lambda: self._learn(images, labels))
        if not _same_random(before, get_random()):  # a graph would repeat the result of one draw
            self._stay_plain("the forward draws random numbers on the CPU")
        elif waited and self._plain_steps[shape] == PLAIN_STEPS:  # creations at first use may wait
            self._stay_plain("the forward waits for the GPU")
        return loss

    def _stay_plain(self, reason: str) -> None:
        """Stop recording for the rest of the run, and log why."""
        self.reason = reason
        logger.info("retrain: steps are plain, for %s", reason)
        self.close()

    def close(self) -> None:
        """Release the graph and its memory."""
        self._graph = self._shape = self._images = self._labels = self._loss = None

    def _record(self, images: Tensor, labels: Labels) -> None:
        """Record a step with a copy of the batch; nothing is computed yet."""
        self._images = images.clone()
        self._labels = {name: None if value is None else value.clone() for name, value in labels.items()}
        self._rate = torch.zeros((), device=images.device)
        with _on_device(self._optimizer, self._rate):
            self._graph, self._loss = record(lambda: self._learn(self._images, self._labels))

    def _replay(self, images: Tensor, labels: Labels, rate: float) -> Tensor:
        """Replay the recorded step with another batch."""
        self._images.copy_(images)
        for name, value in labels.items():
            if value is not None:
                self._labels[name].copy_(value)
        self._rate.fill_(rate)
        self._graph()
        return self._loss


def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a function's work on the GPU; return a call that replays it, and the tensor of its result.

    Raises:
        RuntimeError: It waits for the GPU, or does something else that a graph cannot record.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads that pin the memory of coming batches may continue meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result


def _watched(compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Compute something, and return whether it waited for the GPU, which is not allowed in a graph.

    Testing this by a failed recording is not an option: it may leave the GPU's random generator unusable.
    """
    if not torch.cuda.is_available():
        return compute(), False
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = compute()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    others = [one for one in heard if "synchronizing CUDA operation" not in str(one.message)]
    for one in others:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result, len(others) < len(heard)


def _shape_of(images: Tensor, labels: Labels) -> Any:
    """Return the properties that two batches must share for one graph."""
    tensors = {"": images, **{f"label {name}": value for name, value in labels.items() if value is not None}}
    return tuple((name, value.shape, value.dtype, value.stride()) for name, value in tensors.items())


def _same_random(first: Any, second: Any) -> bool:
    """Return whether python, numpy and torch have drawn no random numbers in between."""
    return first[0] == second[0] and first[1][2] == second[1][2] and torch.equal(first[2], second[2])


@contextlib.contextmanager
def _on_device(optimizer: Any, rate: Tensor) -> Iterator[None]:
    """Make an optimizer read its learning rate from the device, as a recorded step must."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    kept = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in optimizer.param_groups]
    for group, before in zip(optimizer.param_groups, kept, strict=True):
        group.update({"lr": rate, "capturable": True} if "capturable" in before else {"lr": rate})
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            group.update(before)
