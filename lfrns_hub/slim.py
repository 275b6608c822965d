"""The one call: trace, self-check, and the steps of `method/`, in reading order."""

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
        model: The dense network, any that torch.export runs: a classifier, or a network that answers with features
            (lists, dicts, dataclasses of tensors too). Untouched, on any device but meta, of any floating-point type:
            half precision is analysed in float32. Wrappers of torch.compile and DDP come off.
        loader: Calibration batches: `(images, labels)`, dicts, or bare images; it is read once, shuffled and kept in
            memory. Its order does not matter. Labels are class numbers [N], rows [N, K] of labels that hold together,
            or quantities; of several heads they come by name or in order; those of features are not read. What the
            outputs mean is said by `model.problem_type` (transformers' words), by the model's configuration or by the
            labels, else by shape.
        macs, params: Fraction of the dense cost to keep, in (0, 1]; what is given together holds together.
        latency: Fraction of the dense model's time of a forward pass to keep, in (0, 1], measured here and now. What
            layers take by width is measured once and kept in LFRNS_CACHE, else in the user's cache.
        latency_setup: Batch, dtype, device, threads, and whether compiled; by default one image, run as the model is.
        preset: "ours", or "paper": the abstract taken literally (correlation clusters, FCR, restore, no fold).
        kinds: Kinds of units to cut.
        groups, exclude: Names or globs of groups to cut, and not to.
        distance: "functional", "correlation", or a function of (tap views, units) giving distances [U, U].
        contribution: "fcr", or a function of (model, groups, keep, batches, moments) giving {group: [U]}.
        fcr_steps: Steps that the gates train; 0 skips them and ranks by the cost of merging.
        restore: Cluster below the budget and restore by contribution; False clusters right down to it.
        fold: Add what was cut to the consumers' weights, as far as the kept units express it.
        widths: "global", one threshold of cost per MAC for all groups, or "uniform", the same share of each.
        round_to: Multiple that widths prefer; "auto" is 8 for groups of 128 and more channels or neurons, and under
            latency= the multiple at which this machine gets slower, where it shows one.
        min_keep: Units that every group keeps.
        approximate: Also cut groups whose removal crosses a LayerNorm; no self-check covers those.
        accelerator: An Accelerate accelerator; each process then takes its share of the images.
        seed: Same seed, same plan; under latency= as far as the machine takes the same time.
        device: Where to run; by default where the model is.
        progress: Show a bar on the main process.
        checkpoint_dir: A folder, seen by all processes, where moments, merges, the gates' training and the finished
            weights are kept by the content of all they hang on: the same call takes up what is there, and ends with
            the same result, bit by bit on CPU. Moments take 16 bytes x width^2 per consumer, above 512 channels half of
            that. What was kept of a model and its images stays, at all budgets, until two others have been analysed
            there. SIGTERM while the gates train saves and ends the program with exit code 0. None: nothing is written.
    Returns:
        The slim model, the plain module in eval mode, on the device of the run, each weight in its own dtype and
        trainable if it was; its plan and the report. What transformers' save_pretrained or timm's save_for_hf write
        of it loads again; a slim model may be slimmed further, and its provenance then tells of both rounds.
    Raises:
        TypeError: The model is no module.
        ValueError: A budget, name or option does not fit, the loader is empty, labels are none of such outputs, the
            budget is not reachable.
        OSError: checkpoint_dir cannot be written to.
    Source: Fang and Yin 2025; each step's docstring says what is ours.
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
        What `.cut(macs=0.5)` makes a slim model of, at as many budgets as are wanted, each as `slim` would give it.
    Raises:
        TypeError: The model is no module.
        ValueError: A name or option does not fit, or the loader is empty.
    """
    given = locals()
    return _analyse(model, loader, FindOptions.of(given), RunOptions.of(given))


def _analyse(model: nn.Module, loader: Any, find: FindOptions, run: RunOptions) -> Analysis:
    """Trace, self-check, run the images, and find what every merge costs."""
    model = unwrap(model, call())
    refuse_meta(model, call())
    with clocked(run.shows_progress) as clock:
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
    """Return dataclasses by name as plain data that a cache keeps."""
    return {name: dict(vars(result)) for name, result in results.items()}
