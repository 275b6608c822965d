"""The processes of a run: the share of each, and their communication."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Result = TypeVar("Result")


class Processes:
    """The processes of an Accelerate accelerator; without one, a single process without communication.

    For any communication, every process has to call the same method at the same time.

    Attributes:
        rank, count: The number of this process, from 0, and the number of processes.
        device: The accelerator's device; None without one.
    """

    def __init__(self, accelerator: Any = None):
        self._accelerator = accelerator
        self.rank, self.count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.device: torch.device | None = accelerator.device if accelerator else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, prints and measures times."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The items of a sequence for this process; the shares of all processes are the whole sequence."""
        return slice(self.rank, None, self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the device that the tensor is on."""
        if self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any process."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run something on the main process while the others wait; return its result on all of them."""
        if self.count == 1:
            return work()
        self._accelerator.wait_for_everyone()
        results = [work() if self.is_main else None]
        torch.distributed.broadcast_object_list(results, src=0)
        return results[0]

    def attempt(
        self, work: Callable[[], Any], *errors: type[Exception], main_only: bool = False
    ) -> tuple[bool, Exception | None]:
        """Run something on every process, or only on the main one, so that none waits forever for a failed one.

        Args:
            work: The function to run.
            errors: Errors that are caught; any other is raised at once.
            main_only: Whether only the main process runs it.
        Returns:
            Whether it failed on any process, and the error of this one.
        """
        error = None
        try:
            if self.is_main or not main_only:
                work()
        except errors as failed:
            error = failed
        return self.any(error is not None), error

    def prepare_loader(self, loader: Any) -> Any:
        """Return a loader of this process's images; a prepared loader is returned unchanged."""
        if self._accelerator is None or type(loader).__module__.partition(".")[0] == "accelerate":
            return loader  # prepared twice, a loader would give each process its share of a share
        if isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
            return self._accelerator.prepare_data_loader(loader)
        if self.count == 1:
            return loader
        raise TypeError(
            f"loader={type(loader).__name__} on {self.count} processes: only a torch DataLoader can be shared out. "
            "Wrap the images in one."
        )

    def gather_batch(self, batch: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """Return the rows of all processes, without those that only fill the last batch."""
        return batch if self._accelerator is None else self._accelerator.gather_for_metrics(batch)


ALONE = Processes()
