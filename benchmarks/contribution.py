"""Does learning help? Contributions against what restoring a unit alone really changes, at 0 to 1,000 FCR steps.

    python benchmarks/contribution.py resnet20 --data-dir DIR --weights-dir DIR

The network is clustered to 0.8 of the budget, as `slim` does it. Then each unit of the pruning set is opened alone, and
the loss on images that nothing was learned from is taken. Printed: Spearman's rank correlation of that change with the
contributions that FCR learns, and with Taylor, L1 and the BatchNorm's scale; over all units, and inside groups (mean).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accuracy import CALIBRATION_IMAGES, TASKS, Bench, parse
from case import Case
from ours import taylor_scores, unit_scores
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from lfrns_hub.method.costs import measure_costs
from lfrns_hub.method.fcr import gate_loss, learn_contributions
from lfrns_hub.method.gates import answer_gated, answer_to, make_gates
from lfrns_hub.method.pruning_set import CLUSTER_TO, cluster
from lfrns_hub.method.redundancy import find_merges, views
from lfrns_hub.method.responses import Moments, held_out, observe
from lfrns_hub.model_io.model import analysis_copy
from lfrns_hub.options import FindOptions, choose_groups
from lfrns_hub.runs.processes import ALONE
from lfrns_hub.trace import trace_model
from lfrns_hub.units import UnitGroup

STEPS = (1, 10, 100, 1000)  # after one step the contribution is the gradient at the start


class Clustered:
    """A network clustered as `slim` does it, before anything is restored."""

    def __init__(self, case: Case):
        self.dense, self.batches = analysis_copy(case.dense, case.images.device), case.batches()
        trace = trace_model(self.dense, case.example())
        self.groups: list[UnitGroup] = choose_groups(trace.groups, FindOptions())
        self.moments: dict[str, Moments] = observe(
            self.dense, self.groups, self.batches, trace.cost.macs({}), case.seed, ALONE
        )
        merges = {g.name: find_merges(views(self.dense, g, self.moments), g.size, "functional") for g in self.groups}
        held = held_out([images for images, _ in self.batches])
        merges = measure_costs(self.dense, self.groups, merges, held, len(case.images), self.moments, seed=case.seed)
        budget = {"macs": case.macs}
        self.keep, self.pruning_set, _ = cluster(self.groups, merges, trace, budget, "global", CLUSTER_TO)

    @torch.no_grad()
    def true_changes(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return by how much the mean loss falls when a unit of the pruning set is opened alone, per group."""
        gates, hooks = make_gates(self.dense, self.groups, self.keep, self.moments)
        target = answer_to(self.dense, images)

        def loss() -> float:
            return float(gate_loss(answer_gated(self.dense, hooks, images), target, labels, slice(None))) / len(images)

        for name, gone in self.pruning_set.items():
            gates[name][gone] = 0
        closed, changes = loss(), {}
        for name, gone in self.pruning_set.items():
            changes[name] = torch.zeros(len(gone))
            for place, unit in enumerate(gone):
                gates[name][unit] = 1
                changes[name][place] = closed - loss()
                gates[name][unit] = 0
        return changes

    def correlation(self, scores: dict[str, Tensor], changes: dict[str, Tensor]) -> tuple[float, float]:
        """Give the rank correlation over all units of the pruning set, and its mean inside groups of five and more."""
        pairs = [(scores[n][self.pruning_set[n]].double().numpy(), changes[n].double().numpy()) for n in changes]
        inside = [spearmanr(*pair).statistic for pair in pairs if len(pair[0]) >= 5 and np.ptp(pair[0]) > 0]
        every = spearmanr(np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])).statistic
        return float(every), float(np.nanmean(inside))


def norm_scores(case: Case, groups: list[UnitGroup]) -> dict[str, Tensor]:
    """Return the absolute BatchNorm scale of each unit; zero where it has none."""
    norms = {
        f"{name}.weight"
        for name, module in case.dense.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    }
    scores = {}
    for group in groups:
        scores[group.name] = torch.zeros(group.size)
        for part in group.slices:
            if part.tensor in norms:
                scores[group.name] += case.dense.get_parameter(part.tensor).detach().abs().cpu()[part.index].sum(1)
    return scores


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, nargs="?", default="resnet20")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--data-dir", default="uoft-cs/cifar10")
    parser.add_argument("--weights-dir", default="weights")
    parser.add_argument("--images", type=int, default=1000, help="of those split off, on which the truth is taken")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES)
    parser.add_argument("--limit", type=int, help="of the images of each split, to try that it runs")
    options = argparse.Namespace(**{**vars(parse([])), **vars(parser.parse_args())})
    bench = Bench(options)
    case = bench.case(seed=0)
    clustered = Clustered(case)
    held = bench.tuning.pixels[: options.images], bench.tuning.labels[: options.images]
    changes = clustered.true_changes(bench.tuning.normalise(held[0]), held[1])
    scores = {
        f"FCR, {steps} steps": learn_contributions(
            clustered.dense, clustered.groups, clustered.keep, case.batches(), clustered.moments, steps=steps
        )
        for steps in options.steps
    }
    scores["Taylor"] = taylor_scores(case)
    scores["L1"] = unit_scores(case, lambda p: p.detach().abs())
    scores["BatchNorm scale"] = norm_scores(case, clustered.groups)
    rows = {name: clustered.correlation(score, changes) for name, score in scores.items()}
    table = Table("contribution", "all units", "inside groups", title=f"{bench.name}: rank correlation with the truth")
    for name, (every, inside) in rows.items():
        table.add_row(name, f"{every:.3f}", f"{inside:.3f}")
    Console().print(table)
    units = sum(map(len, clustered.pruning_set.values()))
    result = {
        "setup": bench.store.content["setup"],
        "units": units,
        "images": options.images,
        "command": f"python benchmarks/contribution.py {options.task} --macs {options.macs:g}",
        "rank_correlation": {name: {"all": a, "inside": b} for name, (a, b) in rows.items()},
    }
    path = Path(__file__).parent / "results" / "contribution" / f"{bench.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
