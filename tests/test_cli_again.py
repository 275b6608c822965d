"""A checkpoint measured or trained again: beside its own dense model where it is found, else alone, and saved first."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.utils.data import DataLoader

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub.cli.checkpoints import dense_beside
from lfrns_hub.cli.dense_again import find_dense, remember_dense
from lfrns_hub.cli.saving import train_each
from lfrns_hub.latency import cache_directory
from lfrns_hub.measure import Record, measure
from lfrns_hub.recipe import random_cut
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.units import SlimPlan
from lfrns_hub.zoo import create_dense, example_input, load_data, make_transform


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights, pictures of ten classes, and a checkpoint that was measured beside the dense model."""
    root = tmp_path_factory.mktemp("again")
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in "abcdefghij":
            (root / "data" / split / name).mkdir(parents=True)
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / split / name / "0.png")
    torch.manual_seed(0)
    dense = create_dense("cifar_resnet20")
    safetensors.torch.save_model(dense, str(root / "dense.safetensors"))
    dense = create_dense("cifar_resnet20", weights=root / "dense.safetensors")
    groups = lfrns.find_units(dense, example_input(dense))
    plan = SlimPlan({"layer1.0.conv1": list(range(8))})
    slim = random_cut(dense, plan, groups, 0).eval()
    transform = make_transform(dense, train=False)
    loader = DataLoader(load_data(root / "data", "validation", transform=transform, model=dense), 10)
    record = measure(slim, loader, dense=dense, progress=False)
    rows = [{"name": "random plan", "top1_pct": 5.0, "images": 10, "images_id": record.slim["images_id"]}]
    record.setup |= {"epochs": 1, "controls": rows, "dataset_id": "user/other", "budgets": [
        {"macs_fraction": 0.9, "top1_pct": 6.0, "latency_ms": 1.0, "occasion": record.slim["occasion"]}
    ]}  # fmt: skip
    lfrns.save(slim, root / "slim", record=record, label_names=list("abcdefghij"))
    return root


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkpoint, and a cache of its own."""
    monkeypatch.setenv("LFRNS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made / "slim", tmp_path / "slim")
    return tmp_path / "slim"


def run(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> tuple[dict, str]:
    """Run `lfrns ARGUMENTS --json`; gives what stands on stdout, parsed, and stderr."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return json.loads(printed.out or "null"), printed.err


