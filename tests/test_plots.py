"""What the plots say: titles, axes with units, labels that stay apart, whiskers, ranges that exaggerate nothing."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from lfrns_hub.plots import plot_bench, plot_ladder, plot_widths
from lfrns_hub.plots.style import axis_range, name_machine

OCCASION = {"images": 5000, "occasion": "one"}
DENSE = {"top1_pct": 87.28, "macs_g": 0.0406, "latency_ms": 2.28, **OCCASION}
SETUP = {"machine": {"cpu": "some CPU", "device": "cpu", "threads": 1}, "dtype": "float32"}


def point(share: float, top1_pct: float, latency_ms: float | None = None) -> dict[str, Any]:
    """A slim model."""
    return {"top1_pct": top1_pct, "macs_g": share * DENSE["macs_g"], "latency_ms": latency_ms, **OCCASION}


POINTS = [point(0.25, 71.13, 1.2), point(0.9, 86.98, 2.2), point(0.75, 86.76, 2.05), point(0.5, 82.03, 1.86)]


def timing(runtime: str, batch: int, dense: float, slim: float) -> dict[str, Any]:
    """A row of the bench, whose quartiles lie a tenth below the median and two tenths above."""
    spread = {"dense_ms": dense, "slim_ms": slim, "ratio": slim / dense}
    return {"runtime": runtime, "batch": batch, **{key: [ms, 0.9 * ms, 1.2 * ms] for key, ms in spread.items()}}


def head(figure: Figure) -> list[str]:
    """The title of a figure and the lines below it."""
    return [text.get_text() for text in reversed(figure.texts)]


def legend(figure: Figure) -> list[str]:
    """The entries of a figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def said(axes: Any) -> list[str]:
    """The texts inside axes."""
    return [text.get_text() for text in axes.texts]


def assert_clear(figure: Figure) -> None:
    """No text in any axes covers another or a point's mark, and no legend or title covers axes."""
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        marks = [axes.transData.transform(xy) for line in axes.lines if line.get_marker() != "None" for xy in
                 line.get_xydata()]  # fmt: skip
        assert not [mark for mark in marks for box in boxes if box.contains(*mark)]
        inside = axes.get_window_extent()
        for other in (*figure.legends, *figure.texts):
            assert not other.get_window_extent().overlaps(inside)


def test_accuracy_stands_against_macs_and_latency_with_units_and_budgets(tmp_path: Path, figures: list[Any]) -> None:
    plot_ladder(POINTS, DENSE, tmp_path / "curve.png", title="net: cut to several budgets", setup=SETUP)
    (figure,) = figures
    assert head(figure) == ["net: cut to several budgets",
                            "5,000 test images; latency on some CPU, 1 thread, float32",
                            "The vertical axis starts at 65 %, not at 0."]  # fmt: skip
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("MACs of one image, M", "latency of one image, ms")
    assert left.get_ylabel() == "top-1 accuracy, %"
    for axes, key, factor in ((left, "macs_g", 1000), (right, "latency_ms", 1)):
        assert sorted(said(axes)) == ["25 %", "50 %", "75 %", "90 %"]
        assert axes.get_ylim()[0] == 65 and 87.28 < axes.get_ylim()[1] <= 101 and axes.get_xlim()[0] == 0
        slim, dense = axes.lines[1:]
        assert slim.get_xydata().tolist() == sorted([factor * one[key], one["top1_pct"]] for one in POINTS)
        assert dense.get_xydata().tolist() == [[factor * DENSE[key], 87.28]]
        assert slim.get_marker() != dense.get_marker() and slim.get_color() != dense.get_color()
    assert legend(figure) == ["slim, with the share of the dense MACs that it keeps", "dense"]
    assert_clear(figure)


def test_labels_of_points_close_together_stay_apart(tmp_path: Path, figures: list[Any]) -> None:
    points = [point(0.5 + number / 100, 82 + number / 50) for number in range(5)]
    plot_ladder(points, DENSE, tmp_path / "curve.png")
    assert sorted(said(figures[0].axes[0])) == [f"{number} %" for number in range(50, 55)]
    assert_clear(figures[0])


