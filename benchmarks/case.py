"""What a contestant gets, and the table of contestants: add one with `@contestant`, in a dozen lines."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lfrns_hub.measure import count_macs


class NotSupported(Exception):
    """A peer's public API does not take this model; the table says why."""


class NotInstalled(NotSupported):
    """A peer's package is not here; another machine may have it, so no table keeps this."""


class Absent:
    """Stands for a package that is not installed, and says so when it is used."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, name: str) -> Any:
        raise NotInstalled(f"{self._package} is not installed")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotInstalled(f"{self._package} is not installed")


@dataclass(frozen=True)
class Case:
    """One task, the same for every contestant.

    Attributes:
        dense: The dense network in eval mode, float32; a contestant works on a copy.
        images, labels: Calibration images [N, C, H, W], float32, normalised, on the device; labels [N], int64.
        macs: Fraction of the dense MACs to keep.
        seed: Of whatever a contestant draws.
        params: Fraction of the dense parameters to keep as well, or None; of our own contestants alone.
        batch_size: Images a batch.
        fcr_steps: Of the method's gates; fewer only to try that a run goes through.
    """

    dense: nn.Module
    images: Tensor
    labels: Tensor
    macs: float
    seed: int
    params: float | None = None
    batch_size: int = 250
    fcr_steps: int = 200

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the calibration images in batches, with their labels."""
        return list(zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))

    def example(self) -> Tensor:
        """Return one image, [1, C, H, W]."""
        return self.images[:1]

    def part(self, images: int) -> "Case":
        """Return the same case with fewer calibration images, in smaller batches."""
        few = self.images[:images], self.labels[:images]
        return replace(self, images=few[0], labels=few[1], batch_size=max(1, images // 10))

    def copy(self) -> nn.Module:
        """Copy the dense network."""
        return copy.deepcopy(self.dense)

    def kept_macs(self, model: nn.Module) -> float:
        """Return a model's MACs as a fraction of the dense one's: one counter for all contestants."""
        return count_macs(model, self.example()) / count_macs(self.dense, self.example())


@dataclass(frozen=True)
class Contestant:
    """A way to make a model narrower.

    Attributes:
        name: As the table has it.
        family: "ours", "ablation", "control" or "peer".
        function: `f(case, **variant)` giving a narrower model, its MACs at most `case.macs` and as near as it can.
        variants: Settings of which the best on the tuning images counts.
        distil: Whether it is retrained towards the dense network too, or by the labels alone.
        features: Whether towards the dense network's last feature map as well, which takes a plan of what was kept.
    """

    name: str
    family: str
    function: Callable[..., nn.Module]
    variants: Sequence[dict[str, Any]] = ({},)
    distil: bool = True
    features: bool = False


contestants: dict[str, Contestant] = {}


def contestant(
    name: str,
    family: str,
    variants: Sequence[dict[str, Any]] = ({},),
    *,
    distil: bool = True,
    features: bool = False,
    separate: bool = False,
) -> Callable:
    """Add a function to the table of contestants; `separate` gives each variant a row of its own."""

    def add(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if separate:
            for variant in variants:
                row = f"{name} ({', '.join(f'{value} {key}' for key, value in variant.items())})"
                contestants[row] = Contestant(row, family, function, [variant], distil, features)
        else:
            contestants[name] = Contestant(name, family, function, variants, distil, features)
        return function

    return add