@pytest.mark.parametrize("command", ["evaluate", "retrain"])
def test_without_its_dense_model_a_checkpoint_stands_alone(
    command: str, at: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    before = Record.load(at / "record.json")
    options = ["--epochs", "1", "--no-flip"] if command == "retrain" else []
    found, _ = run(monkeypatch, capsys, command, str(at), "--data", str(made / "data"), *options)
    dense = found["dense"]
    assert dense["top1_pct"] is dense["latency_ms"] is None
    assert (dense["macs_g"], dense["params_m"]) == (before.dense["macs_g"], before.dense["params_m"])
    assert "agreement_pct" not in found["slim"]
    assert "was not found again on this machine. Name it by --dense" in found["setup"]["dense_missing"]
    assert "budgets" not in found["setup"]
    assert found["setup"]["dataset_id"] is None and found["setup"]["dataset"] == "data"
    assert found["setup"]["epochs"] == (2 if command == "retrain" else 1)
    # The same images, and weights that a control was trained as long as: then it still compares.
    assert ("controls" in found["setup"]) == (command == "evaluate")
    card = (at / "README.md").read_text()
    assert "in turns" not in card and "points" not in card and "was not found again" in card
    (latency,) = [line for line in card.splitlines() if line.startswith("| Latency")]
    assert latency.split("|")[2].strip() == "not measured" and latency.split("|")[4].strip() == ""


@pytest.mark.parametrize("way", ["named", "noted", "trained beside it"])
def test_the_dense_model_is_found_again_and_measured_side_by_side(
    way: str, at: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = []
    if way == "named":
        options = ["--dense", "cifar_resnet20", "--weights", str(made / "dense.safetensors")]
    elif way == "noted":
        dense = create_dense("cifar_resnet20", weights=made / "dense.safetensors")
        remember_dense(dense, "cifar_resnet20", str(made / "dense.safetensors"))
    else:
        (at / "work").mkdir()
        shutil.copy(made / "dense.safetensors", at / "work" / "dense.safetensors")
    before = Record.load(at / "record.json")
    found, _ = run(monkeypatch, capsys, "evaluate", str(at), "--data", str(made / "data"), *options)
    assert found["dense"]["occasion"] == found["slim"]["occasion"] != before.slim["occasion"]
    assert found["dense"]["top1_pct"] == before.dense["top1_pct"] and found["slim"]["agreement_pct"] is not None
    assert "dense_missing" not in found["setup"]
    assert "in turns" in (at / "README.md").read_text()
    assert str(made) not in (at / "record.json").read_text() + (at / "README.md").read_text()


def test_other_weights_under_the_same_name_are_not_the_dense_model(at: Path, made: Path) -> None:
    wanted = Record.load(at / "record.json").setup
    torch.manual_seed(1)
    (at / "work").mkdir()
    safetensors.torch.save_model(create_dense("cifar_resnet20"), str(at / "work" / "dense.safetensors"))
    dense, why = find_dense(str(at), wanted, lfrns.load(at))
    assert dense is None and "not found again" in why
    dense, why = find_dense(str(at), {}, lfrns.load(at))
    assert dense is None and "does not say which weights" in why


@pytest.mark.parametrize("damaged", ["{", "[]", "{}", '{"model": "cifar_resnet20"}'])
def test_a_damaged_note_of_where_the_dense_model_was_is_passed_over(damaged: str, at: Path, made: Path) -> None:
    wanted = Record.load(at / "record.json").setup
    remember_dense(create_dense("cifar_resnet20", weights=made / "dense.safetensors"), "cifar_resnet20", None)
    (note,) = (cache_directory() / "dense").glob(f"{wanted['dense_id']}.json")
    note.write_text(damaged)
    dense, why = find_dense(str(at), wanted, lfrns.load(at))
    assert dense is None and "not found again" in why


def test_a_named_dense_model_of_other_weights_is_told_of(at: Path, made: Path, capsys) -> None:
    dense_beside(str(at), lfrns.load(at), "cifar_resnet20", str(made / "dense.safetensors"))
    assert not capsys.readouterr().err
    dense_beside(str(at), lfrns.load(at), "cifar_resnet20", None)
    assert "Warning: cifar_resnet20 has other weights than the dense model" in capsys.readouterr().err


def test_what_was_trained_is_saved_though_it_cannot_be_measured(
    at: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the meter broke")

    before = lfrns.load(at).state_dict()
    monkeypatch.setattr("lfrns_hub.measure", broken)
    options = ["--data", str(made / "data"), "--epochs", "1", "--no-flip"]
    found, said = run(monkeypatch, capsys, "retrain", str(at), *options)
    assert found is None
    assert "Warning: RuntimeError: the meter broke" in said
    assert f"saved in {at}" in said and f"lfrns evaluate {at} --data" in said
    after = lfrns.load(at).state_dict()
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())
    record = Record.load(at / "record.json")
    assert record.dense is None and record.slim == {} and record.setup["epochs"] == 2
    assert "not measured" in (at / "README.md").read_text()


def test_what_cannot_be_saved_is_known_before_it_is_trained(
    at: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("save(): it cannot")

    monkeypatch.setattr("lfrns_hub.cli.saving.prepared", refuse)
    monkeypatch.setattr("lfrns_hub.retrain", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(sys, "argv", ["lfrns", "retrain", str(at), "--data", str(made / "data")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "it cannot" in capsys.readouterr().err


def test_one_budget_that_fails_takes_none_of_the_others(tmp_path: Path, capsys) -> None:
    models = {tmp_path / name: create_dense("cifar_resnet20") for name in ("a", "b", "c")}

    def train(folder: Path, model: torch.nn.Module) -> None:
        if model is models[tmp_path / "b"]:
            raise FloatingPointError("the loss is nan")
        model.linear.bias.data.fill_(3.0)

    failed = train_each(models, train, {"overwrite": True}, make_accelerator())
    assert failed == {tmp_path / "b": "FloatingPointError: the loss is nan"}
    assert f"Warning: {tmp_path / 'b'} was not made. FloatingPointError: the loss is nan" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    assert float(lfrns.load(tmp_path / "c").linear.bias.sum()) == 30
    with pytest.raises(FloatingPointError):
        train_each({tmp_path / "b": models[tmp_path / "b"]}, train, {}, make_accelerator())


@pytest.mark.parametrize("named", ["antigravity:geohash", "os:getcwd", "tests.x:build", 3, "../elsewhere"])
def test_a_record_names_no_function_that_would_be_run(named: object, at: Path, monkeypatch) -> None:
    monkeypatch.setattr("lfrns_hub.cli.dense_again.create_dense", lambda name: pytest.fail(f"{name} was built"))
    dense, why = find_dense(str(at), {"dense_id": "0" * 32, "base_model": named}, lfrns.load(at))
    assert dense is None and "not found again" in why
    assert find_dense(str(at), {"dense_id": "../" * 99}, lfrns.load(at))[0] is None


@pytest.mark.parametrize("command", ["evaluate", "retrain"])
def test_folders_that_are_not_the_models_classes_are_refused_before_anything_runs(
    command: str, at: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    for split in ("train", "validation"):
        (tmp_path / "data" / split / "a").rename(tmp_path / "data" / split / "other")
    monkeypatch.setattr("lfrns_hub.measure", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("lfrns_hub.retrain", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(sys, "argv", ["lfrns", command, str(at), "--data", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "among them 'other', which is none of the model's 10" in capsys.readouterr().err