def test_latency_that_was_not_measured_has_no_axes_and_large_networks_count_in_g(tmp_path, figures) -> None:
    dense = {"r2": 0.9, "output": "quantities", "macs_g": 4.1}
    plot_ladder([{**dense, "r2": 0.4, "macs_g": 2.0}], dense, tmp_path / "curve.png", setup={"machine": "odd"})
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "MACs of one image, G" and axes.get_ylabel() == "R2"
    assert axes.get_ylim()[0] == 0 and head(figures[0]) == ["Accuracy of slim models"]


@pytest.mark.parametrize(
    ("values", "room", "low"), [([86, 87], 10, 75), ([30, 87], 10, 0), ([0, 0], 10, 0), ([-1, 0.5], 0.1, -1.4)]
)
def test_an_axis_exaggerates_no_small_difference(values: list[float], room: float, low: float) -> None:
    bottom, top = axis_range(values, room)
    assert bottom == pytest.approx(low) and top > max(values)
    assert bottom == 0 or top - bottom >= room


def test_milliseconds_stand_on_the_bars_of_each_runtime_and_batch(tmp_path: Path, figures: list[Any]) -> None:
    timings = [timing("eager", 1, 2.0, 1.5), timing("onnxruntime", 1, 0.5, 0.2), timing("eager", 32, 1234.5, 600)]
    plot_bench(timings, 0.4, tmp_path / "bench.png", title="net: time of a forward pass", setup=SETUP)
    (figure,) = figures
    assert head(figure)[:2] == ["net: time of a forward pass", "some CPU, 1 thread, float32"]
    one, many = figure.axes
    assert (one.get_title("left"), many.get_title("left")) == ("batch 1", "batch 32")
    assert many.get_xlabel() == "time of one pass, ms"
    assert [label.get_text() for label in one.get_yticklabels()] == ["PyTorch, eager", "ONNX Runtime"]
    assert said(one) == ["2.00 ms", "0.500 ms", "1.50 ms (0.75 of dense)", "0.200 ms (0.40 of dense)"]
    assert said(many) == ["1,234 ms", "600 ms (0.49 of dense)"]
    assert [bar.get_width() for bar in one.patches] == [2.0, 0.5, 1.5, 0.2]
    whiskers = [part.tolist() for bars in one.containers[1::2] for part in bars.errorbar.lines[2][0].get_segments()]
    assert np.array(whiskers)[..., 0].tolist() == pytest.approx(
        np.array([[0.9 * ms, 1.2 * ms] for ms in (2.0, 0.5, 1.5, 0.2)])
    )
    macs = [line.get_xdata()[0] for line in one.lines if line.get_marker() == "None"]
    assert macs == pytest.approx([0.8, 0.2])
    assert legend(figure) == ["dense", "slim", "0.40 of dense, the share of the MACs"]
    for axes in figure.axes:
        limit = axes.get_window_extent().x1
        assert all(text.get_window_extent().x1 < limit for text in axes.texts)
    assert_clear(figure)


def test_a_bench_without_timings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plot_bench\(timings=\[\]\).* nothing to draw"):
        plot_bench([], 0.5, tmp_path / "bench.png")


def test_pictures_are_white_with_a_margin_and_read_in_grey(tmp_path: Path, figures: list[Any]) -> None:
    with matplotlib.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}):
        path = plot_ladder(POINTS, DENSE, tmp_path / "curve.png", title="a $title$ of \N{KATAKANA LETTER A}")
    picture = imread(path)
    edge = 15  # pixels
    for side in (picture[:edge], picture[-edge:], picture[:, :edge], picture[:, -edge:]):
        assert (side[..., :3] == 1).all() and (side[..., 3:] == 1).all()
    with Image.open(path) as image:
        assert image.mode in ("RGB", "RGBA")
    slim, dense = (matplotlib.colors.to_rgb(line.get_color()) for line in figures[0].axes[0].lines[1:])
    weights = (0.299, 0.587, 0.114)
    assert abs(np.dot(slim, weights) - np.dot(dense, weights)) > 0.1
    assert head(figures[0])[0].startswith("a $title$")


