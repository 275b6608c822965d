"""What the caller of `slim`, `analyse` or `Analysis.cut` asks for, checked: the budgets, the groups, the images.

`call` is the one of them that the user made: errors name it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.latency import LatencySetup
from lfrns_hub.method.responses import HELD_OUT_EVERY
from lfrns_hub.model_io.batches import check_finite, iterate, shuffle_images
from lfrns_hub.model_io.model import dtype_of
from lfrns_hub.units import UnitGroup

KINDS = ("channel", "head", "neuron")


def check_budgets(macs: Any, params: Any, latency: Any, contribution: Any = "fcr", *, call: str) -> dict[str, float]:
    """Give the budgets of one cut, or one clear error."""
    given = {"macs": macs, "params": params, "latency": latency}
    budgets = {name: value for name, value in given.items() if value is not None}
    if not budgets:
        raise ValueError(
            f"{call}() needs a budget: macs=, params= or latency=, the fraction of the dense model's to keep, as "
            "macs=0.5."
        )
    for name, value in budgets.items():
        is_number = _is_number(value)
        if not is_number or not 0 < value <= 1:
            what = {"macs": "MACs", "params": "parameters", "latency": "the time of a forward pass"}[name]
            example = value if is_number and 1 < value <= 100 else 50
            raise ValueError(
                f"{call}({name}={short(value)}): the fraction of {what} to keep must be in (0, 1]. For {example:g} % "
                f"pass {example / 100:g}."
            )
    if not callable(contribution) and contribution not in ("fcr", "cost"):
        raise ValueError(f"{call}(contribution={contribution!r}): pass 'fcr', 'cost' or a function.")
    return budgets


def check_cut(fcr_steps: Any, round_to: Any, latency: Any = None, latency_setup: Any = None, *, call: str) -> None:
    """Refuse an option of one cut that does not fit."""
    if latency_setup is not None and (latency is None or not isinstance(latency_setup, LatencySetup)):
        raise ValueError(
            f"{call}(latency={short(latency)}, latency_setup={short(latency_setup)}): a LatencySetup says how the "
            "budget latency= is timed. Pass both, as latency=0.5, latency_setup=LatencySetup(batch=8)."
        )
    if not _is_whole(fcr_steps, 0):
        raise ValueError(f"{call}(fcr_steps={short(fcr_steps)}): a whole number from 0 is needed. 0: no gate.")
    if round_to != "auto" and not _is_whole(round_to, 1):
        raise ValueError(
            f"{call}(round_to={short(round_to)}): 'auto' or a whole number from 1 is needed. 1 rounds nothing."
        )


def check_options(preset: str, kinds: Any, widths: str, min_keep: int, *, call: str) -> None:
    """Refuse an option of the analysis that does not fit."""
    if preset not in ("ours", "paper"):
        raise ValueError(f"{call}(preset={preset!r}): presets are 'ours' and 'paper'. Leave it out for 'ours'.")
    check_names(kinds, "kinds", call=call)
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(
            f"{call}(kinds={tuple(kinds)}): unknown {sorted(unknown)}; kinds are {', '.join(KINDS)}. Leave it "
            "out for all."
        )
    if widths not in ("global", "uniform", "distance"):
        raise ValueError(f"{call}(widths={widths!r}): widths are 'global' or 'uniform'. Leave it out for 'global'.")
    if not _is_whole(min_keep, 1):
        raise ValueError(
            f"{call}(min_keep={short(min_keep)}): every group keeps at least one unit, a whole number. The default "
            "is 1."
        )


def check_names(names: Any, option: str, *, call: str) -> None:
    """Refuse one name where several are asked for: its letters would be taken for names."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        example = names if isinstance(names, str) else "layer1.*"
        raise ValueError(
            f"{call}({option}={short(names)}): a list of names or globs is needed. Pass {option}=[{short(example)!r}]."
        )


def _is_number(value: Any) -> bool:
    """Say whether a value is a number; True is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    """Say whether a value is a whole number from the least; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def check_example(example_input: Any, call: str) -> Tensor:
    """Refuse an example that is no batch of images."""
    if not isinstance(example_input, Tensor) or example_input.ndim < 2:
        given = list(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(
            f"{call}(example_input={given}): images [N, C, H, W] are needed, such as torch.zeros(1, 3, 224, 224)."
        )
    return example_input


def read_loader(loader: Any, dense: nn.Module, seed: int, *, call: str) -> list[tuple[Tensor, Any]]:
    """Read all calibration batches as (images, labels), floating-point images in the dtype of the dense model.

    The images are shuffled (see `shuffle_images`), so that it is images that are held out, of every class, and not the
    batches of a loader that may come sorted.

    Raises:
        ValueError: There is none, one has values that are not finite, or a label is no class of the model.
    """
    dtype = dtype_of(dense)
    batches = [
        (images.to(dtype) if images.is_floating_point() else images, labels) for images, labels in iterate(loader)
    ]
    if not batches or not len(batches[0][0]):
        raise ValueError(f"{call}(loader): the loader is empty. Give at least a few hundred calibration images.")
    for images, labels in batches:
        check_finite(images, f"{call}(loader)")
        if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) != len(images):
            raise ValueError(
                f"{call}(loader): a batch has {len(images)} images and {len(labels)} labels. Give one label an image."
            )
    return shuffle_images(batches, held_out_every=HELD_OUT_EVERY, seed=seed)


def choose_groups(
    every: Sequence[UnitGroup],
    kinds: Sequence[str],
    names: Sequence[str] | None,
    exclude: Sequence[str],
    approximate: bool,
    min_keep: int,
    *,
    call: str,
) -> list[UnitGroup]:
    """Give the groups that may be cut.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left.
    """
    check_names(names, "groups", call=call)
    check_names(exclude, "exclude", call=call)
    for pattern in [*(names or ()), *exclude]:
        if not any(fnmatchcase(group.name, pattern) for group in every):
            raise ValueError(
                f"{call}(groups, exclude): the pattern {pattern!r} matches no group. The model has "
                f"{', '.join(g.name for g in every[:8])} ..."
            )
    chosen = [
        group
        for group in every
        if group.frozen_reason is None
        and (group.exact or approximate)
        and group.kind in kinds
        and group.size > min_keep
        and (names is None or any(fnmatchcase(group.name, pattern) for pattern in names))
        and not any(fnmatchcase(group.name, pattern) for pattern in exclude)
    ]
    if not chosen:
        reasons = (
            "; ".join(f"{g.name}: {g.frozen_reason or 'not chosen'}" for g in every[:3]) or "it has no layer with units"
        )
        raise ValueError(f"the model has no prunable unit ({reasons}). See find_units(model, images) for every group.")
    return chosen
