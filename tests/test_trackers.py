"""Logs of a training: a CSV file that a resumed run goes on with, and Accelerate's own trackers."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import lfrns_cli.options
import lfrns_hub as lfrns
from lfrns_cli.options import check_tracker
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.retrain.trackers import CsvTracker, free_name, logged, tracking


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, tracker: str, name: str, *, resume: bool = False) -> None:
    accelerator = make_accelerator(cpu=True, mixed_precision="no", **tracking(tracker, folder))
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    model, loaders = timm.create_model("cifar_resnet20", num_classes=3), [DataLoader(data, 4, shuffle=True)] * 2
    with logged(accelerator, "out", name, resume=resume) as log:
        options = {"accelerator": accelerator, "progress": False, "tracker": log}
        lfrns.retrain(model, loaders[0], eval_loader=loaders[1], epochs=2, **options)


def test_csv_has_a_row_each_step_and_each_epoch(tmp_path: Path) -> None:
    train(tmp_path / "logs", "csv", "train")
    written = rows(tmp_path / "logs" / "train.csv")
    assert [int(row["step"]) for row in written] == [1, 2, 2, 3, 4, 4]
    steps = [row for row in written if row["loss"]]
    assert len(steps) == 4 and all(float(row["learning_rate"]) > 0 for row in steps)
    epochs = [row for row in written if row["eval_top1_pct"]]
    assert [int(row["step"]) for row in epochs] == [2, 4] and not any(row["loss"] for row in epochs)


def test_a_resumed_csv_has_each_step_once_and_another_training_its_own_file(tmp_path: Path) -> None:
    def log(name: str, *steps: int, **more: float) -> None:
        tracker = CsvTracker(tmp_path)
        tracker.open(name)
        for step in steps:
            tracker.log({"loss": step / 2, **more}, step=step)

    log("train", 1, 2, 3)
    with (tmp_path / "train.csv").open("a") as file:
        file.write("4,1.")  # cut off
    log("train", 3, 4, accuracy=5.0)
    assert [row["step"] for row in rows(tmp_path / "train.csv")] == ["1", "2", "3", "4"]
    assert [row["accuracy"] for row in rows(tmp_path / "train.csv")] == ["", "", "5.0", "5.0"]
    assert free_name(tmp_path, "train") == "train-2" and free_name(tmp_path, "retrain") == "retrain"
    log("train-2", 1)
    assert free_name(tmp_path, "train") == "train-3"
    log("train", 1)
    assert [row["step"] for row in rows(tmp_path / "train.csv")] == ["1"]


def test_one_csv_tracker_logs_several_trainings(tmp_path: Path) -> None:
    accelerator = make_accelerator(cpu=True, **tracking("csv", tmp_path))
    for name, value in (("a", 1.0), ("b.lfrns50", 2.0)):
        with logged(accelerator, "out", name, resume=False) as log:
            log({"loss": value}, 1)
    assert [rows(tmp_path / f"{name}.csv") for name in ("a", "b.lfrns50")] == [
        [{"step": "1", "loss": "1.0"}],
        [{"step": "1", "loss": "2.0"}],
    ]


def test_tensorboard_writes_its_events_into_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "logs", "tensorboard", "train")
    events = EventAccumulator(str(tmp_path / "logs" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval_top1_pct")] == [2, 4]
    assert free_name(tmp_path / "logs", "train") == "train-2"


def test_trackio_writes_into_the_folder_and_nothing_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if find_spec("trackio") is None:  # imported, it would have read the variable already
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", "unset afterwards")
    monkeypatch.delenv("TRACKIO_DIR")
    train(tmp_path / "logs", "trackio", "train")
    assert list((tmp_path / "logs").rglob("*out*"))
    assert capsys.readouterr().out == ""


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfrns_cli.options, "find_spec", lambda name: None)
    check_tracker(None)
    check_tracker("csv")
    with pytest.raises(ValueError, match=r"--log-with tensorboard: tensorboard is not installed. Run pip install tens"):
        check_tracker("tensorboard")
    with pytest.raises(ValueError, match=r"--log-with newer: accelerate [0-9.]+ does not know it. pip install"):
        tracking("newer", tmp_path)