def test_a_long_title_is_wrapped_to_the_width_of_the_plots(tmp_path: Path, figures: list[Any]) -> None:
    plot_widths({"a": [1, 4]}, tmp_path / "short.png")
    with Image.open(tmp_path / "short.png") as short:
        width = short.width
    plot_ladder(POINTS, DENSE, tmp_path / "curve.png", title=" ".join(["a_name_of_some_length"] * 12))
    with Image.open(tmp_path / "curve.png") as wrapped:
        assert wrapped.width < 1.4 * width
    assert len(head(figures[1])) > 3


@pytest.mark.parametrize(
    ("setup", "named"),
    [
        (SETUP, "some CPU, 1 thread, float32"),
        (
            {"machine": {"cpu": "x", "device": "NVIDIA H100"}, "dtype": "bfloat16"},
            "NVIDIA H100, bfloat16",
        ),
        ({"machine": ["odd"]}, ""),
        ({}, ""),
    ],
)
def test_the_machine_is_named_as_far_as_it_is_known(setup: dict[str, Any], named: str) -> None:
    assert name_machine(setup) == named


def cells_of(family: str, top1_pct: list[float], macs: float) -> dict[str, Any]:
    """What a benchmark kept of a contestant: a cell for each seed."""
    return {0: {seed: {"family": family, "top1_pct": one, "macs_fraction": macs} for seed, one in enumerate(top1_pct)}}


def test_the_curve_of_the_benchmark_tells_ours_peers_and_controls_apart(
    tmp_path: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import table

    files = []
    for macs, drop in ((0.5, 10.0), (0.25, 30.0)):
        cells = {
            "ours": cells_of("ours", [89.0 - drop, 91.0 - drop], macs),
            "Torch-Pruning, L1": cells_of("peer", [70.0 - drop], macs),
            "torch-kirigami, Taylor": cells_of("peer", [75.0 - drop], macs),
            "ours, without fold": cells_of("ablation", [60.0 - drop], macs),
        }
        if macs == 0.5:
            cells["random units"] = cells_of("control", [77.0], macs)
        files.append(({"task": "net", "params": None, "macs": macs, "dense_top1_pct": 92.5}, cells, {}))
    assert table.plot_curve(files, "net", tmp_path / "curve.png")
    (figure,) = figures
    (axes,) = figure.axes
    assert head(figure)[0] == "net on CIFAR-10: accuracy right after the cut, before any retraining"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("MACs kept, % of dense", "top-1 accuracy, %")
    assert [re.sub("\n.*", "", name) for name in legend(figure)] == [
        "ours", "torch-kirigami, Taylor", "Torch-Pruning, L1", "controls: other units", "dense, 92.50 %",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["ours"].get_xydata().tolist() == [[25, 60], [50, 80], [100, 92.5]]  # means of the seeds
    looks = [(line.get_color(), line.get_marker()) for line in (lines[name] for name in legend(figure))]
    assert len(set(looks)) == len({marker for _, marker in looks}) == 5
    assert axes.get_ylim()[0] == 0
    assert_clear(figure)
    assert not table.plot_curve(files[:1], "net", tmp_path / "one.png")


def test_a_cards_pictures_are_drawn_again_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import redraw

    provenance = {"plan": {"a": [0]}, "widths": {"a": [1, 4]}, "kinds": {"a": "channel"}, "seed": 0}
    (tmp_path / "record.json").write_text(json.dumps({"dense": None, "slim": {}, "setup": {"provenance": provenance}}))
    monkeypatch.setattr("sys.argv", ["redraw.py", str(tmp_path)])
    redraw.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "widths.png")]
    assert imread(tmp_path / "widths.png").std() > 0
