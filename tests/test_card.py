"""The card and the picture: every number is the record's, and what is missing says so."""

import re

import pytest
import yaml
from matplotlib.image import imread

from lfrns_hub.card import render_card
from lfrns_hub.plots import plot_widths

RECORD = {
    "dense": {
        "top1_pct": 97.613,
        "images": 500,
        "params_m": 0.1407,
        "macs_g": 4.1,
        "flops_g": 8.2,
        "latency_ms": 12.34,
        "size_mb": 0.61,
    },
    "slim": {
        "top1_pct": 96.987,
        "images": 500,
        "params_m": 0.0719,
        "macs_g": 0.00142,
        "flops_g": 0.00284,
        "latency_ms": None,
        "size_mb": 0.32,
        "agreement_pct": 98.61,
        "worst_class": {"class": 1, "dense_pct": 98.0, "slim_pct": 93.5, "drop_points": 4.5},
    },
    "setup": {
        "machine": {"cpu": "a CPU", "threads": 2},
        "dtype": "float32",
        "input_size": [3, 8, 8],
        "versions": {"torch": "2.14.1"},
        "label_names": ["zero", "one"],
        "dataset": "digits",
        "seed": 7,
        "commit": "abc1234",
        "controls": [{"name": "random plan", "top1_pct": 91.25, "images": 500}],
        "provenance": {
            "widths": {"blocks.0.mlp": [48, 128], "blocks.0.attn": [3, 4]},
            "kinds": {"blocks.0.mlp": "neuron", "blocks.0.attn": "head"},
            "budget": {"macs": 0.5},
            "fcr_steps": 100,
            "calibration_images": 1297,
            "preset": "ours",
        },
    },
}


def table_row(card: str, name: str) -> list[str]:
    """Read one row of the card's tables."""
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", card, re.M)
    return [cell.strip() for cell in line.split("|")]


def header(card: str) -> dict:
    """Read the YAML header."""
    return yaml.safe_load(card.split("---")[1])


def test_every_number_is_the_records():
    card = render_card(RECORD, model_name="vit.lfrns50", base="ViT", library="transformers", plot="widths.png")
    assert table_row(card, "Top-1") == ["97.61 %", "96.99 %"]
    assert table_row(card, "Images tested") == ["500", "500"]
    assert table_row(card, "Agreement with dense") == ["", "98.61 %"]
    assert table_row(card, "Parameters") == ["0.141 M", "0.072 M"]
    assert table_row(card, "Compute") == ["8.2 GFLOPs = 4.1 GMACs", "0.00284 GFLOPs = 0.00142 GMACs"]
    assert table_row(card, "Latency, batch 1") == ["12.34 ms", "not measured"]
    assert table_row(card, "random plan") == ["91.25 %", "500"]
    assert table_row(card, "blocks.0.mlp") == ["neuron", "128", "48"]
    assert table_row(card, "Budget asked for") == ["0.5 of the dense macs"]
    assert table_row(card, "Seed") == ["7"]
    assert "one, 98.00 % dense, 93.50 % slim: 4.50 points lost" in card
    assert "input size 3x8x8" in card and "torch 2.14.1" in card
    assert "![" in card and "(widths.png)" in card


def test_the_header_is_what_the_hub_reads():
    meta = header(render_card(RECORD, model_name="net", base="resnet18"))
    assert {"pruned", "structured-pruning", "lfrns"} <= set(meta["tags"])
    assert meta["pipeline_tag"] == "image-classification" and meta["library_name"] == "timm"
    (result,) = meta["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 96.99
    assert "base_model" not in meta and meta["license"] == "unknown"
    known = {**RECORD, "setup": {**RECORD["setup"], "base_model": "timm/resnet18.a1_in1k", "license": "apache-2.0"}}
    meta = header(render_card(known, model_name="net", base="resnet18"))
    assert (meta["base_model"], meta["base_model_relation"]) == ("timm/resnet18.a1_in1k", "finetune")
    assert meta["license"] == "apache-2.0"


def test_without_a_record_nothing_is_guessed():
    card = render_card(None, model_name="net", base="resnet18")
    for name in ("Top-1", "Images tested", "Parameters", "Compute", "Latency, batch 1", "File"):
        assert table_row(card, name) == ["not measured", "not measured"]
    for name in ("Base model", "Licence of the base", "Data", "Seed", "Budget asked for"):
        assert table_row(card, name) == ["unknown"]
    assert "Class that lost most: not measured" in card
    assert "model-index" not in header(card)


@pytest.mark.parametrize("groups", [1, 24, 200])
def test_the_picture_has_a_readable_size(groups, tmp_path):
    widths = {f"blocks.{i}.mlp.with.a.name.as.long.as.they.come": [i % 7 + 1, 8] for i in range(groups)}
    picture = imread(plot_widths({"widths": widths, "kinds": dict.fromkeys(widths, "neuron")}, tmp_path / "w.png"))
    height, width, _ = picture.shape
    assert 600 <= width <= 1200 and 150 <= height <= 2000


def test_a_bar_is_as_long_as_the_share_kept(tmp_path):
    picture = imread(plot_widths({"a": [1, 4]}, tmp_path / "w.png"))[..., :3]
    row = picture[picture.shape[0] // 2]
    kept = (abs(row - 0.4) < 0.01).all(1).sum()
    removed = (abs(row - 0xE3 / 255) < 0.01).all(1).sum()
    assert kept / (kept + removed) == pytest.approx(0.25, abs=0.02)


def test_a_record_without_widths_gives_no_picture(tmp_path):
    with pytest.raises(ValueError, match="holds no widths"):
        plot_widths({"setup": {}}, tmp_path / "w.png")
    assert not (tmp_path / "w.png").exists()
