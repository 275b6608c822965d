"""The benchmarks of speed, on tiny networks: rows are kept and rendered, ratios are those of turns side by side."""

import importlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from transformers.utils import logging

import lfrns_hub as lfrns
from lfrns_hub.surgery import cut
from lfrns_hub.trace import trace_model

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ON_GPU = ("analysis-resnet50", "analysis-vit", "slim-resnet50", "throughput-vit-256")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a benchmark by its name, as it is imported when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before, shown = set(sys.modules), logging.is_progress_bar_enabled()
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]
    if shown:
        logging.enable_progress_bar()


@pytest.fixture
def speed(module: Any) -> ModuleType:
    """Import benchmarks/speed.py."""
    return module("speed")


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a file of results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def kept(folder: Path, name: str) -> dict[str, Any]:
    """Read what a row kept."""
    return json.loads((folder / f"{name}.json").read_text())


def line_of(page: str, what: str, nth: int = 0) -> list[str]:
    """Return the cells of a row of a page."""
    found = [line for line in page.splitlines() if line.startswith(f"| {what}")]
    return [cell.strip() for cell in found[nth].strip("|").split("|")]


def test_a_ratio_is_the_median_of_ratios_not_the_ratio_of_medians(module):
    assert module("turns").ratio_of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [2.0, 1.0, 3.0]


def test_turns_go_round_and_those_for_warming_up_do_not_count(module, monkeypatch):
    turns, order, waited = module("turns"), [], []
    monkeypatch.setattr(turns, "wait", waited.append)
    told = iter([7.0, 8.0, 9.0])

    def measured() -> float:
        order.append("ours")
        return next(told)

    found = turns.run_turns({"reference": lambda: order.append("reference"), "ours": measured}, 2, warmup=1, device="x")
    assert order == ["reference", "ours"] * 3
    assert found["ours"] == [8.0, 9.0]
    assert len(found["reference"]) == 2 and all(0 < seconds < 1 for seconds in found["reference"])
    assert waited == ["x"] * 12


def test_rows_are_measured_kept_and_not_measured_again(speed, tmp_path, capsys):
    names = ["load-vit", "load-transformers-vit"]
    run = ["--smoke", "--runs", "2", "--results", str(tmp_path), "--only", *names]
    speed.main(run)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    assert capsys.readouterr().out.count("| ours: ") == 2
    found = kept(tmp_path, "load-transformers-vit")
    assert set(found["turns"]) == {"reference", "ours", "from_pretrained of it"}
    for side, ratio in found["ratios"].items():
        low, high = sorted(a / b for a, b in zip(found["turns"][side], found["turns"]["reference"], strict=True))
        assert ratio == pytest.approx([(low + high) / 2, low, high])
    assert found["smoke"] and "gpu" not in found["machine"] and found["versions"]["torch"] == metadata.version("torch")

    write(tmp_path, "load-vit", {"mark": 1})
    speed.main(run)
    assert capsys.readouterr().out == ""
    speed.main([*run[:-2], "load-v*", "--again"])
    assert set(kept(tmp_path, "load-vit")["turns"]) == {"reference", "ours", "timm.create_model of it"}


