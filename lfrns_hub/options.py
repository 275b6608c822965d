"""Options of `slim`, `analyse` and `Analysis.cut`, checked: the budgets, the groups, the images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Self

from torch import Tensor, nn

from lfrns_hub.format.door import call
from lfrns_hub.format.untrusted import short
from lfrns_hub.latency import LatencySetup
from lfrns_hub.method.responses import HELD_OUT_EVERY
from lfrns_hub.model_io.batches import check_finite, iterate, shuffle_images
from lfrns_hub.model_io.model import dtype_of
from lfrns_hub.runs.processes import Processes
from lfrns_hub.units import UnitGroup

KINDS = ("channel", "head", "neuron")


# Options that a preset fixes, which override the caller's: the abstract taken literally.
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    "paper": {"distance": "correlation", "widths": "distance", "fold": False},
}


class _Options:
    """Options of a public call; each subclass checks its own fields."""

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> Self:
        """Build the options from the arguments of a call, by name."""
        return cls(**{field.name: named[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class FindOptions(_Options):
    """Which units may be cut, and how redundancy is found.

    Attributes:
        preset, kinds, groups, exclude, distance, widths, min_keep, approximate: As for `slim`.
    Raises:
        ValueError: An option does not fit.
    """

    preset: str = "ours"
    kinds: Sequence[str] = KINDS
    groups: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    distance: Any = "functional"
    widths: str = "global"
    min_keep: int = 1
    approximate: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(
                f"{call()}(preset={self.preset!r}): presets are 'ours' and 'paper'. Leave it out for 'ours'."
            )
        for name in PRESETS[self.preset].keys() & {"distance", "widths"}:
            object.__setattr__(self, name, PRESETS[self.preset][name])
        for option in ("kinds", "groups", "exclude"):
            check_names(getattr(self, option), option)
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(
                f"{call()}(kinds={tuple(self.kinds)}): unknown {sorted(unknown)}; kinds are {', '.join(KINDS)}. Leave "
                "it out for all."
            )
        if self.widths not in ("global", "uniform", "distance"):
            raise ValueError(
                f"{call()}(widths={self.widths!r}): widths are 'global' or 'uniform'. Leave it out for 'global'."
            )
        if not _is_whole(self.min_keep, 1):
            raise ValueError(
                f"{call()}(min_keep={short(self.min_keep)}): every group keeps at least one unit, a whole number. The "
                "default is 1."
            )


@dataclass(frozen=True)
class CutOptions(_Options):
    """The budgets of one cut, and how it is made.

    Attributes:
        macs, params, latency, latency_setup, contribution, fcr_steps, restore, fold, round_to: As for `slim`.
    Raises:
        ValueError: An option does not fit, or there is no budget.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_setup: LatencySetup | None = None
    contribution: Any = "fcr"
    fcr_steps: int = 200
    restore: bool = True
    fold: bool = True
    round_to: int | str = "auto"

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError(
                f"{call()}() needs a budget: macs=, params= or latency=, the fraction of the dense model's to keep, as "
                "macs=0.5."
            )
        for name, value in self.budgets.items():
            is_number = _is_number(value)
            if not is_number or not 0 < value <= 1:
                what = {"macs": "MACs", "params": "parameters", "latency": "the time of a forward pass"}[name]
                example = value if is_number and 1 < value <= 100 else 50
                raise ValueError(
                    f"{call()}({name}={short(value)}): the fraction of {what} to keep must be in (0, 1]. For "
                    f"{example:g} % pass {example / 100:g}."
                )
        if not callable(self.contribution) and self.contribution not in ("fcr", "cost"):
            raise ValueError(f"{call()}(contribution={self.contribution!r}): pass 'fcr', 'cost' or a function.")
        setup = self.latency_setup
        if setup is not None and (self.latency is None or not isinstance(setup, LatencySetup)):
            raise ValueError(
                f"{call()}(latency={short(self.latency)}, latency_setup={short(setup)}): a LatencySetup says how the "
                "budget latency= is timed. Pass both, as latency=0.5, latency_setup=LatencySetup(batch=8)."
            )
        if not _is_whole(self.fcr_steps, 0):
            raise ValueError(
                f"{call()}(fcr_steps={short(self.fcr_steps)}): a whole number from 0 is needed. 0: no gate."
            )
        if self.round_to != "auto" and not _is_whole(self.round_to, 1):
            raise ValueError(
                f"{call()}(round_to={short(self.round_to)}): 'auto' or a whole number from 1 is needed. 1 rounds "
                "nothing."
            )

    @property
    def budgets(self) -> dict[str, float]:
        """The given budgets, fractions of the dense model's cost by name."""
        given = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def steps(self) -> int:
        """Number of steps that the gates train."""
        return self.fcr_steps if self.restore else 0

    def under(self, preset: str) -> Self:
        """Return a copy with the options that a preset fixes."""
        return replace(self, fold=PRESETS[preset].get("fold", self.fold))


