"""The comparison of recoveries: recipes in turn, judged on images that no training saw so, kept and rendered."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import benchmarks/recovery.py as it is imported when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module("recovery")
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def make_pictures(kind: Any, count: int = 4) -> Any:
    preparation = type("Preparation", (), {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return kind(pixels, torch.arange(count), preparation, train=True)


def test_the_page_is_that_of_the_kept_cells(recovery, capsys):
    page = recovery.DOCUMENT.read_text(encoding="utf-8")
    recovery.main(["--table"])
    assert page == recovery.INTRODUCTION + capsys.readouterr().out, "python benchmarks/recovery.py --render"


def test_held_out_images_are_turned_and_recoloured_alike_at_every_call(recovery):
    pictures = make_pictures(recovery.Pictures)
    once, again = recovery.unfamiliar(pictures), recovery.unfamiliar(pictures)
    assert torch.equal(once.pixels, again.pixels) and once.pixels.dtype == torch.uint8
    assert all((one != two).float().mean() > 0.5 for one, two in zip(once.pixels, pictures.pixels, strict=True))
    assert torch.equal(once.labels, pictures.labels) and not once.train


def test_an_average_takes_in_the_weights_at_each_batch_and_mixed_images_have_no_labels(recovery):
    pictures = make_pictures(recovery.Averaged)
    pictures.model, pictures.average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.zeros_(pictures.average.weight)
    pictures.model.num_batches_tracked.fill_(7)
    images, labels = pictures.__getitems__([0, 1])
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]
    assert torch.allclose(pictures.average.weight, torch.full((2,), 1 - recovery.AVERAGE_DECAY))
    assert pictures.average.num_batches_tracked == 7
    mixed = make_pictures(recovery.Mixed).__getitems__([0, 1])
    assert isinstance(mixed, torch.Tensor) and mixed.shape == (2, 3, 32, 32)


def test_recipes_go_in_turn_and_the_best_rate_is_that_of_the_rates_alone(recovery, capsys):
    filled = []

    class Bench:
        def __init__(self, name: str):
            self.name, self.store = name, self

        def get(self, *_: Any) -> None:
            return None

        def fill(self, name: str, *_: Any) -> None:
            filled.append((self.name, name))
            if name == "b":
                raise FloatingPointError("the loss is nan")

    tried = [(name, {}, recovery.Pictures) for name in "ab"]
    recovery.fill_in_turn([(Bench("one"), tried), (Bench("two"), tried[:1])], 2)
    assert filled == [("one", "a"), ("two", "a"), ("one", "b")]
    assert "one | b | epochs 2: the loss is nan" in capsys.readouterr().out
    cells = {
        f"net | {name} | 0 | {epochs}": {"top1_pct": top1, "options": {"learning_rate": rate}}
        for name, epochs, top1, rate in [("rate 1x", 2, 80, 0.1), ("rate 2x", 2, 81, 0.2), ("features", 2, 90, 0.3),
                                         ("rate 5x", 1, 99, 0.5)]
    }  # fmt: skip
    assert recovery.best_rate(cells, "net", 2) == 0.2 and recovery.best_rate(cells, "other", 2) is None
