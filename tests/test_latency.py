"""Latency budgets on a machine that is pretended: its times are arithmetic, so every expectation is exact."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end, start
from torch import Tensor, nn

import lfrns_hub as lfrns
from lfrns_hub.latency import LatencyMeter, LatencyModel, LatencySetup, search
from lfrns_hub.latency import meter as meter_file
from lfrns_hub.latency.layer_times import LayerShape, LayerTable, LayerTimes, find_step, grid
from lfrns_hub.latency.machine import Machine, spread, watched_layers
from lfrns_hub.latency.predict import observe_shapes
from lfrns_hub.method.ledger import Ledger
from lfrns_hub.method.provenance import add_round
from lfrns_hub.method.pruning_set import cluster_down
from lfrns_hub.method.redundancy import Merges
from lfrns_hub.method.restore import restore
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.units import SlimPlan


class Chain(nn.Module):
    """Three convolutions, a depthwise one between, and a head: each kind of axis that a layer's time hangs on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 1)
        self.depthwise, self.third = nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.Conv2d(96, 64, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.second(self.first(images).relu()).relu()
        return self.head(self.third(self.depthwise(x).relu()).relu().mean((2, 3)))


class Pretended:
    """A machine with steps of 16, where everything but layers takes `fixed` ms and 0.002 ms a channel made."""

    def __init__(self, fixed: float = 0.2, tile: int = 16):
        self.fixed, self.tile, self.layers_timed, self.models_timed = fixed, tile, 0, 0

    def layer_ms(self, out: int, read: int, per_group: Any) -> float:
        """A layer goes by tiles; a grouped one by its outputs alone."""
        tiles = math.ceil(out / self.tile)
        return 0.1 + 0.05 * tiles if per_group else 0.1 + 0.02 * tiles * math.ceil(read / self.tile)

    def describe(self) -> dict[str, Any]:
        return {"machine": "pretended"}

    def time_layers(self, layers: list[tuple[LayerShape, int, int]]) -> list[float]:
        self.layers_timed += len(layers)
        return [self.layer_ms(out, read, shape.per_group) for shape, out, read in layers]

    def parts(self, model: nn.Module) -> dict[str, float]:
        """A model's time, layer by layer and the rest."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        found = {n: self.layer_ms(*m.weight.shape[:2], getattr(m, "groups", 1) > 1) for n, m in layers.items()}
        return found | {"": self.fixed + 0.002 * sum(m.weight.shape[0] for m in layers.values())}

    def time_inside(self, models: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float]]:
        return {name: self.parts(model) for name, model in models.items()}

    def time_models(self, models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
        self.models_timed += 1
        return {name: [load * sum(self.parts(model).values()) for load in (1.0, 2.0)] for name, model in models.items()}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """The machine that `slim` finds itself on, with a cache of its own."""
    machine = Pretended()
    monkeypatch.setenv("LFRNS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(meter_file, "Machine", lambda *_: machine)
    return machine


def analyse_chain(accelerator: Any = None) -> Any:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(5)]
    return lfrns.analyse(Chain().eval(), batches, accelerator=accelerator, progress=False)


@pytest.fixture(scope="module")
def analysis() -> Any:
    return analyse_chain()


def truth(machine: Pretended, slim: nn.Module, dense: nn.Module) -> float:
    return sum(machine.parts(slim).values()) / sum(machine.parts(dense).values())


@pytest.mark.parametrize("latency", [0.8, 0.6, 0.45])
def test_the_budget_is_met_from_below_in_whole_steps(analysis: Any, pretended: Pretended, latency: float) -> None:
    result = analysis.cut(latency=latency, fcr_steps=2)
    found = truth(pretended, result.model, analysis.dense)
    assert result.report.latency_fraction == pytest.approx(found)
    assert latency * 0.9 < found <= latency  # a step of this small network is several percent of it
    widths = [group.kept_units for group in result.report.groups if group.kept_units < group.dense_units]
    assert widths and all(width % 16 == 0 for width in widths)
    assert result.report.budget == {"latency": latency}


def test_all_budgets_hold_together(analysis: Any, pretended: Pretended) -> None:
    both = analysis.cut(latency=0.8, macs=0.3, fcr_steps=0).report
    assert both.macs_fraction <= 0.3 and both.latency_fraction <= 0.8
    other = analysis.cut(latency=0.45, macs=0.9, fcr_steps=0).report
    assert other.macs_fraction <= 0.9 and other.latency_fraction <= 0.45


def test_without_restoring_the_budget_is_met_as_well(analysis: Any, pretended: Pretended) -> None:
    result = analysis.cut(latency=0.6, restore=False)
    assert 0.5 < truth(pretended, result.model, analysis.dense) <= 0.6


def test_round_to_overrides_the_step_of_the_machine(analysis: Any, pretended: Pretended) -> None:
    for multiple, rounded in ((32, 32), (16, 16), ("auto", 16)):
        group = next(group for group in analysis.chosen if group.name == "second")
        setup = LatencySetup().resolved(analysis.dense, torch.device("cpu"))
        meter = LatencyMeter(analysis.dense, analysis.every, analysis.chosen, torch.randn(1, 3, 8, 8), setup)
        assert meter.predicted.multiples["second"] == 16
        ledger = Ledger(analysis.trace.cost, {"latency": 1.0}, {"second": 59}, meter.predicted, stepped=True)
        gone = {"second": list(range(59))}  # 37 kept
        ledger.budgets["latency"] = ledger.now["latency"] / ledger.dense["latency"] + 0.1
        back = restore([group], gone, {"second": torch.ones(96)}, ledger, multiple)["second"]
        assert (37 + len(back)) % rounded == 0 and back


def test_a_budget_below_the_smallest_model_names_what_that_takes(analysis: Any, pretended: Pretended) -> None:
    pretended.fixed = 30.0
    with pytest.raises(ValueError, match=r"latency=0\.5 is not reachable: the smallest model takes 0\.9\d\d") as error:
        analysis.cut(latency=0.5, fcr_steps=0)
    assert "Ask for more" in str(error.value)


def test_the_report_adds_up_to_what_is_predicted(analysis: Any, pretended: Pretended) -> None:
    result = analysis.cut(latency=0.6, fcr_steps=0)
    told = json.loads(json.dumps(result.report.to_dict()))["latency"]
    dense, slim = (sum(row[f"{name}_ms"] for row in told["layers"]) for name in ("dense", "slim"))
    assert dense == pytest.approx(sum(pretended.parts(analysis.dense).values()))
    assert slim / dense == pytest.approx(told["predicted_fraction"])
    # Every width is on the grid or between two of its points, where this machine is linear: predicted is measured.
    assert told["predicted_fraction"] == pytest.approx(result.report.latency_fraction, rel=0.02)
    rows = {row["layer"]: row for row in told["layers"]}
    kept = len(result.plan.keep["second"])
    assert rows["second"]["slim"] == [len(result.plan.keep["first"]), kept] and rows["second"]["dense"] == [64, 96]
    assert rows["depthwise"]["slim"] == [kept, kept]
    assert rows["depthwise"]["slim_ms"] == pytest.approx(0.1 + 0.05 * math.ceil(kept / 16))
    assert rows["everything else"]["dense_ms"] == pytest.approx(0.2 + 0.002 * (64 + 96 + 96 + 64 + 5))
    made = result.model.lfrns_provenance
    assert made["report"]["latency_fraction"] == round(result.report.latency_fraction, 4)
    assert made["latency_setup"]["batch"] == 1 and made["budget"] == {"latency": 0.6}


def test_a_second_call_takes_the_layers_from_the_cache(analysis: Any, pretended: Pretended, tmp_path: Path) -> None:
    first = analysis.cut(latency=0.6, fcr_steps=0)
    timed = pretended.layers_timed
    assert timed > 0 and len(list((tmp_path / "cache").iterdir())) == 1
    assert analysis.cut(latency=0.6, fcr_steps=0).plan == first.plan
    assert pretended.layers_timed == timed
    (file,) = (tmp_path / "cache").iterdir()
    stored = json.loads(file.read_text())
    lost = next(key for key in stored["ms"] if key.startswith("model") and key.endswith("dense second"))
    stored["ms"][lost] = -1.0
    file.write_text(json.dumps(stored))
    assert analysis.cut(latency=0.6, fcr_steps=0).plan == first.plan
    assert json.loads(file.read_text())["ms"][lost] > 0


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "{", '{"ms": 3}', '{"ms": {"step conv": "wide", "step linear": -1}}', '{"ms": {"step conv": 1}}'],
)
def test_a_damaged_cache_is_measured_anew(content: str, tmp_path: Path) -> None:
    machine = Pretended()
    table = LayerTable(machine, tmp_path)
    table.path.write_text(content)
    again = LayerTable(machine, tmp_path)
    assert again.step("conv") == 16
    again.keep()
    assert LayerTable(machine, tmp_path).known["step conv"] == 16


def test_where_the_cache_cannot_be_written_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    table = LayerTable(Pretended(), tmp_path / "file")
    assert table.step("linear") == 16
    table.keep()
    assert (tmp_path / "file").read_text() == "mine"


def test_tables_of_two_setups_lie_in_two_files(tmp_path: Path) -> None:
    setups = (LatencySetup(threads=1, dtype=torch.float32, device="cpu"), LatencySetup(threads=2, device="cpu"))
    paths = {LayerTable(Machine(setup, last), tmp_path).path for setup in setups for last in (False, True)}
    assert len(paths) == 4


def test_times_between_the_grid_are_linear_and_off_a_step_those_of_the_next() -> None:
    times = LayerTimes(((16, 32), (8, 16)), (1.0, 2.0, 3.0, 6.0))
    assert times.at(24, 12) == pytest.approx((1 + 2 + 3 + 6) / 4)
    assert times.at(4, 2) == 1.0 and times.at(32, 16) == 6.0
    assert times.scaled(2.0, 16).at(17, 16) == 12.0
    assert LayerTimes(((40,),), (5.0,)).at(3) == 5.0


def test_a_time_that_falls_with_the_width_is_noise(tmp_path: Path) -> None:
    class Noisy(Pretended):
        def time_layers(self, layers: list) -> list[float]:
            return [9.0 if out == 32 and len(layers) < 10 else float(out) for _, out, _ in layers]

    shape = LayerShape.of(nn.Linear(64, 64), (1, 4, 64))
    table = LayerTable(Noisy(), tmp_path)
    table.known["step linear"] = 16
    times = table.times(shape, [(64, True), (64, False)])
    assert times.widths == ((16, 32, 48, 64), (64,)) and times.ms == (9.0, 9.0, 48.0, 64.0)


@pytest.mark.parametrize("step", [1, 8, 16, 32])
def test_the_step_of_a_machine_is_read_off_its_times(step: int) -> None:
    assert find_step({width: 2 + 0.1 * math.ceil(width / step) for width in range(64, 129, 4)}) == (
        1 if step < 8 else step
    )


def test_a_grid_ends_at_the_dense_width_and_fits_the_groups_of_a_convolution() -> None:
    assert grid(24, 16, None) == (16, 24) and grid(8, 16, None) == (8,)
    assert all(width % 48 == 0 for width in grid(240, 16, (6, 6)))


def test_search_raises_the_prediction_where_it_was_too_low() -> None:
    found = search(lambda p: p, lambda p: 0.6 * p, 0.5, start=0.5)
    assert 0.97 * 0.5 <= 0.6 * found <= 0.5


def test_search_ends_below_where_steps_leave_a_hole() -> None:
    found = search(lambda p: p, lambda p: 0.3 if p < 0.55 else 0.7, 0.5, start=0.5, least=0.1)
    assert found < 0.55


def test_search_takes_all_that_there_is_where_another_budget_is_tighter() -> None:
    assert search(lambda p: p, lambda p: 0.2, 0.5, start=0.5) == 1


def test_search_finds_the_least_or_says_what_it_takes() -> None:
    assert search(lambda p: p, lambda p: 0.4 + p, 0.5, start=0.5, least=0.09) == pytest.approx(0.09, abs=0.02)
    with pytest.raises(ValueError, match=r"latency=0\.5 is not reachable: the smallest model takes 0\.700"):
        search(lambda p: p, lambda p: 0.6 + p, 0.5, start=0.5, least=0.1)


def test_units_within_a_step_that_is_paid_for_come_back_for_nothing(analysis: Any, pretended: Pretended) -> None:
    setup = LatencySetup().resolved(analysis.dense, torch.device("cpu"))
    meter = LatencyMeter(analysis.dense, analysis.every, analysis.chosen, torch.randn(1, 3, 8, 8), setup)
    group = next(group for group in analysis.chosen if group.name == "second")
    merges = {"second": Merges(list(range(40)), [float(i) for i in range(40)])}
    smooth = Ledger(analysis.trace.cost, {"latency": 0.85}, latency=meter.predicted)
    assert smooth.change("latency", "second", 1) < 0  # each unit counts when clusters are made
    taken = cluster_down([group], merges, smooth, "global")["second"]
    stepped = smooth.in_steps(0.92)
    assert stepped.change("latency", "second", -1) == 0 or (96 - taken) % 16 == 0
    gone = merges["second"].order[:taken]
    back = restore([group], {"second": gone}, {"second": torch.ones(96)}, stepped, "auto")["second"]
    assert (96 - taken + len(back)) % 16 == 0 and stepped.excess("latency") <= 1e-9


def test_a_layer_counts_with_what_it_takes_inside_the_network(tmp_path: Path, analysis: Any) -> None:
    class Slow(Pretended):
        """Inside, the second layer takes three times what it takes alone."""

        def parts(self, model: nn.Module) -> dict[str, float]:
            found = super().parts(model)
            return found | {"second": 3 * found["second"]}

    machine = Slow()
    setup = LatencySetup().resolved(analysis.dense, torch.device("cpu"))
    meter = LatencyMeter(
        analysis.dense, analysis.every, analysis.chosen, torch.randn(1, 3, 8, 8), setup,
        machine=machine, directory=tmp_path,
    )  # fmt: skip
    removed = {"first": 32}
    plan = SlimPlan({"first": list(range(32))})
    assert meter.predicted.ms({}) == pytest.approx(sum(machine.parts(analysis.dense).values()))
    assert meter.predicted.ms(removed) / meter.predicted.ms({}) == pytest.approx(meter.ratio(plan))
    meter.ratio(SlimPlan({"first": list(range(32, 64))}))
    assert machine.models_timed == 1  # equal widths take equal times


def test_the_machine_times_layers_networks_and_what_is_between(analysis: Any) -> None:
    setup = LatencySetup(batch=2).resolved(analysis.dense, torch.device("cpu"))
    machine, images = Machine(setup), torch.randn(2, 3, 8, 8)
    shapes = [
        LayerShape.of(analysis.dense.get_submodule(n), (2, w, 8, 8)) for n, w in (("first", 3), ("depthwise", 96))
    ]
    assert all(ms > 0 for ms in machine.time_layers([(shapes[0], 16, 3), (shapes[1], 32, 32)]))
    inside = machine.time_inside({"dense": analysis.dense}, images)["dense"]
    assert set(inside) == {"first", "second", "depthwise", "third", "head", ""} and min(inside.values()) > 0
    times = machine.time_models({"dense": analysis.dense, "slim": analysis.dense}, images)
    assert len(times["dense"]) == len(times["slim"]) >= 10
    with watched_layers({"dense": analysis.dense}, torch.device("cpu")) as laps:
        analysis.dense(images), analysis.dense(images)
    assert [len(ms) for ms in laps["dense"].values()] == [2] * 5
    assert not analysis.dense.first._forward_hooks


class Clockless(Pretended):
    """A machine that must not be asked for the time."""

    def parts(self, model: nn.Module) -> dict[str, float]:
        raise RuntimeError("another process than the main one takes times")

    def time_layers(self, layers: list) -> list[float]:
        raise RuntimeError("another process than the main one takes times")


def cut_in_a_process(rank: int, folder: Path) -> None:
    """In each of two processes, of which the second has no clock: cut to a latency, leave the plan."""
    os.environ["LFRNS_CACHE"] = str(folder / "cache")
    meter_file.Machine = lambda *_: Pretended() if rank == 0 else Clockless()
    accelerator = make_accelerator()
    result = analyse_chain(accelerator).cut(latency=0.6, fcr_steps=2)
    (folder / f"plan{rank}.json").write_text(result.plan.to_json())
    (folder / f"fraction{rank}").write_text(repr(result.report.latency_fraction))


def test_the_main_process_times_and_all_take_its_word(tmp_path: Path, free_port: str, pretended: Pretended) -> None:
    assert end(start(cut_in_a_process, tmp_path, processes=2, port=free_port)) == [0, 0]
    for name in ("plan{}.json", "fraction{}"):
        first, second = ((tmp_path / name.format(rank)).read_text() for rank in (0, 1))
        assert first == second
    assert 0.5 < float(first) <= 0.6


def test_the_spread_of_equal_ratios_is_nothing() -> None:
    assert spread([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == 0
    assert spread([1.0, 1.2, 1.4, 1.1], [1.0] * 4) > 0.01


def test_a_table_of_layers_is_built_as_the_network_has_them() -> None:
    setup = LatencySetup(dtype=torch.bfloat16, device="cpu", threads=1)
    conv = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=4, bias=False)
    layer, images = LayerShape.of(conv, (1, 32, 8, 8)).build(32, 16, setup, True)
    assert (layer.groups, layer.in_channels, layer.out_channels, layer.stride) == (2, 16, 32, (2, 2))
    assert layer(images).shape == (1, 32, 4, 4) and images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_setup_runs_with_its_threads_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    with LatencySetup(threads=before + 1).running():
        assert torch.get_num_threads() == before + 1 and not torch.is_grad_enabled()
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, r"LatencySetup\(batch=0\): a whole number of images.* Leave it out for one"),
        ({"threads": 1.5}, r"LatencySetup\(threads=1\.5\): a whole number of threads.* Leave it out for all"),
        ({"dtype": torch.int8}, r"LatencySetup\(dtype=torch\.int8\): a floating-point .* Leave it out"),
        ({"device": "abacus"}, r"LatencySetup\(device=abacus\): torch knows no such device\. Pass 'cpu'"),
        ({"device": "meta"}, r"LatencySetup\(device=meta\): nothing runs there\. Pass 'cpu'"),
        ({"compile": "max"}, r"LatencySetup\(compile=max\): True or False"),
    ],
)
def test_a_setup_that_does_not_fit_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencySetup(**options)


def test_rounds_multiply_where_the_time_of_the_first_model_is_known() -> None:
    def made(latency: float | None) -> dict[str, Any]:
        budget = {"macs": 0.5} if latency is None else {"latency": latency}
        report = {"macs_fraction": 0.5} | ({} if latency is None else {"latency_fraction": latency})
        return {"plan": {}, "widths": {}, "budget": budget, "report": report}

    both = add_round(made(0.5), made(0.4))
    assert both["budget"] == {"latency": 0.2} and both["report"]["latency_fraction"] == 0.2
    second = add_round(made(None), made(0.4))
    assert second["budget"] == {"macs": 0.5} and "latency_fraction" not in second["report"]
    assert second["rounds"][1]["budget"] == {"latency": 0.4} and second["rounds"][1]["latency_fraction"] == 0.4


def test_a_model_without_layers_that_change_predicts_the_rest() -> None:
    model = LatencyModel([], [], {}, {}, (2.0, 1.5), {})
    assert model.ms({}) == 2.0 == model.fraction({}) * 2


def test_a_layer_that_answers_with_a_tuple_is_sized_by_its_first_tensor() -> None:
    class WithBias(nn.Linear):
        def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(rows), self.bias

    model, rows = nn.ModuleDict({"layer": WithBias(4, 6)}), torch.zeros(2, 4)
    assert observe_shapes(model, lambda: model["layer"](rows)) == {"layer": [((2, 4), 12)]}