def test_rows_of_a_gpu_are_skipped_on_a_cpu(speed, tmp_path, capsys):
    speed.main(["--smoke", "--results", str(tmp_path), "--only", "throughput-*"])
    assert capsys.readouterr().out.count("skipped (a GPU's row, give --device cuda)") == 4
    assert list(tmp_path.iterdir()) == []
    assert speed.why_not("load-vit", Namespace(device="cuda")) == "the CPU's row"
    assert [name for name in ON_GPU if speed.why_not(name, Namespace(device="cuda")) == "the CPU's row"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(speed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--device", "cuda", "--results", str(tmp_path)])
    assert "--device cuda: torch finds no GPU here. Leave it out" in capsys.readouterr().err


def test_a_name_of_no_row_is_an_error(speed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--only", "load-*", "lode-vit", "--results", str(tmp_path)])
    assert "--only lode-vit: no row has such a name. They are analysis-resnet50," in capsys.readouterr().err


def test_throughput_is_timed_in_bfloat16_on_both_sides(module, monkeypatch):
    rows, seen = module("model_rows"), []
    run = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: seen.append((x.dtype, len(x))) or run(self, x))
    found = rows.throughput_turns("vit_base_patch16_224", 2, Namespace(device="cpu", smoke=True, runs=2))
    assert {side: len(values) for side, values in found.items()} == {"reference": 2, "ours": 2}
    assert seen[-1] == (torch.bfloat16, 2)


def made_up(ours: list[float], reference: list[float], **machine: Any) -> dict[str, Any]:
    """Make up what a row keeps; the ratios are worked out by hand."""
    return {
        "turns": {"reference": reference, "ours": ours, "another": ours},
        "ratios": {"another": [0.5, 0.25, 0.75], "ours": [0.5, 0.25, 0.75]},
        "machine": {"cpu": "A CPU", "threads": 2, **machine},
    }


def test_a_page_gives_medians_and_says_what_was_not_measured(speed, tmp_path):
    write(tmp_path, "load-vit", made_up([1.0, 1.0, 3.0], [2.0, 4.0, 4.0]))
    page = speed.render(speed.rows, tmp_path)
    what = "loading a slim vit_base_patch16_224 / the dense one, from a folder"
    cells = [what, "0.50 (0.25 to 0.75)", "at most 1.0", "4 s", "1 s", "3", "A CPU, 2 threads"]
    assert line_of(page, what) == cells
    assert line_of(page, "&nbsp;&nbsp;another")[1:3] == ["0.50 (0.25 to 0.75)", ""]
    assert line_of(page, "responses + redundancy, resnet50")[1:3] == ["not measured", "at most 1.5"]
    on_cpu, on_gpu = ([r for r in speed.rows.values() if device in r.devices] for device in ("cpu", "cuda"))
    # all rows but the one, and a line for each of the three other benchmarks
    assert page.count("| not measured |") == len(on_cpu) - 1 + len(on_gpu) + 3
    assert page.partition("## On a GPU\n")[2].count("| not measured |") == len(on_gpu) > 0


def test_a_gpu_has_a_section_of_its_own_with_images_a_second(speed, tmp_path):
    write(tmp_path / "A-GPU", "throughput-vit-256", made_up([0.064, 0.032, 0.064], [0.128] * 3, gpu="A GPU"))
    write(tmp_path / "A-GPU", "analysis-vit", made_up([3.0], [2.0], gpu="A GPU"))
    above, _, section = speed.render(speed.rows, tmp_path).partition("## On a GPU: A-GPU\n")
    assert line_of(section, "forward pass of vit_base_patch16_224", 1)[3:] == [
        "0.128 s, 2000 images/s",
        "64 ms, 4000 images/s",
        "3",
        "A GPU",
    ]
    assert line_of(section, "responses + redundancy, vit_base")[3:5] == ["2 s", "3 s"]
    assert line_of(section, "slim(fcr_steps=0)")[1] == "not measured"
    assert line_of(above, "responses + redundancy, vit_base")[1] == "not measured"
    assert "## On a GPU\n" not in above + section


def test_the_page_takes_in_the_other_benchmarks_of_speed(speed, tmp_path):
    step = {"model": "a", "batch": 4, "plain_ms": 100.4, "gates_ms": 109.6, "ratio": [1.09, 1.0, 1.2], "runs": 7}
    write(tmp_path, "fcr_step", {"a": step})
    images = {"ours": 30.04, "plain": 10.06}
    case = {"batch": 8, "images_per_second": images, "ratio": [3.0, 2.5, 3.5], "runs": 5}
    write(tmp_path, "retraining", {"cases": {"b with a teacher": case}})
    again = {"dense_ms": 20.0, "slim_ms": 10.0, "quartiles": [0.49, 0.5, 0.51]}
    row = {"model": "c", "budget": {"latency": 0.5}, "round_to": "auto", "again": again, "speedup": 2.0}
    (tmp_path / "latency_budget.json").write_text(json.dumps([row | {"error_pct": -0.5, "macs_fraction": 0.4}]))
    page = speed.render(speed.rows, tmp_path)
    assert line_of(page, "a |") == ["a", "4", "100", "110", "1.09 (1.00 to 1.20)", "7"]
    assert line_of(page, "b with") == ["b with a teacher", "8", "30.0", "10.1", "3.00 (2.50 to 3.50)", "5"]
    last = ["0.500 (0.490 to 0.510)", "2.00x", "-0.5 %", "0.400"]
    assert line_of(page, "c |") == ["c", "latency 0.5, round_to auto", "20.0", "10.0", *last]


def test_the_page_in_docs_is_what_the_results_say(speed):
    """If this fails: python benchmarks/speed.py --render."""
    assert speed.DOCUMENT.read_text(encoding="utf-8") == speed.render(speed.rows, speed.RESULTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_of_a_gpu_are_kept_in_a_folder_of_its_name(speed, tmp_path):
    names = ["analysis-vit", "throughput-vit-1"]
    speed.main(["--smoke", "--runs", "1", "--device", "cuda", "--results", str(tmp_path), "--only", *names])
    (folder,) = tmp_path.iterdir()
    assert sorted(path.stem for path in folder.iterdir()) == names
    assert kept(folder, names[0])["machine"]["gpu"] == torch.cuda.get_device_name()
    assert f"## On a GPU: {folder.name}" in speed.render(speed.rows, tmp_path)


def test_a_step_of_the_gates_is_timed_beside_a_plain_one(module):
    found = module("fcr_step").time_fcr_step("test_resnet", batch=2, runs=2)
    low, high = found["ratio"][1:]
    assert 0 < low <= found["ratio"][0] <= high
    assert found["plain_ms"] > 0 and found["gates_ms"] > 0 and found["runs"] == 2


def test_explained_is_whole_for_the_dense_network_and_less_for_a_cut_one(module):
    """The measure of integrity: any narrower network will do, its plan need not be known."""
    explained = module("explained").explained
    torch.manual_seed(0)
    model, images = timm.create_model("cifar_resnet20").eval(), [torch.randn(20, 3, 32, 32) for _ in range(5)]
    trace = trace_model(model, images[0])
    whole = explained(model, model, trace.sites, images)
    assert min(whole.values()) > 0.98
    plan = lfrns.SlimPlan({"layer3.2.conv1": [0, 1, 2]})
    less = explained(model, cut(model, trace.groups, plan), trace.sites, images)
    assert less["layer3.2.conv2"] < 0.9
    assert less["layer3.1.conv2"] > 0.98


def test_a_checkpoint_is_timed_again_and_replaces_its_earlier_row(module, tmp_path, monkeypatch):
    budget = module("latency_budget")
    folder = lfrns.save(budget.random_model("test_vit"), tmp_path / "slim")
    # The stock test_vit takes 160 pixels; the benchmark's models take 224.
    monkeypatch.setattr(budget.torch, "randn", lambda n, c, *size, randn=torch.randn: randn(n, c, 160, 160))
    found = budget.time_again("test_vit", str(folder), lfrns.LatencySetup(), 3)
    low, middle, high = found["quartiles"]
    assert 0 < low <= middle == found["fraction"] <= high
    assert found["dense_ms"] > 0 and found["slim_ms"] > 0

    monkeypatch.setattr(budget, "OUT", tmp_path / "rows" / "latency_budget.json")
    row = {"model": "a", "budget": {"macs": 0.5}, "round_to": "auto"}
    for one in (row | {"speedup": 1.0}, row | {"round_to": 16}, row | {"speedup": 2.0}):
        budget.keep(one)
    assert json.loads(budget.OUT.read_text()) == [row | {"round_to": 16}, row | {"speedup": 2.0}]


def test_retraining_is_timed_beside_a_plain_loop(module):
    retraining = module("retraining")
    found = retraining.time_case(retraining.Case("cifar_resnet20", 4, 32), None, False, 1, 1)
    speeds = found["images_per_second"]
    assert found["ratio"] == pytest.approx([speeds["ours"] / speeds["plain"]] * 3)
    assert found["batch"] == 4 and not found["teacher"]


def test_a_step_inside_a_step_is_counted_once_and_functions_are_their_own_again(module):
    steps = module("gpu_steps")
    before = {place: getattr(*steps.place_of(place)) for place in steps.WATCHED}
    with pytest.raises(ZeroDivisionError), steps.watching("cpu") as watch:
        assert [place for place, own in before.items() if getattr(*steps.place_of(place)) is own] == []
        inner = watch.wrapped(lambda seconds: time.sleep(seconds), "inner")
        outer = watch.wrapped(lambda: [inner(0.02), inner(0.02), time.sleep(0.01)], "outer")
        inner(0.0)  # outside of all
        with watch.step("whole"):
            outer()
            watch.wrapped(lambda: 1 / 0, "failing")()
    assert {place: getattr(*steps.place_of(place)) for place in steps.WATCHED} == before
    whole, outer, inner, failing = watch.rows()
    assert (inner["step"], inner["calls"], failing["calls"]) == ("whole > outer > inner", 2, 1)
    assert inner["own"] == inner["seconds"] >= 0.04
    assert 0.01 <= outer["own"] == pytest.approx(outer["seconds"] - inner["seconds"], abs=2e-4)
    assert sum(row["own"] for row in watch.rows()) == pytest.approx(whole["seconds"], abs=5e-4)


def test_widths_off_the_line_are_told_by_their_multiple(module):
    found = module("gpu_stairs").excess({64: 1.0, 65: 2.0, 96: 3.0, 128: 2.0})
    assert found == {1: pytest.approx(2 / (65 / 64), abs=1e-3), 32: 2.0, 64: 1.0}


def test_parts_of_the_gpu_benchmark_are_kept_as_they_come(module, tmp_path, monkeypatch, capsys):
    gpu, out = module("gpu"), tmp_path / "gpu.json"

    def fail(_: Any, row: dict[str, Any]) -> None:
        row["before"] = 1
        raise ValueError("a reason\nand more")

    def hang(_: Any, row: dict[str, Any]) -> None:
        try:
            time.sleep(30)
        except Exception:  # as a forward that may fail in any way is tried
            row["swallowed"] = True

    small = "vit_small_patch16_224"
    own = [part for part in gpu.PARTS if part.network == small]
    tried = [("fails", 0.0, fail), ("hangs", 0.0, hang), ("too long", 6000.0, fail)]
    monkeypatch.setattr(gpu, "PARTS", [*own, *(gpu.Part(small, *one) for one in tried)])
    monkeypatch.setattr(gpu, "LONGEST", 60.0)
    limited = gpu.limited
    monkeypatch.setattr(gpu, "limited", lambda seconds: limited(0.1 if "hangs" in capsys.readouterr().out else 60.0))
    before = os.environ.get("LFRNS_CACHE")
    gpu.main(["--smoke", "--only", f"{small} *", "--results", str(out)])
    assert os.environ.get("LFRNS_CACHE") == before
    ((card, entry),) = json.loads(out.read_text()).items()
    assert card.endswith("(smoke)") and entry["left_out"] == [f"{small} too long"]
    steps, forward, failed, hung = (
        entry["parts"][f"{small} {what}"] for what in ("steps", "forward", "fails", "hangs")
    )
    assert failed["error"] == "ValueError: a reason" and failed["before"] == 1
    assert hung["error"].startswith("CutOff: cut off after") and "swallowed" not in hung
    for call in ("analyse", "cut"):
        names = {row["step"] for row in steps[call]}
        assert {"analyse": "analyse > trace > export", "cut": "cut > gates > steps"}[call] in names
    assert set(forward["times"]) == {"eager, batch 4", "eager, batch 1"}
    assert set(forward["models"]) == {gpu.DENSE, gpu.HALF, gpu.HALF_64}
    assert forward["models"][gpu.HALF]["macs"] <= 0.5 and forward["models"][gpu.HALF]["bytes"] < 1
    assert forward["times"]["eager, batch 1"][gpu.DENSE]["times_faster"] == [1.0, 1.0, 1.0]

    assert gpu.DOCUMENT.read_text(encoding="utf-8") == gpu.render(), "python benchmarks/gpu.py --render"
    gpu.main(["--table", "--results", str(out)])
    page = capsys.readouterr().out
    assert f"# {card}" in page and "Not finished: ValueError: a reason" in page and "too long" in page
    assert "| &nbsp;&nbsp;trace |" in page and f"| {gpu.HALF_64} | " in page


def test_published_figures_are_those_of_the_records(module: Any) -> None:
    published = module("published")
    assert [path.name for path, text in published.render().items() if path.read_text(encoding="utf-8") != text] == []


def test_the_page_of_results_has_the_zoo_of_its_record(module, monkeypatch, tmp_path):
    table = module("table")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    write(tmp_path / "benchmarks" / "results", "zoo", {"rows": [{
        "model": "net", "checkpoint": "net.lfrns50_x", "budget": {"macs": 0.5}, "status": "done",
        "dense": {"accuracy": 90.0, "macs_g": 2.0, "params_m": 4.0},
        "slim": {"accuracy": 88.5, "macs_g": 1.0, "params_m": 1.0},
        "figure": {"label": "top-1, %", "form": ".2f"}, "ms": {"eager": [3.0, 2.0]},
    }]})  # fmt: skip
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{table.BEGIN}\n{table.END}\n")
    table.main()
    page = (tmp_path / "docs" / "results.md").read_text()
    cells = ["MACs 0.5", "0.500", "0.250", "90.00", "88.50", "3.00", "2.00", "not measured", "not measured", "done"]
    assert line_of(page, "net.lfrns50_x") == ["net.lfrns50_x", *cells]
