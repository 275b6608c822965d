"""The README over a folder of checkpoints says what their records say."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from lfrns_hub.hub.index import checkpoint_name, refresh_index, write_index
from lfrns_hub.measure import Record
from lfrns_hub.plots import plot_ladder

COUNTS = {"params_m": 2.0, "macs_g": 1.0, "size_mb": 8.0}
DENSE = {"top1_pct": 80.0, "images": 500, "latency_ms": 4.0, "occasion": "one", **COUNTS}
SETUP = {"dataset": "flowers", "dtype": "float32", "machine": {"cpu": "some CPU", "device": "cpu", "threads": 2}}


def write(folder: Path, name: str, macs_g: float, **figures: object) -> None:
    """A checkpoint's record."""
    slim = {**DENSE, "macs_g": macs_g, "agreement_pct": 90.0, **figures}
    (folder / name).mkdir(parents=True)
    Record(DENSE, slim, SETUP).save(folder / name / "record.json")


def test_the_largest_comes_first_under_the_dense_one(tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns35_flowers", 0.35, top1_pct=70.5, latency_ms=2.0)
    write(tmp_path, "net.lfrns75_flowers", 0.75, top1_pct=79.25, latency_ms=3.0)
    (tmp_path / "work").mkdir()
    lines = write_index(tmp_path, "net, slimmed").read_text().splitlines()
    assert lines[0] == "# net, slimmed"
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| dense | 1.000 | 80.00 | 100.00 | 2.000 | 1.0000 | 4.00 | 4.00 | 8.00 |",
        "| [net.lfrns75_flowers](net.lfrns75_flowers) | 0.750 | 79.25 | 90.00 | 2.000 | 0.7500 | 3.00 | 4.00 | 8.00 |",
        "| [net.lfrns35_flowers](net.lfrns35_flowers) | 0.350 | 70.50 | 90.00 | 2.000 | 0.3500 | 2.00 | 4.00 | 8.00 |",
    ]
    (note,) = [line for line in lines if line.startswith("Accuracy on")]
    assert "500 images of flowers" in note and "some CPU" in note
    assert "(accuracy.png)" in lines[-3]
    assert imread(tmp_path / "accuracy.png").std() > 0


def test_without_accuracy_there_is_a_table_and_no_picture(tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns35_x", 0.35, top1_pct=None, agreement_pct=None)
    text = write_index(tmp_path, "net").read_text()
    assert "| 0.350 | not measured | not measured |" in text
    assert ".png" not in text
    assert not (tmp_path / "accuracy.png").exists()
    with pytest.raises(ValueError, match="top1_pct"):
        plot_ladder([], DENSE, tmp_path / "curve.png")


def test_an_index_follows_its_members_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns75_flowers", 0.75, top1_pct=79.25)
    write(tmp_path, "net.lfrns35_flowers", 0.35, top1_pct=70.5)
    assert refresh_index(tmp_path) is None and not (tmp_path / "README.md").exists()
    readme = write_index(tmp_path, "net, slimmed")
    readme.write_text(readme.read_text().replace("# net, slimmed\n", "# Our flowers\n\nAsk Ann.\n") + "\nSee also.\n")
    again = {**DENSE, "occasion": "another", "top1_pct": 85.0, "latency_ms": 9.0, "images": 80}
    slim = {**again, "macs_g": 0.35, "top1_pct": 74.0, "agreement_pct": 91.0, "latency_ms": 8.0}
    Record(again, slim, {**SETUP, "dataset": "tulips"}).save(tmp_path / "net.lfrns35_flowers" / "record.json")
    assert refresh_index(tmp_path) == readme
    text = readme.read_text()
    assert text.startswith("# Our flowers\n\nAsk Ann.\n") and text.endswith("\n\nSee also.\n")
    assert "| [net.lfrns35_flowers](net.lfrns35_flowers) | 0.350 | 74.00 | 91.00 |" in text and "70.50" not in text
    assert "- net.lfrns75_flowers: Accuracy on 500 images of flowers" in text
    assert "- net.lfrns35_flowers: Accuracy on 80 images of tulips" in text
    assert "| dense, beside net.lfrns75_flowers | 1.000 | 80.00 | 100.00 | 2.000 | 1.0000 | 4.00 | 4.00 |" in text
    assert "| dense, beside net.lfrns35_flowers | 1.000 | 85.00 | 100.00 | 2.000 | 1.0000 | 9.00 | 9.00 |" in text
    assert "No picture: the checkpoints were measured at different times" in text
    assert not (tmp_path / "accuracy.png").exists() and "accuracy.png" not in text
    refresh_index(tmp_path)
    assert readme.read_text() == text


def test_figures_of_another_occasion_never_stand_beside_a_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns35_flowers", 0.35, top1_pct=70.5, latency_ms=2.0, occasion="a later one")
    text = write_index(tmp_path, "net").read_text()
    unknown = "not measured"
    assert f"| dense | 1.000 | {unknown} | {unknown} | 2.000 | 1.0000 | {unknown} | {unknown} | 8.00 |" in text
    assert f"| 0.350 | 70.50 | 90.00 | 2.000 | 0.3500 | 2.00 | {unknown} | 8.00 |" in text
    assert "without the dense model (its figures were taken at another moment or on other images" in text
    assert ".png" not in text


def test_a_plot_of_two_occasions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plot_ladder.*different times"):
        plot_ladder([{**DENSE, "macs_g": 0.5, "occasion": "another"}], DENSE, tmp_path / "curve.png")


def test_a_readme_that_is_no_index_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns75_flowers", 0.75)
    (tmp_path / "README.md").write_text("# My project\n")
    assert refresh_index(tmp_path) is None
    assert (tmp_path / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"slim": {}}', '{"slim": {"macs_g": "<b>"}}', '{"slim": {"macs_g": NaN}}', '{"slim": 3}']
)
def test_a_damaged_record_has_a_line_that_says_so_and_a_killed_draft_none(content: str, tmp_path: Path) -> None:
    write(tmp_path, "net.lfrns75_flowers", 0.75, top1_pct=79.25)
    write(tmp_path, ".lfrns-0123-killed", 0.5)
    write(tmp_path, "broken", 0.5)
    (tmp_path / "broken" / "record.json").write_text(content)
    text = write_index(tmp_path, "net").read_text()
    assert "[net.lfrns75_flowers]" in text and "killed" not in text and "<b>" not in text
    (line,) = [line for line in text.splitlines() if "broken" in line]
    assert line.startswith("- broken: not listed, ")
    (tmp_path / "net.lfrns75_flowers" / "record.json").unlink()
    with pytest.raises(ValueError, match=r"write_index\("):
        write_index(tmp_path, "net")


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write_index\(.*no subfolder has a record"):
        write_index(tmp_path, "net")


@pytest.mark.parametrize(
    ("model", "data", "macs", "name"),
    [
        ("hf-hub:timm/resnet50.a1_in1k", "imagenet-1k", 0.75, "resnet50.lfrns75_imagenet-1k"),
        ("my.package:build_it", "./data/Flowers 102", 1, "build_it.lfrns100_flowers_102"),
        ("runs/resnet20.lfrns50_cifar10/", "digits", 0.35, "resnet20.lfrns35_digits"),
    ],
)
def test_names_are_what_the_hub_takes(model: str, data: str, macs: float, name: str) -> None:
    assert checkpoint_name(model, data, macs) == name
