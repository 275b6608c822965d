"""The main call: trace, self-check, and the steps of `method/`, in reading order."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lfrns_hub.analysis import Analysis
from lfrns_hub.format.door import call, public
from lfrns_hub.latency import LatencySetup
from lfrns_hub.measure import count_macs
from lfrns_hub.method.costs import measure_costs
from lfrns_hub.method.redundancy import Merges, find_merges, views
from lfrns_hub.method.report import SlimResult
from lfrns_hub.method.responses import Moments, held_out, observe
from lfrns_hub.model_io.answers import check_differentiable, understand
from lfrns_hub.model_io.model import (
    analysis_copy,
    as_input,
    device_of,
    refuse_meta,
    return_memory,
    settle_layout,
    unwrap,
)
from lfrns_hub.options import KINDS, CutOptions, FindOptions, RunOptions, choose_groups, read_loader
from lfrns_hub.runs.cache import Cache
from lfrns_hub.runs.progress import clocked
from lfrns_hub.self_check import self_check, settled_trace
from lfrns_hub.units import UnitGroup


@public
def slim(
    model: nn.Module,
    loader: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_setup: LatencySetup | None = None,
    preset: str = "ours",
    kinds: Sequence[str] = KINDS,
    groups: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    distance: Any = "functional",
    contribution: Any = "fcr",
    fcr_steps: int = 200,
    restore: bool = True,
    fold: bool = True,
    widths: str = "global",
    round_to: int | str = "auto",
    min_keep: int = 1,
    approximate: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
) -> SlimResult:
    """Make a model physically narrower by low functional redundancy network slimming.

    Args:
        model: The dense network, any that torch.export runs: a classifier, or a network that returns features (also
            lists, dicts or dataclasses of tensors). Untouched, on any device but meta, of any floating-point dtype:
            half precision is analysed in float32. Wrappers of torch.compile and DDP are removed.
        loader: Calibration batches: `(images, labels)`, dicts, or images only; it is read once, shuffled and kept in
            memory. Its order does not matter. Labels are class numbers [N], rows [N, K] for multi-label classes, or
            quantities (regression); those of several heads come by name or in order; those of feature models are not
            read. The meaning of the outputs is taken from `model.problem_type` (transformers' words), the model's
            configuration or the labels, otherwise from the shapes.
        macs, params: Fraction of the dense cost to keep, in (0, 1]; several budgets are all met at once.
        latency: Fraction of the dense model's forward time to keep, in (0, 1], measured on this machine in this call.
            Times of layers by width are measured once and cached in LFRNS_CACHE, else in the user's cache.
        latency_setup: Batch, dtype, device, threads and compilation; default: one image, run as the model is.
        preset: "ours", or "paper": the abstract taken literally (correlation clusters, FCR, restore, no fold).
        kinds: Kinds of units to cut: "channel", "head" and "neuron" are all.
        groups, exclude: Names or globs of groups to cut, and of groups not to cut.
        distance: "functional", "correlation", or a function of (tap views, units) giving distances [U, U], floating
            point, larger for units that are less alike.
        contribution: "fcr", "cost", or a function of (model, groups, keep, batches, moments) giving {group: [U]},
            larger for units that are worth more.
        fcr_steps: Number of steps that the gates train; 0 skips them and ranks by the cost of merging.
        restore: Cluster below the budget and restore by contribution; False clusters only down to the budget.
        fold: Add the cut units to the consumers' weights, as far as the kept units express them.
        widths: "global", one threshold of cost per MAC for all groups, or "uniform", the same share of each.
        round_to: Multiple that widths prefer; "auto" is 8 for groups of 128 or more channels or neurons, and with
            latency= the multiple at which this machine gets slower, where there is one.
        min_keep: Smallest number of units that every group keeps.
        approximate: Also cut groups whose removal crosses a LayerNorm; no self-check covers those.
        accelerator: An Accelerate accelerator; each process then runs its share of the images.
        seed: The same seed gives the same plan; with latency=, only if the measured times are the same.
        device: Device to run on; default: the model's.
        progress: Show a bar on the main process.
        checkpoint_dir: A folder, visible to all processes, for moments, merges, the gates' training and the final
            weights, cached under a hash of everything they depend on. Repeating the call resumes, with the same result,
            bit by bit on CPU. Moments take 16 bytes x width^2 per consumer, above 512 channels half of that. Entries
            of a model and its images stay, at all budgets, until two others have been analysed there. SIGTERM while the
            gates train saves and ends the program with exit code 0. None: nothing is written.
    Returns:
        The slim model: the plain module in eval mode, on the device of the run, each weight in its own dtype and
        trainable if it was before; also the plan and the report. Files that transformers' save_pretrained or timm's
        save_for_hf write load again. A slim model may be slimmed further; its provenance then has both rounds.
    Raises:
        TypeError: `model` is not a module.
        ValueError: A budget, name or option does not fit, the loader is empty, labels do not fit the outputs, the
            budget is not reachable.
        OSError: checkpoint_dir cannot be written to.

    Example:
        >>> model = timm.create_model("cifar_resnet20").eval()
        >>> images = [torch.randn(16, 3, 32, 32) for _ in range(4)]  # yours: some 2,000, with or without labels
        >>> result = lfrns.slim(model, images, macs=0.5, fcr_steps=0, progress=False)
        >>> result.report.macs_fraction <= 0.5, type(result.model).__name__
        (True, 'CifarResNet')

    Source: Fang and Yin 2025; each step's docstring states what is ours.
    """
    given = locals()
    how = CutOptions.of(given)
    return _analyse(model, loader, FindOptions.of(given), RunOptions.of(given)).cut_by(how)


@public
def analyse(
    model: nn.Module,
    loader: Any,
    *,
    preset: str = "ours",
    kinds: Sequence[str] = KINDS,
    groups: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    distance: Any = "functional",
    widths: str = "global",
    min_keep: int = 1,
    approximate: bool = False,
    accelerator: Any = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
) -> Analysis:
    """Do the part of `slim` that no budget changes: trace, self-check, responses, the cost of every merge.

    Args:
        model, loader, preset, kinds, groups, exclude, distance, widths, min_keep, approximate, accelerator, seed,
            device, progress, checkpoint_dir: As for `slim`.
    Returns:
        An analysis whose `.cut(macs=0.5)` returns what `slim` would, at as many budgets as are wanted.
    Raises:
        TypeError: `model` is not a module.
        ValueError: A name or option does not fit, or the loader is empty.

    Example:
        >>> images = [torch.randn(16, 3, 32, 32) for _ in range(4)]
        >>> analysis = lfrns.analyse(timm.create_model("cifar_resnet20").eval(), images, progress=False)
        >>> [round(analysis.cut(macs=macs, fcr_steps=0).report.macs_fraction, 1) for macs in (0.7, 0.5)]
        [0.7, 0.5]
    """
    given = locals()
    return _analyse(model, loader, FindOptions.of(given), RunOptions.of(given))


def _analyse(model: nn.Module, loader: Any, find: FindOptions, run: RunOptions) -> Analysis:
    """Trace, self-check, run the images, and compute the cost of every merge."""
    model = unwrap(model, call())
    refuse_meta(model, call())
    with clocked(run.shows_progress) as clock:
        clock.step("images")
        dense = analysis_copy(model, run.processes.device or run.device or device_of(model))
        batches = read_loader(loader, dense, run.seed)
        example = batches[0][0][:1]
        settle_layout(example, dense)

        clock.step("trace")
        trace = settled_trace(dense, example)
        trace.cost.complete(count_macs(dense, example))
        check_differentiable(dense, as_input(example, dense), call())
        batches = understand(dense, batches, call())

        clock.step("self-check")
        every, checked = self_check(dense, trace.groups, example, run.seed)
        return_memory()
        chosen = choose_groups(every, find)

        clock.step("responses")
        images, names = [images for images, _ in batches], [group.name for group in chosen]
        outputs = repr(dense.lfrns_outputs)
        cache = Cache(run.checkpoint_dir, run.processes, dense, images, [names, outputs], run.seed)
        macs = trace.cost.macs({})
        kept = cache.keep("moments", lambda: as_data(observe(dense, chosen, batches, macs, run.seed, run.processes)))
        moments = {name: Moments(**fields) for name, fields in kept.items()}

        clock.step("redundancy")
        return_memory()
        kept = cache.keep(
            "merges", lambda: as_data(_merges(dense, chosen, images, moments, find, run)),
            find.distance, find.widths, find.min_keep,
        )  # fmt: skip
        merges = {name: Merges(**fields) for name, fields in kept.items()}
    return Analysis(
        model=model, dense=dense, batches=batches, trace=trace, every=every, checked=checked, chosen=chosen,
        moments=moments, merges=merges, find=find, run=run, cache=cache, seconds=clock.seconds,
    )  # fmt: skip


def _merges(
    dense: nn.Module, chosen: Sequence[UnitGroup], images: Sequence[Tensor], moments: dict[str, Moments],
    find: FindOptions, run: RunOptions,
) -> dict[str, Merges]:  # fmt: skip
    """Find the order in which each group's units merge, and what each merge costs."""
    merges = {
        g.name: find_merges(views(dense, g, moments), g.size, find.distance, min(find.min_keep, g.size)) for g in chosen
    }
    if find.distance == "functional" and find.widths == "global":
        held, count = held_out(images), sum(map(len, images))
        return measure_costs(dense, chosen, merges, held, count, moments, seed=run.seed, processes=run.processes)
    return merges


def as_data(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return dataclasses by name as plain data for the cache."""
    return {name: dict(vars(result)) for name, result in results.items()}
