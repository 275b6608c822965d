"""The engineer's case end to end: a .pth, a folder of pictures per class, and every command on what comes out."""

import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from sklearn.datasets import load_digits
from test_latency import Pretended

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub.latency import meter

BUILDER = """
import torch
from torch import nn


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16 * 16, 10)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "crop_pct": 1.0}

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))


def build():
    return TinyNet()
"""
HALF = (0.5, 0.5, 0.5)
PREPARED = ("--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--interpolation", "bilinear")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tinynet.py, its trained weights my.pth, and pictures/<class>/<picture>.png."""
    folder = tmp_path_factory.mktemp("engineer")
    (folder / "tinynet.py").write_text(BUILDER)
    digits = load_digits()
    for row in range(400):
        name = folder / "pictures" / "abcdefghij"[digits.target[row]] / f"{row}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[row] * 15.9).astype("uint8")).convert("RGB").save(name)
    sys.path.insert(0, str(folder))
    try:
        from tinynet import build
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    model = build().eval()
    images = torch.tensor(digits.images[:400], dtype=torch.float32).div(8).sub(1)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():  # random features with a fitted head know enough of the digits
        head, model.head = model.head, torch.nn.Identity()
        features = torch.cat([model(images), torch.ones(400, 1)], dim=1)
        targets = torch.nn.functional.one_hot(torch.tensor(digits.target[:400])).float() * 8
        fitted = torch.linalg.lstsq(features.T @ features + 30 * torch.eye(257), features.T @ targets).solution
        model.head = head
        head.weight.copy_(fitted[:-1].T)
        head.bias.copy_(fitted[-1])
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "my.pth"
    )
    return folder


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working folder."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


def run(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> dict:
    """Run `lfrns ARGUMENTS --json` in this process; gives what it printed on stdout, which must be JSON alone."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return json.loads(printed.out)


