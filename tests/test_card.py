"""The card and the picture: every number is the record's, and what is missing says so."""

import re

import pytest
import yaml
from hub_server import hub
from huggingface_hub import ModelCard, metadata_load
from matplotlib.image import imread
from PIL import Image
from test_checkpoint import slim_resnet, slim_transformers
from test_hub import run_client

from lfrns_hub import checkpoint
from lfrns_hub.hub.card import _with_prefix, render_card
from lfrns_hub.plots import plot_widths

__all__ = ["hub"]

RECORD = {
    "dense": {
        "occasion": "one",
        "top1_pct": 97.613,
        "images": 500,
        "params_m": 0.1407,
        "macs_g": 4.1,
        "flops_g": 8.2,
        "latency_ms": 12.34,
        "size_mb": 0.61,
    },
    "slim": {
        "occasion": "one",
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
        "epochs": 1,
        "commit": "abc1234",
        "controls": [{"name": "random plan", "top1_pct": 91.25, "images": 500}],
        "provenance": {
            "widths": {"blocks.0.mlp": [48, 128], "blocks.0.attn": [3, 4]},
            "kinds": {"blocks.0.mlp": "neuron", "blocks.0.attn": "head"},
            "budget": {"macs": 0.5},
            "fcr_steps": 100,
            "calibration_images": 1297,
            "preset": "ours",
            "report": {"redundant": 70, "weak": 11, "restored": 9, "integrity": {"blocks.0.mlp": 0.9123}},
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


def facts(card: str) -> dict[str, str]:
    """Read the list of how it was made."""
    return dict(re.findall(r"^- \*\*(.+?):\*\* (.*)$", card, re.M))


def changed(**setup) -> dict:
    """The record with other entries in its setup."""
    return {**RECORD, "setup": {**RECORD["setup"], **setup}}


def test_every_number_is_the_records():
    card = render_card(RECORD, model_name="vit.lfrns50", base="ViT", library="transformers", plot="widths.png")
    assert table_row(card, "Top-1") == ["97.61 %", "96.99 %", "-0.63 points"]
    assert table_row(card, "Class that lost most: one") == ["98.00 %", "93.50 %", "-4.50 points"]
    assert table_row(card, "Images tested") == ["500", "500", ""]
    assert table_row(card, "Agreement with dense") == ["", "98.61 %", ""]
    assert table_row(card, "Parameters") == ["141 k", "71.9 k", "0.511"]
    assert table_row(card, "FLOPs") == ["8.20 G", "2.84 M", "0.000"]
    assert table_row(card, "MACs") == ["4.10 G", "1.42 M", "0.000"]
    assert table_row(card, "Weights on disk") == ["0.61 MB", "0.32 MB", "0.525"]
    assert table_row(card, "Latency, batch 1") == ["12.34 ms", "not measured", ""]
    assert table_row(card, "random plan") == ["91.25 %", "500"]
    assert table_row(card, "`blocks.0.mlp`") == ["neuron", "128", "48", "0.912"]
    assert table_row(card, "`blocks.0.attn`") == ["head", "4", "3", "not measured"]
    assert "on a CPU, 2 threads, float32, input 3x8x8." in card
    assert "81 of 132 units in 2 groups. 70 were redundant: kept units explain them. 11 were weak" in card
    assert "9 more were marked for removal and restored" in card
    assert "ViT with fewer attention heads and MLP neurons than its dense model: 0.000 of the MACs, 0.511 of" in card
    assert "a top-1 of 96.99 % on digits (dense: 97.61 %)" in card
    assert "![" in card and "(widths.png)" in card
    made = facts(card)
    assert (made["Budget"], made["Seed"], made["Commit"]) == ("at most 0.5 of the dense MACs", "7", "abc1234")
    assert (made["Calibration"], made["FCR"], made["Retraining"]) == ("1,297 images", "100 steps", "1 epoch")
    assert (made["Classes"], made["Versions"]) == ("2: zero, one", "torch 2.14.1")
    assert "Dense model" not in made  # the record does not say that it was trained
    here = render_card(changed(dense_epochs=25), model_name="net", base="ViT")
    assert facts(here)["Dense model"] == "trained for 25 epochs in the same run"


def test_the_header_is_what_the_hub_reads(tmp_path):
    known = changed(base_model="timm/resnet18.a1_in1k", license="apache-2.0", dataset_id="mnist")
    (tmp_path / "README.md").write_text(render_card(known, model_name="net", base="resnet18"))
    card = ModelCard.load(tmp_path / "README.md")
    meta = card.data.to_dict()
    assert meta == metadata_load(tmp_path / "README.md")
    assert {"image-classification", "pruned", "structured-pruning", "lfrns"} == set(meta["tags"])
    assert meta["pipeline_tag"] == "image-classification" and meta["library_name"] == "timm"
    assert (meta["base_model"], meta["base_model_relation"]) == ("timm/resnet18.a1_in1k", "finetune")
    assert (meta["license"], meta["datasets"], meta["metrics"]) == ("apache-2.0", ["mnist"], ["accuracy"])
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("mnist", "digits")
    assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "top-1, %", 96.99)


def test_a_private_base_reads_unknown():
    card = render_card(RECORD, model_name="net", base="resnet18")
    meta = header(card)
    assert "base_model" not in meta and "base_model_relation" not in meta and meta["license"] == "unknown"
    assert facts(card)["Base model"] == facts(card)["Licence of the base"] == "unknown"


def test_a_licence_that_the_hub_does_not_know_is_named_and_linked():
    licence = {"license": "other", "license_name": "owl-1", "license_link": "https://owl.example/1"}
    card = render_card(changed(**licence), model_name="net", base="resnet18")
    assert header(card).items() >= licence.items()
    assert facts(card)["Licence of the base"] == "[owl-1](https://owl.example/1)"
    provenance = {**RECORD["setup"]["provenance"], **licence}
    assert "license_name" not in header(
        render_card(changed(license="mit", provenance=provenance), model_name="net", base="resnet18")
    )


def test_without_a_record_nothing_is_guessed():
    card = render_card(None, model_name="net", base="resnet18")
    for name in ("Top-1", "Class that lost most", "Images tested", "Parameters", "FLOPs", "MACs", "Latency, batch 1"):
        assert table_row(card, name) == ["not measured", "not measured", ""]
    assert set(facts(card).values()) == {"unknown"}
    assert "Its accuracy was not measured" in card
    assert "resnet18 with fewer units than its dense model. LFRNS" in card
    assert "model-index" not in header(card)


def test_a_model_of_features_is_shown_as_one():
    record = {"dense": {"images": 64}, "slim": {"images": 64, "explained_pct": 91.5, "top1_pct": None}, "setup": {}}
    card = render_card(record, model_name="net", base="dinov2")
    assert header(card)["pipeline_tag"] == "image-feature-extraction" and "metrics" not in header(card)
    assert table_row(card, "Variance of the dense features explained") == ["", "91.50 %", ""]
    assert "Top-1" not in card


def test_a_smoke_run_and_an_approximate_cut_are_called_so():
    provenance = {**RECORD["setup"]["provenance"], "approximate": ["blocks.0.mlp"]}
    card = render_card(changed(smoke=True, provenance=provenance), model_name="net", base="ViT")
    assert "its figures say nothing about the method" in card
    assert table_row(card, "`blocks.0.mlp`")[0] == "neuron, approximate"
    assert "no check proves such a cut" in card
    assert "smoke" not in render_card(RECORD, model_name="net", base="ViT")


def test_a_bar_in_a_class_name_stays_in_its_cell():
    card = render_card(changed(label_names=["a", "b|c"]), model_name="net", base="ViT")
    assert r"| Class that lost most: b\|c | 98.00 % | 93.50 % |" in card


def test_budgets_that_were_pushed_are_linked_and_nothing_else_is():
    budgets = [
        {"macs_fraction": 0.75, "top1_pct": 97.2, "occasion": "one", "name": "a", "pushed": "user/net.lfrns75"},
        {"macs_fraction": 0.5, "top1_pct": 96.99, "occasion": "one", "name": "b", "pushed": "https://evil.example/x"},
        {"macs_fraction": 0.25, "top1_pct": 90.0, "occasion": "one", "name": "c", "pushed": "../net"},
    ]
    card = render_card(changed(budgets=budgets), model_name="net", base="ViT")
    assert "| [0.750](https://huggingface.co/user/net.lfrns75) | 97.20 % | not measured |" in card
    assert table_row(card, "0.500") and table_row(card, "0.250") and "evil" not in card and "../net" not in card


def test_several_budgets_come_with_their_picture():
    budgets = [
        {"macs_fraction": 0.75, "top1_pct": 97.2, "latency_ms": 9.0, "occasion": "one"},
        {"macs_fraction": 0.5, "top1_pct": 96.99, "occasion": "one"},
        {"macs_fraction": 0.25, "top1_pct": 90.0, "latency_ms": 7.0, "occasion": "another"},
        {"macs_fraction": 0.125, "top1_pct": 80.0, "latency_ms": 6.0},
    ]
    record = changed(budgets=budgets)
    card = render_card(record, model_name="net", base="ViT", curve="curve.png")
    assert table_row(card, "0.750") == ["97.20 %", "9.00 ms"]
    assert "| 0.250 |" not in card and "| 0.125 |" not in card
    assert table_row(card, "0.500") == ["96.99 %", "not measured"]
    assert "(curve.png)" in card


def test_a_folder_has_the_pictures_that_its_card_shows(tmp_path):
    budgets = [{"macs_fraction": share, "top1_pct": 97.0, "occasion": "one"} for share in (0.75, 0.5)]
    for found in ([], budgets[:1], budgets):
        checkpoint.save(slim_resnet(), tmp_path / "net", record=changed(budgets=found), overwrite=True)
        card = (tmp_path / "net" / "README.md").read_text(encoding="utf-8")
        assert ("(curve.png)" in card) == (tmp_path / "net" / "curve.png").is_file() == (len(found) > 1)
        assert "trust_remote_code=True" in card


@pytest.mark.parametrize(("value", "shown"), [(999, "999"), (1e3, "1.00 k"), (25.557e6, "25.6 M"), (4.089e9, "4.09 G")])
def test_counts_have_three_digits(value, shown):
    assert _with_prefix(value, 1.0) == shown


# Pushes folders to the Hub of the environment, and runs the Python blocks of their cards there, each for itself.
RUN_CARDS = """
import re, sys, torch
from huggingface_hub import ModelCard
from lfrns_hub.hub import push

for folder, size in zip(sys.argv[1::2], sys.argv[2::2]):
    push(folder, repo := "user/" + folder.rpartition("/")[2])
    logits = []
    for code in re.findall(r"```python\\n(.*?)```", ModelCard.load(repo).text, re.S):
        names = {}
        exec(compile(code, "README.md", "exec"), names)
        with torch.no_grad():
            answer = names["model"].eval()(torch.ones(1, 3, *map(int, size.split("x"))))
        logits.append(answer.logits if hasattr(answer, "logits") else answer)
        if "classify" in names:
            print(sorted(row["label"] for row in names["classify"]("picture.png", top_k=2)))
    assert all(torch.allclose(logits[0], other, atol=1e-5) for other in logits)
    print(len(logits))
"""


def test_the_snippets_of_a_card_run_as_they_stand(hub, tmp_path, monkeypatch):
    names = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
    net, vit = tmp_path / "net.lfrns50", tmp_path / "vit"
    checkpoint.save(slim_resnet(), net, label_names=names)
    checkpoint.save(slim_transformers("vit"), vit)
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    done = run_client(hub.env, RUN_CARDS, net, "64x64", vit, "32x32")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["4", "3"]


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
