"""Losses of a run's steps, read from a GPU some steps late, so that no step waits for the previous one."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LATE = 16  # steps at most; values that are not finite are always found before anything is saved


@dataclass
class StepLoss:
    """The loss of one step.

    Attributes:
        step: Its number, from 1.
        rate: The learning rate of the step.
        value: The loss.
    """

    step: int
    rate: float
    value: float


class Losses:
    """Losses in transfer from the device; without a GPU they are available at once.

    Attributes:
        late: Whether they arrive after the step.
    """

    def __init__(self, device: torch.device):
        self.late = device.type == "cuda"
        self._coming: deque[tuple[int, float, Tensor, Any]] = deque()

    def note(self, loss: Tensor, step: int, rate: float) -> None:
        """Start the transfer of a step's loss, a scalar."""
        event = None
        if self.late:
            loss = loss.detach().to("cpu", non_blocking=True)  # into pinned memory
            event = torch.cuda.Event()
            event.record()
        self._coming.append((step, rate, loss.detach(), event))

    def read(self, *, wait: bool = False) -> list[StepLoss]:
        """Return the losses that have arrived, in order; with `wait`, all that were recorded."""
        found = []
        while self._coming:
            step, rate, loss, event = self._coming[0]
            if event is not None and not event.query():
                if not wait and len(self._coming) <= LATE:
                    break
                event.synchronize()
            self._coming.popleft()
            found.append(StepLoss(step, rate, loss.item()))
        return found
