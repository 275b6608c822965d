"""Figures of different moments or images are never compared: in the table, the card, the record."""

import copy
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lfrns_hub.hub.card import render_card
from lfrns_hub.measure import Record, evaluate, format_table, measure, weights_id
from lfrns_hub.measure.occasion import comparable_controls, comparable_dense, image_keys, images_id, why_no_dense

DENSE = {
    "occasion": "one",
    "top1_pct": 90.0,
    "latency_ms": 4.0,
    "params_m": 2.0,
    "macs_g": 1.0,
    "input_size": [3, 8, 8],
}
SLIM = {**DENSE, "top1_pct": 88.0, "latency_ms": 1.0, "params_m": 1.0, "macs_g": 0.5, "agreement_pct": 95.0}
SETUP = {"machine": {"cpu": "a CPU", "device": "cpu", "threads": 1}, "dtype": "float32", "input_size": [3, 8, 8]}


def without(side: dict, *keys: str) -> dict:
    """A side of a record without some of its figures."""
    return {key: value for key, value in side.items() if key not in keys}


def printed(record: Record) -> str:
    """The table of a record."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(format_table(record))
    return " ".join(console.export_text().split())


# What another moment, other images, or a record of before occasions were noted looks like.
APART = {
    "another occasion": (DENSE, {**SLIM, "occasion": "two"}),
    "a dense side of before": (without(DENSE, "occasion"), SLIM),
    "a slim side of before": (DENSE, without(SLIM, "occasion")),
    "both of before, put together": (without(DENSE, "occasion"), without(SLIM, "occasion", "agreement_pct")),
}


@pytest.mark.parametrize("sides", APART.values(), ids=APART)
def test_no_ratio_and_no_difference_across_occasions(sides: tuple[dict, dict]) -> None:
    dense, slim = copy.deepcopy(sides)
    record = Record(dense, slim, {**SETUP, "dataset": "flowers"})
    table = printed(record)
    card = render_card(record, model_name="net", base="ViT")
    for text in (table, card):
        assert "points" not in text and "0.250" not in text and "90.00" not in text and "4.00" not in text
        assert "0.500" in text  # MACs and parameters know no moment
        assert "another moment or on other images" in text
    assert "in turns" not in card and "the slim model alone" in card
    assert "(dense: not measured)" in card


@pytest.mark.parametrize(
    "sides", [(DENSE, SLIM), (without(DENSE, "occasion"), without(SLIM, "occasion"))], ids=["now", "of before"]
)
def test_one_occasion_is_compared(sides: tuple[dict, dict]) -> None:
    record = Record(*copy.deepcopy(sides), SETUP)
    assert "-2.00 points" in printed(record) and "0.250" in printed(record)
    card = render_card(record, model_name="net", base="ViT")
    assert "-2.00 points" in card and "0.250" in card and "in turns" in card and "was not measured" not in card


def test_macs_at_another_input_size_are_not_compared_and_parameters_are() -> None:
    slim = {**SLIM, "occasion": "two", "input_size": [3, 16, 16]}
    kept = comparable_dense({"dense": DENSE, "slim": slim, "setup": SETUP})
    assert kept == {"params_m": 2.0, "input_size": [3, 8, 8]}


def test_controls_of_other_images_are_not_shown() -> None:
    rows = [{"name": "random", "top1_pct": 50.0, "images_id": "a"}, {"name": "old", "top1_pct": 51.0}]
    record = {"slim": {"images_id": "a"}, "setup": {"controls": rows}}
    assert [row["name"] for row in comparable_controls(record)] == ["random"]
    assert not comparable_controls({"slim": {"images_id": "b"}, "setup": {"controls": rows}})
    assert [row["name"] for row in comparable_controls({"slim": {}, "setup": {"controls": rows}})] == ["old"]
    assert not comparable_controls({"slim": {}, "setup": {"controls": rows, "val_split": None}})


def test_images_are_known_by_their_pixels_and_labels_in_any_order() -> None:
    images, labels = torch.randn(20, 3, 4, 4), torch.arange(20) % 3
    order = torch.randperm(20)
    known = images_id(image_keys(images, labels))
    assert known == images_id(image_keys(images[order], labels[order]))
    assert known == images_id(torch.cat([image_keys(images[:7], labels[:7]), image_keys(images[7:], labels[7:])]))
    other = images.clone()
    other[3, 0, 0, 0] = torch.nextafter(other[3, 0, 0, 0], torch.tensor(9.0))
    swapped = torch.cat([images[1:2], images[:1], images[2:]])
    for different in ((other, labels), (images, (labels + 1) % 3), (images[:19], labels[:19]), (swapped, labels)):
        assert images_id(image_keys(*different)) != known
    for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool):
        assert len(image_keys(images.to(dtype), None)) == 20


def test_measure_notes_occasion_images_and_weights() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    data = TensorDataset(torch.randn(10, 3, 2, 2), torch.arange(10) % 3)
    first, second = (measure(copy.deepcopy(dense), DataLoader(data, 4), dense=dense, progress=False) for _ in range(2))
    assert first.dense["occasion"] == first.slim["occasion"] != second.slim["occasion"]
    shuffled = evaluate(dense, DataLoader(data, 3, shuffle=True), progress=False)
    assert first.slim["images_id"] == first.dense["images_id"] == second.slim["images_id"] == shuffled["images_id"]
    assert first.setup["dense_id"] == weights_id(copy.deepcopy(dense))
    dense[1].weight.data[0, 0] += 1e-3
    assert weights_id(dense) != first.setup["dense_id"]
    alone = measure(dense, DataLoader(data, 4), progress=False)
    assert (
        alone.dense is None and why_no_dense({"slim": alone.slim, "setup": alone.setup}) == "no dense model was given"
    )


def test_an_occasion_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slim\.occasion=7"):
        Record.from_json('{"dense": null, "slim": {"occasion": 7}}')
    with pytest.raises(ValueError, match=r"setup\.dense_id=7"):
        Record.from_json('{"dense": null, "slim": {}, "setup": {"dense_id": 7}}')