@dataclass(frozen=True)
class RunOptions(_Options):
    """Where and how a call runs.

    Attributes:
        accelerator, seed, device, progress, checkpoint_dir: As for `slim`.
    """

    accelerator: Any = None
    seed: int = 0
    device: Any = None
    progress: bool = True
    checkpoint_dir: str | os.PathLike | None = None

    @property
    def processes(self) -> Processes:
        """The processes that share the call's work."""
        return Processes(self.accelerator)

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows a bar."""
        return self.progress and self.processes.is_main


def check_names(names: Any, option: str) -> None:
    """Refuse a single name where a list is needed: its letters would be read as names."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        example = names if isinstance(names, str) else "layer1.*"
        raise ValueError(
            f"{call()}({option}={short(names)}): a list of names or globs is needed. Pass "
            f"{option}=[{short(example)!r}]."
        )


def _is_number(value: Any) -> bool:
    """Return whether a value is a number; True is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    """Return whether a value is an integer of at least `least`; True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def check_example(example_input: Any, name: str) -> Tensor:
    """Return the example; refuse one that is not a batch of images."""
    if not isinstance(example_input, Tensor) or example_input.ndim < 2:
        given = list(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(
            f"{name}(example_input={given}): images [N, C, H, W] are needed, such as torch.zeros(1, 3, 224, 224)."
        )
    return example_input


def read_loader(loader: Any, dense: nn.Module, seed: int) -> list[tuple[Tensor, Any]]:
    """Read all calibration batches as (images, labels), floating-point images in the dtype of the dense model.

    The images are shuffled (see `shuffle_images`), so that held-out images are of every class even where the loader
    yields its images sorted by class.

    Raises:
        ValueError: There are no batches, a value is not finite, or a label is not a class of the model.
    """
    dtype = dtype_of(dense)
    batches = [
        (images.to(dtype) if images.is_floating_point() else images, labels) for images, labels in iterate(loader)
    ]
    if not batches or not len(batches[0][0]):
        raise ValueError(f"{call()}(loader): the loader is empty. Give at least a few hundred calibration images.")
    for images, labels in batches:
        check_finite(images, f"{call()}(loader)")
        if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) != len(images):
            raise ValueError(
                f"{call()}(loader): a batch has {len(images)} images and {len(labels)} labels. Give one label an image."
            )
    return shuffle_images(batches, held_out_every=HELD_OUT_EVERY, seed=seed)


def choose_groups(every: Sequence[UnitGroup], options: FindOptions) -> list[UnitGroup]:
    """Return the groups that may be cut.

    Raises:
        ValueError: A pattern matches nothing, or no group is left.
    """
    names, exclude = options.groups, options.exclude
    for pattern in [*(names or ()), *exclude]:
        if not any(fnmatchcase(group.name, pattern) for group in every):
            raise ValueError(
                f"{call()}(groups, exclude): the pattern {pattern!r} matches no group. The model has "
                f"{', '.join(g.name for g in every[:8])} ..."
            )
    chosen = [
        group
        for group in every
        if group.frozen_reason is None
        and (group.exact or options.approximate)
        and group.kind in options.kinds
        and group.size > options.min_keep
        and (names is None or any(fnmatchcase(group.name, pattern) for pattern in names))
        and not any(fnmatchcase(group.name, pattern) for pattern in exclude)
    ]
    if not chosen:
        reasons = (
            "; ".join(f"{g.name}: {g.frozen_reason or 'not chosen'}" for g in every[:3]) or "it has no layer with units"
        )
        raise ValueError(f"the model has no prunable unit ({reasons}). See find_units(model, images) for every group.")
    return chosen
