"""Columns of lists and of numbers are labels as the model's problem_type says, from the folder to the card."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import plain
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, ViTConfig, ViTForImageClassification, ViTImageProcessor

import lfrns_cli as cli
from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.zoo import load_data

MULTI, SINGLE, NUMBERS = "multi_label_classification", "single_label_classification", "regression"
INT, FLOAT, WORD, BOOL = (datasets.Value(name) for name in ("int64", "float64", "string", "bool"))
NAMED = datasets.ClassLabel(names=["owl", "cat", "dog"])
NAMES = ["cat", "dog", "owl"]


def listed(kind: Any, length: int = -1) -> Any:
    """The type of a column of lists."""
    return datasets.Sequence(kind, length=length)


def write(folder: Path, split: str, labels: list[Any], kind: Any, damaged: int | None = None) -> Path:
    """A split of random pictures, one of them perhaps damaged."""
    folder.mkdir(exist_ok=True)
    draw, pictures = np.random.default_rng(len(labels)), []
    for number in range(len(labels)):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer := io.BytesIO(), "PNG")
        pictures.append({"bytes": b"no picture" if number == damaged else buffer.getvalue(), "path": None})
    features = datasets.Features({"img": datasets.Image(), "label": kind})
    table = datasets.Dataset.from_dict({"img": pictures, "label": labels}, features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def answering(count: int, said: str | None = None, names: list[str] | None = None) -> nn.Module:
    """A model of so many outputs, as transformers has them."""
    model = nn.Identity()
    id2label = dict(enumerate(names)) if names else None
    model.config = SimpleNamespace(num_labels=count, problem_type=said, id2label=id2label)
    return model


def write_vit(folder: Path, **config: Any) -> str:
    """A small ViT and its processor, as transformers saves them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes, **config)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> Any:
    """Run `lfrns ARGUMENTS --json` in this process; gives what it printed, or the error where it must fail."""
    monkeypatch.setenv("LFRNS_CACHE", str(tmp_path / "cache"))

    def command(*arguments: str, fails: bool = False) -> Any:
        monkeypatch.setattr(sys, "argv", ["lfrns", *arguments, "--json"])
        capsys.readouterr()  # what was printed before is none of the command's
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert bool(ended.value.code) is fails, printed.err
        return printed.err if fails else json.loads(printed.out)

    return command


def test_a_multi_label_vit_goes_through_every_command_on_lists_of_words(tmp_path: Path, run: Any) -> None:
    draw = np.random.default_rng(0)
    words = [[word for word in NAMES if draw.random() < 0.5] for _ in range(24)]
    write(tmp_path / "data", "train", words, listed(WORD))
    write(tmp_path / "data", "validation", [["owl"], ["dog", "cat"], [], ["cat"]] * 2, listed(WORD), damaged=3)
    model = write_vit(tmp_path / "vit", problem_type=MULTI, id2label=dict(enumerate(NAMES)))
    data, out = ["--data", str(tmp_path / "data")], str(tmp_path / "slim")
    asked = ["--macs", "0.7", "--epochs", "1", "--fcr-steps", "2", "--batch-size", "8"]
    (made,) = run("slim", model, *data, *asked, "--out", out)["checkpoints"]
    again = run("evaluate", out, *data)
    trained = run("retrain", out, *data, "--teacher", model, "--epochs", "1")
    for found in (made, again, trained):
        assert (found["slim"]["output"], found["slim"]["images"], found["slim"]["images_skipped"]) == ("labels", 7, 1)
        assert found["slim"]["map_pct"] > 0 and found["slim"]["label_counts"] == [3, 2, 2]
        assert found["setup"]["label_names"] == NAMES
    assert again["slim"]["map_pct"] == made["slim"]["map_pct"] and trained["dense"] is not None
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "Mean average precision" in card and "3: cat, dog, owl" in card and "Label that lost most" in card
    assert "Classes" not in card
    config = AutoConfig.from_pretrained(out, trust_remote_code=False)
    assert (config.problem_type, config.id2label) == (MULTI, dict(enumerate(NAMES)))
    picture = tmp_path / "curve.png"
    curve = run("curve", model, *data, "--macs", "0.8", "--picture", str(picture), "--batch-size", "8")
    assert curve["points"][0]["map_pct"] > 0 and picture.is_file()


