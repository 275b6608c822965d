"""The logs of a command's training, in a folder of its output folder that saving keeps and a push leaves out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lfrns_hub.cli.data import LOGS
from lfrns_hub.cli.resume import LeftOver
from lfrns_hub.model_io.meaning import Features, said_meaning


class Logs:
    """The logs of each training of a command: a resumed one goes on with its log, any other gets a new one.

    Args:
        log_with: The tracker; None logs nothing.
        directory: The output folder.
        run: The run, which has not begun; it notes the names of the logs.
        stages: The trainings.
        resume: Whether an interrupted run goes on.
    """

    def __init__(self, log_with: str | None, directory: Path, run: LeftOver, stages: list[str], *, resume: bool):
        self._project, self._resume, self._names = directory.resolve().name, resume, {}
        if log_with:
            from lfrns_hub.retrain.trackers import free_name  # imported here: accelerate is slow

            self._names = {name: run.note(f"log of {name}", free_name(directory / LOGS, name)) for name in stages}

    @contextlib.contextmanager
    def of(self, stage: str, model: nn.Module, test: DataLoader, accelerator: Any) -> Iterator[dict[str, Any]]:
        """Yield the options of `retrain` by which a training is logged, with the accuracy after each epoch.

        Args:
            stage: The training.
            model: What trains; there is no accuracy of features.
            test: The test images; there is no accuracy without labels.
            accelerator: Of the run.
        """
        if stage not in self._names:
            yield {}
            return
        from lfrns_hub.retrain.trackers import logged  # imported here: accelerate is slow

        with logged(accelerator, self._project, self._names[stage], resume=self._resume) as tracker:
            yield {"tracker": tracker, "eval_loader": scored(model, test)}


def scored(model: nn.Module, test: DataLoader) -> DataLoader | None:
    """Return the test images if they show a model's accuracy: they have labels, and it does not answer features."""
    return None if test.dataset.labels is None or isinstance(said_meaning(model), Features) else test