@pytest.fixture
def zoo(at: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Path:
    """Checkpoints at two budgets, made by one command when the first test asks for them."""
    if not (at / "zoo").exists():
        arguments = ["slim", "tinynet:build", "--weights", "my.pth", "--data", "pictures", "--val-split", "0.2"]
        arguments += ["--macs", "0.5,0.8", "--epochs", "1", "--learning-rate", "0.001", "--no-flip"]
        arguments += ["--fcr-steps", "2", "--out", "zoo", *PREPARED]
        found = run(monkeypatch, capsys, *arguments)
        (at / "zoo.json").write_text(json.dumps(found))
    return at / "zoo"


def test_several_budgets_make_a_folder_each_and_one_index(zoo: Path) -> None:
    found = json.loads((zoo.parent / "zoo.json").read_text())["checkpoints"]
    assert [Path(one["directory"]).name for one in found] == ["build.lfrns80_pictures", "build.lfrns50_pictures"]
    index = (zoo / "README.md").read_text()
    for one, budget in zip(found, (0.8, 0.5), strict=True):
        folder = zoo / Path(one["directory"]).name
        assert {"config.json", "model.safetensors", "README.md", "record.json"} <= {p.name for p in folder.iterdir()}
        assert one["slim"]["macs_g"] / one["dense"]["macs_g"] <= budget
        assert one["slim"]["images"] == 80
        assert one["slim"]["top1_pct"] > 80 < one["dense"]["top1_pct"]
        assert one["setup"]["label_names"] == list("abcdefghij")
        assert [row["top1_pct"] for row in one["setup"]["budgets"]] == [each["slim"]["top1_pct"] for each in found]
        assert f"[{folder.name}]({folder.name}) | {one['slim']['macs_g'] / one['dense']['macs_g']:.3f} |" in index
        assert f"| {one['slim']['top1_pct']:.2f} |" in index
    assert imread(zoo / "accuracy.png").std() > 0


def test_a_latency_budget_prints_what_each_layer_bought(at: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("LFRNS_CACHE", str(at / "cache"))
    monkeypatch.setattr(meter, "Machine", lambda *_: Pretended(tile=1))
    arguments = ["slim", "tinynet:build", "--weights", "my.pth", "--data", "pictures", "--val-split", "0.2"]
    arguments += ["--latency", "0.7", "--latency-threads", "1", "--latency-batch", "2", "--epochs", "0", "--no-flip"]
    arguments += ["--fcr-steps", "0", "--out", "fast", *PREPARED]
    (found,) = run(monkeypatch, capsys, *arguments)["checkpoints"]
    provenance, told = found["setup"]["provenance"], found["latency"]
    assert provenance["budget"] == {"latency": 0.7} and provenance["report"]["latency_fraction"] <= 0.7
    assert (told["setup"]["batch"], told["setup"]["threads"]) == (2, 1)
    assert [row["layer"] for row in told["layers"]] == ["first", "second", "head", "everything else"]
    assert told["slim_ms"] < 0.7 * told["dense_ms"]
    assert "at most 0.7 of the dense latency" in (at / "fast" / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments, "--overwrite"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    assert "bought" in printed and "everything else" in printed and f"{told['layers'][0]['slim_ms']:.3f}" in printed


def test_a_checkpoint_is_retrained_and_evaluated_in_place(zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from tinynet import build

    folder = zoo / "build.lfrns50_pictures"
    before = lfrns.load(folder, model=build())
    options = ["--data", "pictures", "--val-split", "0.2", "--weights", "my.pth"]
    found = run(monkeypatch, capsys, "retrain", str(folder), "--teacher", "tinynet:build", "--epochs", "2", *options)
    assert found["setup"]["epochs"] == 3
    assert found["slim"]["agreement_pct"] is not None
    index = (zoo / "README.md").read_text()
    assert (
        f"[{folder.name}]({folder.name}) | {found['slim']['macs_g'] / found['dense']['macs_g']:.3f} | "
        f"{found['slim']['top1_pct']:.2f} | {found['slim']['agreement_pct']:.2f} |" in index
    )
    after = lfrns.load(folder, model=build())
    assert not torch.equal(before.first.weight, after.first.weight)
    assert before.first.weight.shape == after.first.weight.shape
    again = run(monkeypatch, capsys, "evaluate", str(folder), "--dense", "tinynet:build", *options)
    assert again["slim"]["top1_pct"] == found["slim"]["top1_pct"]
    assert again["setup"]["epochs"] == 3


def test_bench_times_both_models_in_turns(zoo: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("lfrns_hub.runtimes.bench.installed", lambda package: False)
    # In processes that build the model anew: test_export.py looks at these.
    peaks = dict.fromkeys((1, 4), 5.0)
    monkeypatch.setattr("lfrns_hub.cli.judge.peak_memory", lambda build, arguments, shape, batches, **where: peaks)
    folder = zoo / "build.lfrns50_pictures"
    options = ["--dense", "tinynet:build", "--batches", "1,4", "--runs", "5"]
    found = run(monkeypatch, capsys, "bench", str(folder), *options)
    eager = [(one["runtime"], one["batch"]) for one in found["timings"] if one["runtime"] != "compiled"]
    assert eager == [("eager", 1), ("eager", 4)]
    assert "pip install" in found["left_out"]["onnxruntime"]
    assert 0 < found["macs_ratio"] < 1
    assert set(found["peak_memory_mb"]["slim"]) == {"1", "4"}
    assert Path(found["picture"]) == folder / "bench.png"
    assert (folder / "bench.png").stat().st_size > 5_000
    for one in found["timings"]:
        for key in ("dense_ms", "slim_ms", "ratio"):
            median, first, third = one[key]
            assert 0 < first <= median <= third
    assert found["size_mb"]["slim"] == (folder / "model.safetensors").stat().st_size / 1e6


def test_export_writes_an_archive_that_answers_as_the_model(zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from tinynet import build

    folder = zoo / "build.lfrns50_pictures"
    found = run(monkeypatch, capsys, "export", str(folder), "--format", "pt2", "--dense", "tinynet:build")
    assert found["any_batch"]
    assert found["largest_error"] <= 1e-4
    images = torch.randn(5, 3, 8, 8)
    archive = torch.export.load(found["path"]).module()
    torch.testing.assert_close(archive(images), lfrns.load(folder, model=build())(images), rtol=1e-4, atol=1e-4)


def test_a_class_of_ones_own_asks_for_what_builds_it(zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lfrns", "bench", str(zoo / "build.lfrns50_pictures")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "it holds a TinyNet" in (said := capsys.readouterr().err)
    assert "--dense" in said


def test_a_curve_is_a_table_and_a_picture_and_says_what_is_out_of_reach(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = ["--weights", "my.pth", "--data", "pictures", "--val-split", "0.2", "--macs", "0.8,0.5,0.001"]
    found = run(monkeypatch, capsys, "curve", "tinynet:build", *options, *PREPARED)
    assert [point["macs"] for point in found["points"]] == [0.8, 0.5]
    assert found["out_of_reach"] == [0.001]
    for point in found["points"]:
        assert found["smallest_macs"] <= point["macs_g"] / found["dense"]["macs_g"] <= point["macs"]
        assert point["latency_ms"] > 0
        assert point["top1_pct"] > 80
    assert imread(at / found["picture"]).std() > 0


def test_preprocessing_that_was_asked_for_is_what_the_checkpoint_was_made_with(at: Path) -> None:
    from tinynet import build

    from lfrns_hub.zoo import make_transform, set_preprocessing

    model = build()
    set_preprocessing(model, mean=HALF, std=HALF)
    white = make_transform(model, train=False)(Image.new("RGB", (8, 8), "white"))
    assert torch.equal(white, torch.ones(3, 8, 8))