def test_a_vit_of_one_quantity_goes_through_every_command_on_numbers(tmp_path: Path, run: Any) -> None:
    quantities = np.random.default_rng(0).normal(size=32).tolist()
    write(tmp_path / "data", "train", quantities, FLOAT)
    model, out = write_vit(tmp_path / "vit", num_labels=1), str(tmp_path / "slim")
    data = ["--data", str(tmp_path / "data"), "--val-split", "0.25"]
    asked = ["--macs", "0.7", "--epochs", "0", "--fcr-steps", "2", "--batch-size", "8"]
    (made,) = run("slim", model, *data, *asked, "--out", out)["checkpoints"]
    again = run("evaluate", out, *data)
    trained = run("retrain", out, *data, "--epochs", "1")
    for found in (made, again, trained):
        assert (found["slim"]["output"], found["slim"]["images"]) == ("quantities", 8)
        assert found["slim"]["mae"] > 0 and found["slim"]["r2"] is not None
        assert found["setup"]["label_names"] is None
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "Mean absolute error" in card and "Classes" not in card
    assert AutoConfig.from_pretrained(out, trust_remote_code=False).problem_type == NUMBERS
    picture = tmp_path / "curve.png"
    curve = run("curve", model, *data, "--macs", "0.8", "--picture", str(picture), "--batch-size", "8")
    assert curve["points"][0]["r2"] is not None and picture.is_file()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_lists_of_classes_are_refused_before_anything_runs_where_the_model_says_nothing(
    split: str, tmp_path: Path, run: Any
) -> None:
    kinds = {"train": NAMED, "validation": NAMED} | {split: listed(NAMED)}
    for name, kind in kinds.items():
        write(tmp_path / "data", name, [[0], [1, 2]] if name == split else [0, 1], kind)
    model, out = write_vit(tmp_path / "vit", num_labels=3), tmp_path / "slim"
    error = run("slim", model, "--data", str(tmp_path / "data"), "--macs", "0.7", "--out", str(out), fails=True)
    assert error.startswith("ValueError: load_data") and len(error.splitlines()) == 1
    assert f"'{split}'): the column 'label' holds lists of classes, and the model has no problem_type" in error
    assert not out.exists()


