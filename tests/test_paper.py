"""The paper's table: cells in order of value within a deadline, kept and gone on with; pictures as models have them."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lfrns_hub.zoo import create_dense, make_transform

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAME = "resnet20-pictures-macs0.5-batch16-lr0.01"
DENSE = "resnet20-pictures-batch16-lr0.01"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import benchmarks/paper.py as it is imported when it is run, with one small network in its order."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    module = importlib.import_module("paper")
    monkeypatch.setattr(module, "BUDGETS", [("resnet20", 0.5, None)])
    yield module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Write pictures of noise and random weights; give the options of a run on them."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 8), ("validation", 2)):
        for label in range(10):
            folder = tmp_path / "pictures" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    save_file(create_dense("cifar_resnet20").state_dict(), tmp_path / "resnet20_cifar10.safetensors")
    options = {"--data-dir": tmp_path / "pictures", "--weights-dir": tmp_path, "--results": tmp_path / "kept"}
    options |= {"--cache": tmp_path / "cache", "--seeds": 1, "--device": "cpu"}
    return ["--smoke", *(str(word) for pair in options.items() for word in pair)]


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what was kept."""
    return json.loads((folder / "kept" / "paper.json").read_text())["cells"]


def test_cells_are_filled_told_and_not_filled_again(paper, arguments, tmp_path, capsys, monkeypatch):
    uncut = paper.Contestant("uncut", "control", lambda case: case.copy())
    monkeypatch.setitem(paper.contestants, "uncut", uncut)
    only = ["--contestants", "dense, without a teacher", "uncut"]
    paper.main([*arguments, *only], began=time.time())
    assert capsys.readouterr().out.count(": ") == 4
    kept = cells(tmp_path)
    control = f"{NAME} | uncut | 0 |"
    dense = f"{DENSE} | dense, without a teacher | 0 |"  # of the network alone, whatever the budget
    assert set(kept) == {f"{control} 0", f"{control} 1", f"{dense} 0", f"{dense} 1"}
    cut, trained = kept[f"{control} 0"], kept[f"{control} 1"]
    assert (
        cut["macs_fraction"] == cut["params_fraction"] == 1
        and cut["epochs"] == 0
        and cut["cell_seconds"] >= cut["seconds"]
    )
    assert trained["epochs"] == 1 and trained["batch_size"] == 16 and trained["device"] == "cpu"
    assert trained["images_per_second"] > 0 and trained["mixed_precision"] in ("no", "bf16")
    assert trained["versions"]["torch"] == metadata.version("torch")

    paper.main([*arguments, *only], began=time.time())
    assert capsys.readouterr().out == ""
    paper.main(["--table", "--results", str(tmp_path / "kept")])
    lines = [[field.strip() for field in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [line[1:3] for line in lines[2:]] == [
        ["all", "dense, without a teacher"],
        ["MACs 0.5", "uncut"],
    ]
    assert lines[3][0] == "resnet20, pictures (smoke)" and lines[3][5] == "1" and lines[3][-1] == "cpu"


def test_the_page_is_that_of_the_kept_cells(paper, monkeypatch):
    monkeypatch.undo()  # with all networks in its order
    assert paper.DOCUMENT.read_text(encoding="utf-8") == paper.render(), "python benchmarks/paper.py --render"


def test_what_does_not_fit_is_left_out_and_what_outlasts_its_time_is_given_up(
    paper, arguments, tmp_path, capsys, monkeypatch
):
    paper.main([*arguments, "--minutes", "0"], began=time.time())
    assert capsys.readouterr().out == "the time is over: what is left was not begun\n"

    def endless(self: Any, *_: Any) -> nn.Module:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(paper.TimedBench, "cut_seconds", lambda *_: 1.0)
    monkeypatch.setattr(paper.TimedBench, "prune", endless)
    monkeypatch.setattr(paper, "LEAST_SECONDS", 0)
    paper.main([*arguments, "--minutes", "5", "--contestants", "ours"], began=time.time())
    line = f"{NAME} | ours | seed 0 | epochs 0: given up after 3 s; 1 s were predicted\n"
    assert capsys.readouterr().out == line
    monkeypatch.setattr(paper.TimedBench, "cut_seconds", lambda *_: 1e6)
    paper.main([*arguments, "--minutes", "5", "--contestants", "ours"], began=time.time())
    assert "epochs 0: left out, about 1000000 s of the " in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_a_peer_that_is_not_installed_says_so_and_is_not_kept(paper, arguments, tmp_path, capsys, monkeypatch):
    import torch_pruning_peers
    from case import Absent

    monkeypatch.setattr(torch_pruning_peers, "tp", Absent("torch_pruning"))
    paper.main([*arguments, "--contestants", "Torch-Pruning, L1"], began=time.time())
    assert capsys.readouterr().out == f"{NAME} | Torch-Pruning, L1: torch_pruning is not installed\n"
    assert not (tmp_path / "kept").exists()


def test_networks_without_weights_for_the_data_are_trained_first(paper, arguments, capsys, monkeypatch):
    monkeypatch.setattr(paper, "BUDGETS", [("vit_small", 0.5, None), ("resnet110", 0.5, 0.5), ("resnet20", 0.5, None)])
    asked = paper.Paper(paper.parse([*arguments, "--epochs", "2", "10"]))
    order = [(seed, epochs, task) for seed, epochs, task, *_ in asked.order()]
    assert order == [(0, 2, "resnet20"), (0, 10, "resnet20"), (0, 2, "resnet110"), (0, 10, "resnet110")]
    monkeypatch.setattr(paper, "CLASSES", 100)
    asked = paper.Paper(paper.parse([*arguments, "--seeds", "2"]))
    assert {task for *_, task, _, _ in asked.order()} == {"resnet110", "resnet20"}
    assert not asked.has_weights("resnet20")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_resized_as_pillow_does_it(paper, interpolation):
    accuracy = sys.modules["accuracy"]
    model = create_dense("test_resnet", num_classes=10, pretrained=False)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 112, 112), "fixed_input_size": True}
    model.pretrained_cfg |= {"crop_pct": 1.0, "interpolation": interpolation, "test_input_size": None}
    prepare = make_transform(model, train=False)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = accuracy.Pictures(pixels, torch.zeros(4, dtype=torch.int64), prepare, train=False)
    expected = torch.stack([prepare(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    given = pictures.normalise(pixels)
    assert given.shape[-1] == prepare.size[0] != 32
    assert (given - expected).abs().max() * 0.3 * 255 < 1e-3  # levels of 255
