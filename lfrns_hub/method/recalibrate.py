"""Which of several slim models is nearest to the dense one, by the images that nothing was fitted to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfrns_hub.method.responses import held_out
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.model_io.model import device_of, same_draw


class Judge:
    """The held-out images and the dense model's answers to them; each model is asked once."""

    def __init__(self, dense: nn.Module, batches: Sequence[Tensor]):
        """Ask the dense model.

        Args:
            dense: In eval mode.
            batches: Calibration images [N, C, H, W], of which those held out are taken.
        """
        self._held = [batch.to(device_of(dense)) for batch in held_out(batches)]
        with torch.no_grad(), same_draw():
            self._targets = [read_answer(dense, dense(batch)) for batch in self._held]
        self._known: list[tuple[nn.Module, float]] = []

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> float:
        """Give the divergence of a model's answers from the dense one's, summed over images; inf where it is nan."""
        for known, value in self._known:
            if known is model:
                return value
        pairs = zip(self._held, self._targets, strict=True)
        with same_draw():
            total = sum(float(read_answer(model, model(batch)).divergence(target)) for batch, target in pairs)
        self._known.append((model, total if total == total else float("inf")))
        return self._known[-1][1]

    def nearest(self, candidates: Sequence[nn.Module]) -> nn.Module:
        """Give the model that diverges least, the first of equals."""
        return min(candidates, key=self.divergence)