ROWS = [[1, 0, 1], [0, 0, 0]]
READ = {
    "rows of whole numbers": (ROWS, listed(INT), answering(3, MULTI), ROWS),
    "rows of fixed length": ([[0, 1], [1, 0]], listed(INT, 2), answering(2, MULTI), [[0, 1], [1, 0]]),
    "rows of numbers, one unknown": ([[1.0, None]], listed(FLOAT), answering(2, MULTI), [[1, -100]]),
    "rows of truths": ([[True, False]], listed(BOOL), answering(2, MULTI), [[1, 0]]),
    "numbers of classes": ([[2, 0], [], [1]], listed(INT), answering(3, MULTI), [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
    "names of classes by name": ([[0, 2], [1]], listed(NAMED), answering(3, MULTI, NAMES), [[0, 1, 1], [1, 0, 0]]),
    "words by name": ([["Dog"], []], listed(WORD), answering(3, MULTI, NAMES), [[0, 1, 0], [0, 0, 0]]),
    "yes or no by number": ([1, 0], INT, answering(1, MULTI), [1, 0]),
    "yes or no by name": (
        [1, 0], datasets.ClassLabel(names=["cat", "dog"]), answering(1, MULTI, ["Cat"]), [0, 1],
    ),
    "a quantity": ([0.5, 7.0], FLOAT, answering(1, NUMBERS), [0.5, 7]),
    "a quantity of whole numbers": ([3, 70], INT, answering(1, NUMBERS), [3, 70]),
    "a quantity of a model that says nothing": ([0.5, 7.0], FLOAT, answering(1), [0.5, 7]),
    "quantities": ([[0.5, 7.0], [2.0, -100.0]], listed(FLOAT), answering(2, NUMBERS), [[0.5, 7], [2, -100]]),
    "quantities of a model that says nothing": ([[0.5, 7.0]], listed(FLOAT), answering(2), [[0.5, 7]]),
    "quantities of whole numbers": ([[3, 4]], listed(INT), answering(2, NUMBERS), [[3, 4]]),
    "probabilities of classes": ([[0.25, 0.75]], listed(FLOAT), answering(2, SINGLE), [[0.25, 0.75]]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_column_is_read_as_the_outputs_mean(case: str, tmp_path: Path) -> None:
    labels, kind, model, wanted = READ[case]
    for split in ("train", "validation"):
        data = load_data(write(tmp_path / "d", split, labels, kind), split, transform=plain, model=model)
        (batch,) = DataLoader(data, len(labels))
        assert batch[1].dtype == torch.float32 and batch[1].tolist() == wanted


REFUSED = {
    "lists that say nothing": (ROWS, listed(INT), answering(3), "lists of int64, and the model has no problem_type"),
    "lists of words that say nothing": ([["cat"]], listed(WORD), answering(3), "has no problem_type.*config.json"),
    "words and no names": ([["cat"]], listed(WORD), answering(1, MULTI), "does not name its classes.*--class-map"),
    "a word of no class": ([["cow"]], listed(WORD), answering(3, MULTI, NAMES), "'cow', which is none"),
    "a class twice": ([[1, 1]], listed(INT), answering(3, MULTI), r"\[1, 1\], which names a class twice"),
    "a class too many": ([[5]], listed(INT), answering(3, MULTI), r"holds label 5, a label must lie in \[0, 3\)"),
    "two readings": ([[0, 1]], listed(INT), answering(2, MULTI), "can be rows of 0 and 1 or the classes"),
    "no list": ([None, [1]], listed(INT), answering(3, MULTI), "holds no list for some pictures"),
    "rows of another length": ([[0.0, 1.0]], listed(FLOAT), answering(3, MULTI), "a list of 2, and .* 3 outputs"),
    "rows beyond 1": ([[0.0, 7.0]], listed(FLOAT), answering(2, MULTI), "from 0 to 7.*problem_type"),
    "one class of many": ([0, 2], NAMED, answering(3, MULTI), "problem_type 'multi_label_classification' takes a list"),
    "one number of many": ([0, 2], INT, answering(3, MULTI), "3 labels that hold together.*problem_type"),
    "quantities that are words": ([["a"]], listed(WORD), answering(1, NUMBERS), "'regression' takes a number"),
    "infinite quantities": ([float("inf")], FLOAT, answering(1, NUMBERS), "labels of quantities are infinite"),
    "one quantity of many": ([0.5], FLOAT, answering(3, NUMBERS), "3 quantities.*problem_type"),
    "a number for classes": ([0.5], FLOAT, answering(3, SINGLE), "'single_label_classification' takes one class"),
    "a number for many outputs": ([0.5], FLOAT, answering(3), "nothing says whether.*Set problem_type"),
    "fractions that say nothing": ([[0.5, 0.7]], listed(FLOAT), answering(2), "problem_type"),
    "lists without a model": (ROWS, listed(INT), None, "only a model's problem_type says.*Pass the model"),
    "an unknown word": (ROWS, listed(INT), answering(3, "multi"), "problem_type='multi'.*must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_does_not_fit_the_outputs_is_refused_in_both_splits(case: str, tmp_path: Path) -> None:
    labels, kind, model, reason = REFUSED[case]
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=reason):
            load_data(write(tmp_path / "d", split, labels, kind), split, transform=plain, model=model)


def test_labels_of_a_feature_extractor_are_passed_over(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "d", "train", [0.5], FLOAT), "train", transform=plain, model=answering(0))
    assert data.labels is None


@pytest.mark.parametrize(
    ("labels", "kind", "said"),
    [(ROWS, listed(INT), MULTI), ([[7.0, 1.0, 2.0], [0.5, 1.0, 2.0]], listed(FLOAT), NUMBERS)],
)
def test_a_damaged_picture_has_unknown_labels_to_evaluate_on(labels: Any, kind: Any, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", "validation", labels, kind, damaged=0)
    data = load_data(folder, "validation", transform=plain, model=answering(3, said))
    row = data[0][1]
    assert row.isnan().all() if said == NUMBERS else row.tolist() == [-100] * 3
    assert data[1][1].tolist() == labels[1]


def test_a_stream_reads_rows_and_names_and_refuses_what_it_would_have_to_look_through(tmp_path: Path) -> None:
    def stream(name: str, labels: list[Any], kind: Any) -> Any:
        folder = write(tmp_path / name, "train", labels, kind)
        return stream_data(folder, "train", transform=plain, model=answering(3, MULTI, NAMES))

    (batch,) = stream("names", [[0, 2], [1]], listed(NAMED)).loader(2)
    assert sorted(batch["labels"].tolist()) == [[0, 1, 1], [1, 0, 0]]
    (batch,) = stream("rows", ROWS, listed(INT, 3)).loader(2)
    assert sorted(batch["labels"].tolist()) == sorted(ROWS)
    with pytest.raises(ValueError, match=r"a stream cannot be looked through.*fixed length 3"):
        stream("lists", ROWS, listed(INT))
