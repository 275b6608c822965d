"""BatchNorm statistics recomputed, and the choice of the slim model nearest to the dense one on held-out images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import model_copy
from lfrns_hub.method.responses import fitting, held_out
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.model_io.model import as_input, device_of, same_draw


class Judge:
    """The held-out images and the dense model's answers to them; each model is run once."""

    def __init__(self, dense: nn.Module, batches: Sequence[Tensor]):
        """Run the dense model.

        Args:
            dense: The dense model in eval mode.
            batches: Calibration images [N, C, H, W]; the held-out ones are used.
        """
        self._held = [batch.to(device_of(dense)) for batch in held_out(batches)]
        with torch.no_grad(), same_draw():
            self._targets = [read_answer(dense, dense(batch)) for batch in self._held]
        self._known: list[tuple[nn.Module, float]] = []

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> float:
        """Return the divergence of a model's answers from the dense one's, summed over images; inf where it is nan."""
        for known, value in self._known:
            if known is model:
                return value
        pairs = zip(self._held, self._targets, strict=True)
        with same_draw():
            total = sum(float(read_answer(model, model(batch)).divergence(target)) for batch, target in pairs)
        self._known.append((model, total if total == total else float("inf")))
        return self._known[-1][1]

    def nearest(self, candidates: Sequence[nn.Module]) -> nn.Module:
        """Return the model with the smallest divergence, the first of equals."""
        return min(candidates, key=self.divergence)


STATISTICS_BATCH = 32  # fewest images for BatchNorm statistics: those of few images are noise, of one undefined


def joined(batches: Sequence[Tensor], least: int) -> list[Tensor]:
    """Join consecutive batches of one image size until each has at least `least` images; a short rest is joined too.

    Example:
        >>> [len(batch) for batch in joined([torch.zeros(n, 3, 4, 4) for n in (2, 2, 2, 40, 1)], 4)]
        [6, 41]
    """
    together: list[list[Tensor]] = []
    for images in batches:
        last = together[-1] if together and together[-1][0].shape[1:] == images.shape[1:] else None
        if last and (sum(map(len, last)) < least or len(images) < least):
            last.append(images)
        else:
            together.append([images])
    return [torch.cat(some) if len(some) > 1 else some[0] for some in together]


def recalibrate(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Return a copy with BatchNorm statistics computed on the images.

    Args:
        model: A network with BatchNorm.
        batches: Images, each [N, C, H, W]; their statistics are averaged. A single image of its size has none and is
            left out.
    """
    together = [images for images in joined(batches, STATISTICS_BATCH) if len(images) > 1]
    result = model_copy(model).eval()
    norms, befores = (
        [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
        for network in (result, model)
    )
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for images in together:
            read_logits(result(as_input(images, result)))
    for norm, before in zip(norms, befores, strict=True):
        norm.momentum = before.momentum
        norm.num_batches_tracked.copy_(before.num_batches_tracked)
    return result.train(model.training)


def recalibrated(model: nn.Module, batches: list[Tensor]) -> list[nn.Module]:
    """Return the copy from `recalibrate` on the images not held out; none without BatchNorm or such images."""
    fit = fitting(batches)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return (
        [recalibrate(model, fit).eval()]
        if normed and max(map(len, joined(fit, STATISTICS_BATCH)), default=0) > 1
        else []
    )
