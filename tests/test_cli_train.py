"""`lfrns train`: a dense model of one's own images, which its library opens alone and `lfrns slim` takes."""

import csv
import json
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from children import end, start
from huggingface_hub import ModelCard
from PIL import Image
from test_cli_make import run
from test_cli_resume import run_lfrns
from timm.data import resolve_model_data_config
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub.cli.dense_again import find_dense
from lfrns_hub.zoo import create_dense, input_size_of, make_transform

TRAIN = ["--data", "images", "--val-split", "0.25", "--batch-size", "16", "--epochs", "2", "--mixed-precision", "no"]
NAMES = ["blue", "green", "red"]
BUILDER = """
import timm
import torch


class Mine(torch.nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.body, self.head = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.body(x).relu().mean((2, 3)))


def build(num_classes=7):
    return Mine(num_classes)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of three colours, and weights of a model of ten classes, as the working folder."""
    draw = np.random.default_rng(0)
    for i in range(96):
        path = tmp_path / "images" / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (draw.random((32, 32, 3)) * 90).astype("uint8")
        pixels[..., 2 - i % 3] += 120
        Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    torch.save(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "ten.pth")
    (tmp_path / "mine_net.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LFRNS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple[str, str]:
    """Run `lfrns WORDS` in this process; gives what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out, err


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Run `lfrns WORDS`, which fails; gives its one line."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def following(out: str) -> list[str]:
    """Return the command that a run names as the next, with less work."""
    (line,) = (line for line in out.splitlines() if line.startswith("Next: "))
    program, *words = shlex.split(line.removeprefix("Next: "))
    assert program == "lfrns"
    return [*words, "--epochs", "1", "--fcr-steps", "0", "--batch-size", "16"]


def test_a_timm_model_gets_a_head_of_the_data_and_its_next_command_slims_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["train", "cifar_resnet20", "--weights", "ten.pth", *TRAIN, "--img-size", "40", "--learning-rate", "0.05"]
    out, err = shown(monkeypatch, capsys, *words, "--out", "dense", "--log-with", "csv")
    first, *lines = err.splitlines()
    assert first == "A new head of 3 classes (blue, green, red): cifar_resnet20 has others."
    assert [line.split()[0] for line in lines] == ["epoch", "epoch", "train", "evaluate"]
    model = timm.create_model("local-dir:dense", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == NAMES and model.num_classes == 3
    assert list(resolve_model_data_config(model)["input_size"]) == [3, 40, 40]
    dense = create_dense("dense")
    assert make_transform(dense, train=False).size == (40, 40)
    record = json.loads((place / "dense" / "record.json").read_text())
    assert record["dense"]["top1_pct"] > 80 and record["dense"]["images"] == 24
    assert record["setup"]["label_names"] == NAMES and record["setup"]["epochs"] == 2
    assert f"{record['dense']['top1_pct']:.2f}" in out
    card = ModelCard.load("dense/README.md")
    assert card.data.library_name == "timm" and f"Top-1 {record['dense']['top1_pct']:.2f} % of 24 images" in card.text
    with open("dense/logs/train.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["step"] for row in written if row["loss"]] == [str(step) for step in range(1, 11)]
    accuracies = [float(row["eval_top1_pct"]) for row in written if row["eval_top1_pct"]]
    assert len(accuracies) == 2 and accuracies[-1] == record["dense"]["top1_pct"]

    monkeypatch.setenv("COLUMNS", "200")
    out, err = shown(monkeypatch, capsys, *following(out), "--log-with", "csv")
    assert [path.name for path in (place / "dense-slim" / "logs").iterdir()] == ["retrain.csv"]
    slim = lfrns.load("dense-slim")
    assert input_size_of(slim) == (3, 40, 40) and make_transform(slim, train=False).size == (40, 40)
    assert json.loads((place / "dense-slim" / "config.json").read_text())["label_names"] == NAMES
    stated = json.loads((place / "dense-slim" / "record.json").read_text())
    assert stated["dense"]["top1_pct"] == record["dense"]["top1_pct"]
    assert find_dense("dense-slim", stated["setup"], slim)[0] is not None
    shown(monkeypatch, capsys, "retrain", "dense-slim", *TRAIN, "--log-with", "csv", "--quiet")
    assert sorted(path.name for path in (place / "dense-slim" / "logs").iterdir()) == ["retrain-2.csv", "retrain.csv"]


def test_a_transformers_model_is_trained_at_another_size_and_saved_as_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=3, **small)
    config.id2label = dict(enumerate(["Red", "Blue", "Green"]))
    ViTForImageClassification(config).save_pretrained("vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("vit")
    words = ["train", "vit", *TRAIN, "--img-size", "24", "--learning-rate", "0.01", "--out", "dense"]
    found = run(monkeypatch, capsys, *words)
    assert found["directory"] == "dense" and found["dense"]["input_size"] == [3, 24, 24]
    model = AutoModelForImageClassification.from_pretrained("dense")
    assert type(model) is ViTForImageClassification and model.config.image_size == 24
    assert list(model.config.id2label.values()) == ["Red", "Blue", "Green"]  # its head stays, and so do its names
    assert AutoImageProcessor.from_pretrained("dense").size["height"] == 24
    run(monkeypatch, capsys, "slim", "dense", *TRAIN, "--macs", "0.8", "--fcr-steps", "0", "--out", "slim")
    slim = lfrns.load("slim")
    assert slim.config.image_size == 24 and make_transform(slim, train=False).size == (24, 24)
    again = run(monkeypatch, capsys, "evaluate", "slim", *TRAIN[:6], "--dense", "vit", "--weights", "dense")
    assert again["dense"]["top1_pct"] == found["dense"]["top1_pct"]
    answers = run(monkeypatch, capsys, "predict", "slim", "images/red/2.png")
    assert {answer["name"] for answer in answers["photos"][0]["answers"]} == {"Red", "Blue", "Green"}


def test_a_class_of_ones_own_leaves_weights_and_the_command_that_builds_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prepared = ["--img-size", "32", "--mean", "0.5", "0.5", "0.5", "--no-flip"]
    words = ["train", "mine_net:build", *TRAIN, *prepared, "--learning-rate", "0.05", "--out", "dense", "--quiet"]
    out, _ = shown(monkeypatch, capsys, *words)
    assert sorted(path.name for path in (place / "dense").iterdir()) == [
        "README.md",
        "model.safetensors",
        "record.json",
        "work",
    ]
    again = following(out)
    assert again[1:4] == ["mine_net:build", "--weights", "dense/model.safetensors"]
    assert "--no-flip" in again and again[again.index("--mean") + 1] == "0.5"
    shown(monkeypatch, capsys, *again, "--quiet")
    assert json.loads((place / "dense-slim" / "record.json").read_text())["dense"]["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_equal_weights_and_is_then_shown_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = place / "log"
    train = f"train cifar_resnet20 --weights ten.pth {shlex.join(TRAIN)} --quiet".replace("--epochs 2", "--epochs 6")
    assert end(start(run_lfrns, place, f"{train} --out whole --log-with csv", log)) == [0], log.read_text()
    expected = (place / "whole" / "model.safetensors").read_bytes()
    (child,) = start(run_lfrns, place, f"{train} --out out --log-with csv", log)
    while not list((place / "out" / "work").glob("train/step_*")) and child.is_alive():
        time.sleep(0.01)
    child.kill()
    end([child])
    if not (place / "out" / "work" / "finished").is_file():
        assert end(start(run_lfrns, place, f"{train} --out out", log)) == [1]
        assert "--out out: is not empty. Pass --resume" in log.read_text()
    assert end(start(run_lfrns, place, f"{train} --out out --resume --log-with csv", log)) == [0], log.read_text()
    assert (place / "out" / "model.safetensors").read_bytes() == expected
    logs = [(place / name / "logs" / "train.csv").read_text() for name in ("whole", "out")]
    assert [row["loss"] for row in csv.DictReader(logs[0].splitlines())] == [
        row["loss"] for row in csv.DictReader(logs[1].splitlines())
    ]
    assert sorted(path.name for path in (place / "out" / "work").iterdir()) == ["finished"]
    before = (place / "out" / "model.safetensors").stat().st_mtime_ns
    assert end(start(run_lfrns, place, f"{train} --out out --resume", log)) == [0], log.read_text()
    assert "Next: lfrns slim out" in log.read_text()
    assert (place / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert end(start(run_lfrns, place, f"{train} --out out --resume --seed 3", log)) == [1]
    assert "has ended, and had other options" in log.read_text()
    assert end(start(run_lfrns, place, f"{train} --out out --overwrite --seed 3", log)) == [0], log.read_text()
    assert (place / "out" / "model.safetensors").read_bytes() != expected
    assert sorted(path.name for path in (place / "out" / "logs").iterdir()) == ["train.csv"]


def test_what_does_not_fit_is_refused_and_leaves_what_was_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["cifar_resnet20", "--weights", "ten.pth", *TRAIN, "--quiet"]
    lfrns.save(timm.create_model("cifar_resnet20"), "slim")
    line = refused(monkeypatch, capsys, "train", "slim", *TRAIN, "--out", "dense")
    assert line == "ValueError: lfrns train slim: it is slim already. Train it further by lfrns retrain."
    os.mkdir("thesis")
    Path("thesis", "config.json").write_text("{}")
    line = refused(monkeypatch, capsys, "train", *words, "--out", "thesis", "--overwrite")
    assert "holds no checkpoint or run of lfrns_hub" in line
    torch.save(timm.create_model("test_vit").state_dict(), "ten.pth")
    words[0] = "test_vit"
    line = refused(monkeypatch, capsys, "train", *words, "--out", "dense", "--img-size", "97")
    assert "VisionTransformer cannot be used at 97 x 97 pixels" in line
    line = refused(monkeypatch, capsys, "units", "slim", "--img-size", "64")
    assert line == "ValueError: --img-size 64: slim is slim, and of the size that it states. Leave it out."
    assert sorted(path.name for path in place.iterdir()) == ["images", "mine_net.py", "slim", "ten.pth", "thesis"]
    with pytest.raises(ValueError, match=r"save\(CifarResNet, stock=True\): it was cut"):
        cut = lfrns.slim(timm.create_model("cifar_resnet20"), [torch.randn(8, 3, 32, 32)], macs=0.9, fcr_steps=0)
        lfrns.save(cut.model, "stock", stock=True)


def test_a_trained_model_that_cannot_be_measured_stays_and_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the clock stopped")

    words = ["train", "cifar_resnet20", "--weights", "ten.pth", *TRAIN, "--quiet", "--out", "dense"]
    with monkeypatch.context() as patch:
        patch.setattr(lfrns, "measure", fail)
        out, err = shown(patch, capsys, *words, "--overwrite")
    assert out == "" and "Warning: RuntimeError: the clock stopped" in err
    weights = (place / "dense" / "model.safetensors").read_bytes()
    again = shlex.split(err.splitlines()[-1])
    assert again == ["lfrns", *words, "--resume"]
    shown(monkeypatch, capsys, *again[1:])
    assert (place / "dense" / "record.json").is_file()
    assert (place / "dense" / "model.safetensors").read_bytes() == weights
